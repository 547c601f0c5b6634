"""cross_entropy of a vocabulary, forward and backward: torch's of logits converted to float32, as
models do it, against pyfast's of the logits as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as torch_F
from torch import Tensor

import pyfast
from pyfast.ops._op import registered

from .cases import BaseCase, Call, Prepared, difference, normal, parametrize, run_with_pytest

if TYPE_CHECKING:
    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture


@dataclass(frozen=True)
class LossCase(BaseCase):
    """``shape`` = (rows, classes)."""

    @property
    def num_bytes(self) -> int:
        """The logits forward and backward, and the gradient."""
        return 3 * self.num_elements * self.dtype.itemsize

    @property
    def implementations(self) -> tuple[str, ...]:
        return "torch", "pyfast"

    def prepare(self, device: torch.device) -> PreparedLoss:
        return PreparedLoss(self, device)


class PreparedLoss(Prepared):
    def __init__(self, case: LossCase, device: torch.device) -> None:
        super().__init__(case, device)
        num_rows, num_classes = case.shape
        self.logits = normal(case.shape, 1).to(device, case.dtype).requires_grad_()
        generator = torch.Generator().manual_seed(2)
        self.target = torch.randint(num_classes, (num_rows,), generator=generator).to(device)

    def like(self) -> Tensor:
        return self.logits

    @property
    def backend(self) -> str:
        return registered()["cross_entropy"].backend_of(self.logits)

    def _step(self, implementation: str, logits: Tensor) -> tuple[Tensor, Tensor]:
        if implementation == "pyfast":
            loss = pyfast.nn.functional.cross_entropy(logits, self.target, dtype=torch.float32)
        else:
            x = logits if logits.dtype == torch.float64 else logits.float()
            loss = torch_F.cross_entropy(x, self.target)
        (grad,) = torch.autograd.grad(loss, logits)
        return loss.detach(), grad

    def call(self, implementation: str) -> Call:
        return lambda: self._step(implementation, self.logits)

    def check(self) -> str:
        exact = self._step("torch", self.logits.detach().double().requires_grad_())
        rounded, actual = self._step("torch", self.logits), self._step("pyfast", self.logits)
        found = map(difference, ("loss", "gradient"), actual, exact, rounded)
        return "; ".join(filter(None, found))


CASES = [
    LossCase("cross_entropy", "forward and backward", shape, dtype, floors={"torch": floor})
    for shape, floor in (
        ((1024, 50257), 1.0),
        ((4096, 32000), 1.0),
        ((256, 1000), 1.0),
        ((32, 10), 0.9),
    )
    for dtype in (torch.float32, torch.bfloat16)
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, CASES)


def test_cross_entropy(benchmark: BenchmarkFixture, case: BaseCase, implementation: str) -> None:
    run_with_pytest(benchmark, case, implementation)
