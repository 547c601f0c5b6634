"""Row-wise quantization to int8 against the operations of torch that it consists of.

16 million elements do not fit into a cache: the time is that of moving bytes. The small shape is
the activations of a Linear.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import pyfast.nn.functional as pyfast_F

from .cases import BaseCase, Call, Prepared, first_line, normal, parametrize, run_with_pytest

if TYPE_CHECKING:
    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture

LARGE, SMALL = (4096, 4096), (512, 4096)
MAX_OVER_COPY = 1.25  # 80 % of the bandwidth of moving the bytes once


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The formula: int8 of x's shape, and a float32 scale a row."""
    value = x.float()
    scale = value.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1, scale)
    return (value / scale).round_().clamp_(-127, 127).to(torch.int8), scale.squeeze(-1)


@dataclass(frozen=True)
class QuantizeCase(BaseCase):
    """The rows of one matrix."""

    @property
    def num_bytes(self) -> int:
        """The matrix read; a byte an element and the scales written."""
        return self.num_elements * (self.dtype.itemsize + 1) + 4 * self.shape[0]

    @property
    def implementations(self) -> tuple[str, ...]:
        return "torch", "torch.compile", "pyfast"

    def prepare(self, device: torch.device) -> PreparedQuantize:
        return PreparedQuantize(self, device)


class PreparedQuantize(Prepared):
    def __init__(self, case: QuantizeCase, device: torch.device) -> None:
        super().__init__(case, device)
        self.x = normal(case.shape, 0).to(device, case.dtype)

    def like(self) -> Tensor:
        return self.x

    def call(self, implementation: str) -> Call:
        if implementation == "torch.compile":
            torch.compiler.reset()
            compiled = torch.compile(quantize_rows, fullgraph=True, dynamic=False)
            return functools.partial(compiled, self.x)
        function = pyfast_F.quantize_int8 if implementation == "pyfast" else quantize_rows
        return functools.partial(function, self.x)

    def check(self) -> str:
        """What is wrong with pyfast's values and scales, which must be those of the formula to
        the bit; empty if nothing. The formula runs on the CPU: torch divides otherwise on GPUs.
        """
        try:
            results = pyfast_F.quantize_int8(self.x)
            return "; ".join(
                f"{name}: {int((actual.cpu() != expected).sum())} of {expected.numel()} differ"
                for name, actual, expected in zip(
                    ("values", "scale"), results, quantize_rows(self.x.cpu()), strict=True
                )
                if not torch.equal(actual.cpu(), expected)
            )
        except Exception as error:
            return first_line(error)


CASES = [
    QuantizeCase(
        "quantize_int8", "rows", shape, dtype, bar=MAX_OVER_COPY if shape == LARGE else None
    )
    for shape in (SMALL, LARGE)
    for dtype in (torch.float32, torch.bfloat16)
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, CASES)


def test_quantize_int8(benchmark: BenchmarkFixture, case: BaseCase, implementation: str) -> None:
    run_with_pytest(benchmark, case, implementation)
