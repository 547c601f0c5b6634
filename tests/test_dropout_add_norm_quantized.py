"""``dropout_add_norm(..., quantize=True)``: the int8 values of what it returns without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend
from int8_oracle import as_float32
from int8_oracle import quantize as quantize_rows
from oracle import assert_bits_equal, nan_memory, normal
from test_dropout_add_norm import VARIANTS, fused, given_operands
from torch import Tensor

import pyfast

F = pyfast.nn.functional
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((3, 1), (2, 3, 37), (5, 256), (33, 768), (2, 2056), (3, 4104))
Function = Callable[..., Any]


def check(function: Function, backend: Backend, dtype: torch.dtype, shapes: Any = SHAPES) -> None:
    """Against numpy's quantization of y, which test_dropout_add_norm.py has proved."""
    for shape in shapes:
        for name, (options, given, _) in VARIANTS.items():
            x, *others = (
                t if t is None else t.to(backend.device)
                for t in given_operands(shape, given, dtype)
            )
            x[0].zero_()
            if shape[0] > 2:
                x[1, ..., 0] = float("inf")
            y, *z = torch.utils._pytree.tree_leaves(fused(x, *others, **options))
            with nan_memory():
                values, scale, kept = function(x, *others, quantize=True, **options)
            text = f"{shape} {dtype} {name}"
            expected = quantize_rows(as_float32(y).reshape(-1, shape[-1]), shape[-1])
            assert values.dtype == torch.int8 and values.shape == x.shape, text
            assert scale.dtype == torch.float32 and scale.shape == x.shape[:-1], text
            wrong = np.flatnonzero(values.cpu().numpy().reshape(expected[0].shape) != expected[0])
            assert wrong.size == 0, f"{text}: values at {wrong[:5]}"
            assert_bits_equal(scale.reshape(-1, 1), torch.from_numpy(expected[1].copy()))
            assert_bits_equal(kept, z[0] if z else y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_numpy(backend: Backend, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not compute in {dtype}")
    check(fused, backend, dtype, SHAPES[1:4] if backend.is_slow else SHAPES)


def of_values(change: Callable[[Tensor, Tensor, Tensor], Any]) -> Function:
    return lambda *t, quantize, **options: change(*fused(*t, quantize=quantize, **options))


def from_wide(x: Tensor, *t: Any, quantize: bool, **options: Any) -> Any:
    """y is quantized before it is rounded."""
    wide = [None if o is None else o.double() for o in (x, *t)]
    y = torch.utils._pytree.tree_leaves(fused(*wide, **options))[0]
    return *F.quantize_int8(y), fused(x, *t, quantize=True, **options)[2]


MUTANTS = {
    "127 of 128": of_values(lambda v, s, k: (v, s * (127 / 128), k)),
    "truncated": of_values(lambda v, s, k: (v - v.sign(), s, k)),
    "scales of other rows": of_values(lambda v, s, k: (v, s.roll(1, 0), k)),
    "scales as numbers": of_values(lambda v, s, k: (v, s.nan_to_num(1.0), k)),
    "last column left out": of_values(
        lambda v, s, k: (torch.nn.functional.pad(v[..., :-1], (0, 1)), s, k)
    ),
    "quantized before rounding": from_wide,
    "nothing kept": of_values(lambda v, s, k: (v, s, k * 0)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_check_rejects(mutant: str) -> None:
    with pytest.raises(AssertionError):
        check(
            MUTANTS[mutant],
            Backend("cpu", "cpu", None, torch.device("cpu"), False),
            torch.bfloat16,
            SHAPES[2:4],
        )


def test_feeds_int8_linear(backend: Backend) -> None:
    if backend.name == "cuda":
        pytest.skip("int8_linear has no CUDA C++ kernel")
    x, residual = normal(2, 7, 64).to(backend.device)
    weight, scale = F.quantize_int8(normal(48, 64).to(backend.device))
    values, row_scale, y = fused(x, residual, None, None, quantize=True)
    result = F.int8_linear(values, weight, scale, input_scale=row_scale)
    assert_bits_equal(result, F.int8_linear(y, weight, scale))


def test_empty_and_errors() -> None:
    for shape in ((0, 8), (3, 0), (0, 0)):
        values, scale, y = F.dropout_add_norm(torch.ones(shape), None, None, quantize=True)
        assert values.shape == y.shape == shape and values.dtype == torch.int8
        assert torch.equal(scale, torch.ones(shape[0]))
    x = normal(2, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        F.dropout_add_norm(x, None, None, quantize=True)
    with torch.no_grad():
        F.dropout_add_norm(x, None, None, quantize=True)


def test_compiles_and_traces() -> None:
    x, weight = normal(4, 40), normal(40)

    def function(x: Tensor) -> Any:
        return F.dropout_add_norm(x, x, weight, None, 0.0, norm="rms", prenorm=True, quantize=True)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for got, expected in zip(compiled(x), function(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    arguments = (x, None, weight, None, torch.tensor(3), 0, 1, 1.0, 1e-5, True, True)
    torch.library.opcheck(torch.ops.pyfast.dropout_add_norm_int8.default, arguments)
