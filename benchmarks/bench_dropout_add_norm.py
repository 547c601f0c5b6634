"""``norm(residual + dropout(x)) * weight + bias`` in one pass against torch, in training; and
``rms_norm``, which the same kernel serves."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

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
EPS = 1e-5


def _rms_inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    weight = 1 + 0.1 * normal(shape[-1:], 1)
    return {"x": normal(shape, 0), "residual": normal(shape, 2), "weight": weight}


def _layer_inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {**_rms_inputs(shape), "bias": normal(shape[-1:], 3)}


def _layer_torch(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float) -> Tensor:
    return F.layer_norm(residual + F.dropout(x, p), x.shape[-1:], weight, bias, EPS)


def _rms_torch(x: Tensor, residual: Tensor, weight: Tensor, p: float) -> Tensor:
    return F.rms_norm(residual + F.dropout(x, p), x.shape[-1:], weight, EPS)


def _rms_pyfast(x: Tensor, residual: Tensor, weight: Tensor, **options: Any) -> Any:
    return pyfast_F.dropout_add_norm(x, residual, weight, None, norm="rms", eps=EPS, **options)


def _layer_formula(
    keep: Tensor, p: float, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    return F.layer_norm(residual + drop(keep, p, x), x.shape[-1:], weight, bias, EPS)


def _rms_formula(keep: Tensor, p: float, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    z = residual + drop(keep, p, x)
    return z * (z.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


NORMS = {
    "layer": Computation(
        _layer_inputs,
        _layer_torch,
        functools.partial(pyfast_F.dropout_add_norm, eps=EPS),
        _layer_formula,
    ),
    "rms": Computation(_rms_inputs, _rms_torch, _rms_pyfast, _rms_formula),
}


def _alone_inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"x": normal(shape, 0), "weight": 1 + 0.1 * normal(shape[-1:], 1)}


def _alone_torch(x: Tensor, weight: Tensor, p: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def _alone_pyfast(x: Tensor, weight: Tensor, p: float, seed: int | None = None) -> Tensor:
    return pyfast_F.rms_norm(x, tuple(x.shape[-1:]), weight, EPS)


def _alone_formula(keep: Tensor, p: float, x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


ALONE = Computation(_alone_inputs, _alone_torch, _alone_pyfast, _alone_formula)


def _case(norm: str, shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> Case:
    """Forward reads x and residual and writes z, their sum, and y; backward reads grad_y and z and
    writes grad_x and grad_residual."""
    return Case(
        op="dropout_add_norm",
        name=f"{norm} forward+backward" if backward else f"{norm} forward with grad",
        shape=shape,
        dtype=dtype,
        computation=NORMS[norm],
        num_passes=8 if backward else 4,
        backward=backward,
        requires_grad=True,
        bar=1.25,
    )


CASES = [
    _case(norm, shape, dtype, backward)
    for norm in NORMS
    for shape in SHAPES
    for dtype in DTYPES
    for backward in (False, True)
]
# One token of a decoder, a prompt, and a batch in training.
CASES += [
    Case(
        op="dropout_add_norm",
        name=f"rms_norm alone {'forward+backward' if backward else 'forward'}",
        shape=shape,
        dtype=dtype,
        computation=ALONE,
        num_passes=5 if backward else 2,
        backward=backward,
    )
    for shape in ((1, 4096), (64, 2048), (4096, 768))
    for dtype in DTYPES
    for backward in (False, True)
    if not backward or shape[0] > 1
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, CASES)


def test_dropout_add_norm(benchmark: BenchmarkFixture, case: Case, implementation: str) -> None:
    run_with_pytest(benchmark, case, implementation)
