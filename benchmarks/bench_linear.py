"""Linear with few rows, as in decoding: torch's against pyfast's, every call with other weights, so
that they come from memory.

``read``: the sum of the weights' bits as int64, by torch: what reading them takes at least there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

import pyfast
from pyfast.ops._op import registered

from .cases import BaseCase, Call, Prepared, difference, normal, parametrize, run_with_pytest

if TYPE_CHECKING:
    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture

POOL_BYTES = 256 << 20


@dataclass(frozen=True)
class LinearCase(BaseCase):
    """``shape`` = (rows, in_features, out_features), with a bias."""

    @property
    def num_bytes(self) -> int:
        m, k, n = self.shape
        return (m * k + n * k + n + m * n) * self.dtype.itemsize

    @property
    def implementations(self) -> tuple[str, ...]:
        return "torch", "read", "pyfast"

    def prepare(self, device: torch.device) -> PreparedLinear:
        return PreparedLinear(self, device)


class PreparedLinear(Prepared):
    def __init__(self, case: LinearCase, device: torch.device) -> None:
        super().__init__(case, device)
        m, k, n = case.shape
        self.x = normal((m, k), 1).to(device, case.dtype)
        self.bias = normal((n,), 2).to(device, case.dtype)
        weight = normal((n, k), 3).to(device, case.dtype)
        copies = max(2, POOL_BYTES // (weight.numel() * weight.itemsize))
        self.weights = [weight, *(weight.clone() for _ in range(copies - 1))]
        self._next = itertools.cycle(self.weights).__next__

    def like(self) -> Tensor:
        return self.x

    @property
    def backend(self) -> str:
        return registered()["linear"].backend_of(self.x)

    def call(self, implementation: str) -> Call:
        if implementation == "read":
            return lambda: self._next().view(torch.int64).sum()
        function: Callable[..., Any] = (
            pyfast.nn.functional.linear if implementation == "pyfast" else torch_F.linear
        )
        return lambda: function(self.x, self._next(), self.bias)

    def check(self) -> str:
        operands = self.x, self.weights[0], self.bias
        exact = torch_F.linear(*(t.double() for t in operands))
        return difference(
            "y", pyfast.nn.functional.linear(*operands), exact, torch_F.linear(*operands)
        )


_case = functools.partial(LinearCase, "linear", "few rows")
CASES = [
    _case((m, k, n), dtype, floors={"torch": 0.97})
    for k, n in ((1024, 1024), (4096, 4096), (1024, 32000))
    for dtype in (torch.bfloat16, torch.float32, torch.float16)
    for m in (1, 2, 4, 8, 16, 32, 64, 128)
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, CASES)


def test_linear(benchmark: BenchmarkFixture, case: BaseCase, implementation: str) -> None:
    run_with_pytest(benchmark, case, implementation)
