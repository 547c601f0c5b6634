"""What the checks of int8_oracle.py reject: the faults that int8 kernels are known to have.

A mutant is the right computation, written once more with its parts as arguments, one of them wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from int8_oracle import (
    Function,
    check_hard_rows,
    check_large_sums,
    check_linear,
    check_linear_activation,
    check_mm,
    check_products,
    check_quantize,
    extremes,
    ints,
    operands,
)
from oracle import normal
from torch import Tensor

import pyfast

Part = Callable[..., Tensor]


def quantize(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    absmax: Part = lambda v: v.abs().amax(-1, keepdim=True),
    step: Part = lambda absmax: absmax / 127,
    quotient: Part = lambda v, s: v / s,
    rounded: Part = torch.round,
    lowest: int = -127,
    not_finite: Part = lambda values, scale, bad: (
        values * ~bad,
        scale.masked_fill(bad, torch.nan),
    ),
    change: Part = lambda scale: scale,
) -> tuple[Tensor, Tensor]:
    """quantize_int8 of rows, symmetric."""
    v = x.float()
    bad = ~v.isfinite().all(-1, keepdim=True)
    v = torch.where(bad, 0.0, v)
    s = step(absmax(v)) if scale is None else scale.reshape(-1, 1).expand(len(v), 1)
    s = change(torch.where(s == 0, 1.0, s))
    values = rounded(quotient(v, s)).clamp(lowest, 127).nan_to_num()
    values, s = not_finite(values, s, bad)
    return values.to(torch.int8), s[:, 0].contiguous()


def half_away(t: Tensor) -> Tensor:
    return t.sign() * (t.abs() + 0.5).floor()


def poisoned(values: Tensor, scale: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
    """One row that is not finite spoils all."""
    return values * ~bad.any(), scale.masked_fill(bad.any(), torch.nan)


QUANTIZE: dict[str, Function] = {
    "128 steps": partial(quantize, step=lambda absmax: absmax / 128),
    "127.5 steps": partial(quantize, step=lambda absmax: absmax / 127.5),
    "scale by a reciprocal": partial(quantize, step=lambda absmax: absmax * (1 / 127)),
    "values by a reciprocal": partial(quantize, quotient=lambda v, s: v * (1 / s)),
    "quotient in float64": partial(quantize, quotient=lambda v, s: v.double() / s.double()),
    "halves away from zero": partial(quantize, rounded=half_away),
    "halves up": partial(quantize, rounded=lambda t: (t + 0.5).floor()),
    "truncation": partial(quantize, rounded=torch.trunc),
    "floor": partial(quantize, rounded=torch.floor),
    "clamped to -128": partial(quantize, lowest=-128),
    "scale of the batch": partial(quantize, absmax=lambda v: v.abs().amax().expand(len(v), 1)),
    "scale of the neighbour": partial(quantize, change=lambda s: s.roll(1, 0)),
    "scale of the row's first half": partial(
        quantize, absmax=lambda v: v[:, : (v.shape[1] + 1) // 2].abs().amax(-1, keepdim=True)
    ),
    "scale without the tail": partial(
        quantize,
        absmax=lambda v: v[:, : v.shape[1] // 16 * 16 or None].abs().amax(-1, keepdim=True),
    ),
    "scale without negative values": partial(
        quantize, absmax=lambda v: v.amax(-1, keepdim=True).clamp(min=0)
    ),
    "NaN hidden": partial(quantize, not_finite=lambda values, scale, bad: (values, scale)),
    "values beside NaN": partial(
        quantize, not_finite=lambda v, s, bad: (v + bad * 1, s.masked_fill(bad, torch.nan))
    ),
    "NaN in every row": partial(quantize, not_finite=poisoned),
    "scale in bfloat16": partial(quantize, change=lambda s: s.bfloat16().float()),
    "given scale ignored": lambda x, scale=None: quantize(x),
}


def check_rows(function: Function) -> None:
    """The rows among what the tests of quantize_int8 check."""
    symmetric_rows = lambda x, **options: (  # noqa: E731
        pyfast_rows(x, **options) if set(options) - {"scale"} else function(x, **options)
    )
    check_hard_rows(symmetric_rows, "cpu", torch.float32)
    for n in range(1, 71):
        check_quantize(symmetric_rows, normal(n % 4 + 1, n))
    check_quantize(symmetric_rows, extremes(torch.float32))


def pyfast_rows(x: Tensor, **options: Any) -> Any:
    with pyfast.use_backend("reference"):
        return pyfast.nn.functional.quantize_int8(x, **options)


def test_rows_accept_what_is_right() -> None:
    check_rows(quantize)


@pytest.mark.parametrize("mutant", QUANTIZE)
def test_rows_reject(mutant: str) -> None:
    with pytest.raises(AssertionError, match="differ"):
        check_rows(QUANTIZE[mutant])


def asymmetric(x: Tensor, *, steps: float = 255, zero_first: bool = False, **o: Any) -> Any:
    """quantize_int8 of rows with a zero point, or a fault of it."""
    v = x.float()
    low, high = v.amin(-1, keepdim=True), v.amax(-1, keepdim=True)
    if o.get("spans_zero", True):
        low, high = low.clamp(max=0), high.clamp(min=0)
    half = 0.5 if o.get("halved", True) else 1.0
    s = (high * half - low * half) / (steps * half)
    s = torch.where(s == 0, 1.0, s)
    zero = (-128 - (low / s).round()).clamp(-128, 127)
    q = (v / s + zero).round() if zero_first else (v / s).round() + zero
    zero = zero + o.get("shift", 0)
    return q.clamp(-128, 127).to(torch.int8), s[:, 0].contiguous(), zero[:, 0].to(torch.int32)


ASYMMETRIC: dict[str, dict[str, Any]] = {
    "256 steps": {"steps": 256},
    "zero added before rounding": {"zero_first": True},
    "zero not in the range": {"spans_zero": False},
    "difference overflows": {"halved": False},
    "zero point off by one": {"shift": 1},
}


def check_asymmetric(function: Function) -> None:
    rows = torch.cat([normal(40, 31), normal(40, 31).abs() + 1, -normal(40, 31).abs() - 1])
    steps = torch.arange(31) - 15.5
    for x in (
        rows,
        extremes(torch.float32),
        torch.cat([steps, torch.tensor([-101.0, 154.0])])[None],
    ):
        check_quantize(lambda x, symmetric: function(x), x, symmetric=False)


def test_zero_points_accept_what_is_right() -> None:
    check_asymmetric(asymmetric)


@pytest.mark.parametrize("mutant", ASYMMETRIC)
def test_zero_points_reject(mutant: str) -> None:
    with pytest.raises(AssertionError, match="differ"):
        check_asymmetric(partial(asymmetric, **ASYMMETRIC[mutant]))


def wrapped(total: Tensor) -> Tensor:
    return ((total + 2**31) % 2**32 - 2**31).int()


def product(a: Tensor, b: Tensor) -> Tensor:
    return wrapped((a.double() @ b.double()).long())


def saturated(a: Tensor, b: Tensor) -> Tensor:
    """Pairs of products of u8 and s8 kept in 16 bits: vpmaddubsw."""
    k = a.shape[1] // 2 * 2
    left, right = a.long() + 128, b.long()
    total = left[:, k:] @ right[k:]
    for i in range(0, k, 2):
        pair = left[:, i : i + 2] @ right[i : i + 2]
        total += pair.clamp(-(2**15), 2**15 - 1)
    return wrapped(total - 128 * right.sum(0))


def without_last(dim: int) -> Function:
    def mutant(a: Tensor, b: Tensor) -> Tensor:
        y = product(a, b)
        last = y.shape[dim] - 1
        if last % 16 == 0 and last:  # the first of a tile of its own
            y.select(dim, last).zero_()
        return y

    return mutant


def without_tail(unit: int) -> Function:
    def mutant(a: Tensor, b: Tensor) -> Tensor:
        k = a.shape[1] // unit * unit or a.shape[1]
        return product(a[:, :k], b[:k])

    return mutant


PRODUCTS: dict[str, Function] = {
    "compensation missing": lambda a, b: wrapped((a.double() + 128).long() @ b.long()),
    "compensation of one column": lambda a, b: wrapped(
        (a.long() + 128) @ b.long() - 128 * b[:, :1].long().sum(0)
    ),
    "compensation without the tail": lambda a, b: wrapped(
        (a.long() + 128) @ b.long() - 128 * b[: len(b) // 4 * 4].long().sum(0)
    ),
    "unsigned": lambda a, b: product(a.view(torch.uint8), b),
    "saturated pairs": saturated,
    "-128 as -127": lambda a, b: product(a.clamp(min=-127), b),
    "sign and magnitude": lambda a, b: product(a.abs(), b) - 2 * product(a.abs() * (a < 0), b),
    "sum in float32": lambda a, b: (a.float() @ b.float()).int(),
    "sum in 16 bits": lambda a, b: product(a, b).short().int(),
    "strides of b ignored": lambda a, b: product(a, b.t().reshape(b.shape)),
    "wrong last row": without_last(0),
    "wrong last column": without_last(1),
    **{f"tail of K after {unit}": without_tail(unit) for unit in (2, 4, 16, 32, 64)},
}


def test_products_accept_what_is_right() -> None:
    check_products(product)
    for k in (2**17 - 1, 2**17):
        a = torch.full((1, k), -128, dtype=torch.int8)
        check_mm(product, a, a.t())


@pytest.mark.parametrize("mutant", PRODUCTS)
def test_products_reject(mutant: str) -> None:
    with pytest.raises(AssertionError, match="differ"):
        check_products(PRODUCTS[mutant])


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    dtype: torch.dtype | None = None,
    activation: str = "none",
    quantized: Function = quantize,
    multiplied: Function = product,
    scaled: Part = lambda sums, s, w: sums.float() * s[:, None] * w,
    biased: Part = lambda y, bias, w: y if bias is None else y + bias.float(),
    active: Part = lambda y, activation: pyfast.ops.int8_linear.activate(y, activation),
) -> Tensor:
    if x.dtype == torch.int8:
        assert input_scale is not None
        values, s = x, input_scale
        dtype = dtype or (torch.float32 if bias is None else bias.dtype)
    else:
        v = x.float() if smooth is None else x.float() * smooth
        values, s = quantized(v, input_scale)
    y = biased(scaled(multiplied(values, weight.t()), s, weight_scale), bias, weight_scale)
    return active(y, activation).to(dtype or x.dtype)


def fused(sums: Tensor, s: Tensor, w: Tensor) -> Tensor:
    """Both scales in one product, of which float32 keeps 24 bits: another order of roundings."""
    return sums.float() * (s[:, None] * w)


def smooth_after(x: Tensor, *rest: Any, smooth: Tensor | None = None, **options: Any) -> Tensor:
    return linear(x if smooth is None else x * smooth.to(x.dtype), *rest, **options)


LINEARS: dict[str, Function] = {
    **{
        f"quantize: {name}": partial(linear, quantized=f)
        for name, f in QUANTIZE.items()
        if name != "values beside NaN"  # whose products with a scale of NaN are NaN
    },
    **{f"product: {name}": partial(linear, multiplied=f) for name, f in PRODUCTS.items()},
    "scales multiplied first": partial(linear, scaled=fused),
    "weight's scale first": partial(linear, scaled=lambda t, s, w: t.float() * w * s[:, None]),
    "row scale of the neighbour": partial(
        linear, scaled=lambda t, s, w: t.float() * s.roll(1)[:, None] * w
    ),
    "row scale transposed": partial(
        linear, scaled=lambda t, s, w: t.float() * s[torch.arange(len(w)) % len(s)] * w
    ),
    "weight scale of the neighbour": partial(
        linear, scaled=lambda t, s, w: t.float() * s[:, None] * w.roll(1)
    ),
    "no weight scale": partial(linear, scaled=lambda t, s, w: t.float() * s[:, None]),
    "bias before the scale": partial(
        linear, biased=lambda y, bias, w: y if bias is None else y + bias.float() * w
    ),
    "no bias": partial(linear, biased=lambda y, bias, w: y),
    "sum and bias rounded once": partial(
        linear,
        scaled=lambda t, s, w: (t.float() * s[:, None]).double() * w,
        biased=lambda y, bias, w: (y if bias is None else y + bias.double()).float(),
    ),
    "bias in the result's dtype": partial(
        linear, biased=lambda y, b, w: y if b is None else y.bfloat16().float() + b.float()
    ),
    "smooth ignored": lambda *t, smooth=None, **o: linear(*t, **o),
    "smoothed in x's dtype": smooth_after,
    "input scale ignored": lambda x, *t, input_scale=None, **o: linear(
        x, *t, input_scale=input_scale if x.dtype == torch.int8 else None, **o
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_accepts_what_is_right(dtype: torch.dtype) -> None:
    check_linear(linear, dtype)
    check_large_sums(linear)


@pytest.mark.parametrize("mutant", sorted(LINEARS))
def test_linear_rejects(mutant: str) -> None:
    with pytest.raises(AssertionError, match="differ"):
        check_large_sums(LINEARS[mutant])
        check_linear(LINEARS[mutant], torch.bfloat16)


ACTIVE: dict[str, Part] = {
    "none": lambda y, activation: y,
    "before the bias": lambda y, activation: torch.relu(y - 1) + 1,
    "of the rounded result": lambda y, activation: getattr(torch.nn.functional, activation)(
        y.bfloat16().float()
    ),
    "quick gelu": lambda y, activation: y * torch.sigmoid(1.702 * y),
    "hard silu": lambda y, activation: torch.nn.functional.hardswish(y),
}


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activation_accepts_what_is_right(activation: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_linear_activation(linear, operands(37, 64, 49, dtype), activation)


@pytest.mark.parametrize("mutant", ACTIVE)
def test_activation_rejects(mutant: str) -> None:
    inputs = operands(37, 64, 49, torch.bfloat16)
    for activation in ("gelu", "silu"):
        with pytest.raises(AssertionError, match="off"):
            check_linear_activation(partial(linear, active=ACTIVE[mutant]), inputs, activation)


def test_the_other_gelu_is_rejected() -> None:
    inputs = operands(37, 64, 49, torch.float32)
    for name, other in (("gelu", "gelu_tanh"), ("gelu_tanh", "gelu")):
        active = lambda y, _, other=other: pyfast.ops.int8_linear.activate(y, other)  # noqa: E731
        with pytest.raises(AssertionError, match="off"):
            check_linear_activation(partial(linear, active=active), inputs, name)


def test_all_values_occur() -> None:
    """The operands hold the whole range, -128 too."""
    assert set(ints(100, 100).unique().tolist()) == set(range(-128, 128))
