"""``residual + dropout(x + bias)`` in one pass against torch, in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfast.nn.functional as pyfast_F

from .cases import Case, Computation, drop, normal, parametrize, run_with_pytest

if TYPE_CHECKING:
    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((4096, 768), (16384, 1024))


def _inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"x": normal(shape, 0), "bias": normal(shape[-1:], 1), "residual": normal(shape, 2)}


def _torch(x: Tensor, bias: Tensor, residual: Tensor, p: float) -> Tensor:
    return residual + F.dropout(x + bias, p)


def _formula(keep: Tensor, p: float, x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return residual + drop(keep, p, x + bias)


BIAS_DROPOUT_ADD = Computation(_inputs, _torch, pyfast_F.bias_dropout_add, _formula)


def _case(shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> Case:
    """Forward reads x and residual and writes y; backward reads grad and writes grad_x."""
    return Case(
        op="bias_dropout_add",
        name="forward+backward" if backward else "forward with grad",
        shape=shape,
        dtype=dtype,
        computation=BIAS_DROPOUT_ADD,
        num_passes=5 if backward else 3,
        backward=backward,
        requires_grad=True,
        bar=1.25,
    )


CASES = [
    _case(shape, dtype, backward)
    for shape in SHAPES
    for dtype in DTYPES
    for backward in (False, True)
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, CASES)


def test_bias_dropout_add(benchmark: BenchmarkFixture, case: Case, implementation: str) -> None:
    run_with_pytest(benchmark, case, implementation)
