"""Dropout and its relatives against torch.

64 elements cost a call and hardly any work; 16 million do not fit into a cache.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfast.nn.functional as pyfast_F

from .cases import (
    Call,
    Case,
    Computation,
    drop,
    drop_rate,
    normal,
    parametrize,
    run_with_pytest,
)

if TYPE_CHECKING:
    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture

DTYPES = (torch.float32, torch.bfloat16)
SMALL = 64
SIZES = (1 << 16, 1 << 20, 1 << 24)
LARGE = 1 << 20  # from here on, writing 2 * x to a tensor that is there already is shown too
CHANNELS_SHAPE = (32, 64, 28, 28)

_SELU_SATURATION = 1.7580993408473766  # alpha' of Klambauer et al. 2017


def _inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"x": normal(shape, 0)}


def _alpha_formula(keep: Tensor, p: float, x: Tensor) -> Tensor:
    rate = drop_rate(p)
    scale = 1 / math.sqrt((1 - rate) * (1 + rate * _SELU_SATURATION**2))
    return torch.where(keep, x, -_SELU_SATURATION) * scale + _SELU_SATURATION * scale * rate


def _mul_out(x: Tensor) -> Call:
    return functools.partial(torch.mul, x, 2, out=torch.empty_like(x))


DROPOUT = Computation(_inputs, F.dropout, pyfast_F.dropout, drop)
ALPHA_DROPOUT = Computation(
    _inputs,
    functools.partial(F.alpha_dropout, training=True),
    functools.partial(pyfast_F.alpha_dropout, training=True),
    _alpha_formula,
)
DROPOUT2D = Computation(_inputs, F.dropout2d, pyfast_F.dropout2d, drop, mask_ndim=2)


def _both(name: str, shape: tuple[int, ...], dtype: torch.dtype, what: Computation) -> list[Case]:
    """Forward reads x and writes y; backward reads grad and writes grad_x."""
    others = {"torch.mul(out=)": _mul_out} if what is DROPOUT and shape[0] >= LARGE else {}
    prefix = f"{name} " if name else ""
    return [
        Case("dropout", f"{prefix}forward", shape, dtype, what, num_passes=2, others=others),
        Case(
            "dropout", f"{prefix}forward+backward", shape, dtype, what, num_passes=4, backward=True
        ),
    ]


def _small(dtype: torch.dtype) -> list[Case]:
    with_grad = Case(
        "dropout", "forward with grad", (SMALL,), dtype, DROPOUT, num_passes=2, requires_grad=True
    )
    return [*_both("", (SMALL,), dtype, DROPOUT), with_grad]


CASES = [
    *(case for dtype in DTYPES for case in _small(dtype)),
    *(case for size in SIZES for dtype in DTYPES for case in _both("", (size,), dtype, DROPOUT)),
    *(case for dtype in DTYPES for case in _both("alpha", (LARGE,), dtype, ALPHA_DROPOUT)),
    *(case for dtype in DTYPES for case in _both("2d", CHANNELS_SHAPE, dtype, DROPOUT2D)),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, CASES)


def test_dropout(benchmark: BenchmarkFixture, case: Case, implementation: str) -> None:
    run_with_pytest(benchmark, case, implementation)
