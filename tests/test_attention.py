"""Scaled dot-product attention: values and gradients over shapes, layouts and dtypes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import (
    DTYPES,
    LAYOUTS,
    Case,
    F,
    Inputs,
    assert_accurate,
    call,
    check,
    dense,
    expected,
    make,
    results_of,
)
from conftest import Backend
from oracle import assert_bits_equal, normal
from torch import Tensor

import pyfast

pytestmark = pytest.mark.backends("reference", "cpu", "triton")
torch_attention = torch.nn.functional.scaled_dot_product_attention
INFINITY = float("inf")

LENGTHS = (
    *(1, 2, 5, 6, 7, 15, 16, 17, 63, 64, 65),
    *(127, 128, 129, 191, 256, 257, 511, 513, 600),
)
SIZES = (1, 3, 8, 16, 17, 33, 64, 65, 80, 96, 100, 128, 192, 256)


def length_cases() -> list[Case]:
    """Every length as L and as S, against itself and against others; the long ones once a head."""
    cases = []
    for i, num_queries in enumerate(LENGTHS):
        others = {num_queries, LENGTHS[(7 * i + 3) % len(LENGTHS)]}
        for j, num_keys in enumerate(sorted(others)):
            small = num_queries * num_keys < 10000
            size, value_size = ((16, 33), (17, 16), (32, 0), (8, 24))[(i + j) % 4]
            cases.append(
                Case(
                    batch=(2,) if small else (1,),
                    heads=3 if small else 1,
                    num_queries=num_queries,
                    num_keys=num_keys,
                    size=size,
                    value_size=value_size,
                    causal=j == 1,
                    alignment="bottom_right" if i % 2 else "top_left",
                )
            )
    return cases


def size_cases() -> list[Case]:
    cases = []
    for i, size in enumerate(SIZES):
        lengths = ((9, 70), (40, 21), (66, 66))[i % 3]
        other = SIZES[(5 * i + 2) % len(SIZES)]
        for value_size in (0, other):
            cases.append(
                Case((1,), 2, *lengths, size, value_size, causal=value_size == 0, p=0.1 * (i % 2))
            )
    return cases


EMPTY = (
    Case(batch=(0,)),
    Case(heads=0),
    Case(num_queries=0),
    Case(num_keys=0),
    Case(num_keys=0, sinks=True),
    Case(num_queries=0, num_keys=0, causal=True),
    Case(num_keys=0, mask="bool bhls", p=0.5, window=(1, 1)),
    Case(num_keys=0, mask="float32 bhl"),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", length_cases(), ids=str)
def test_matches_oracle_lengths(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    check(call, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", size_cases(), ids=str)
def test_matches_oracle_head_sizes(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    check(call, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    check(call, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noncontiguous(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    """With NaN between the elements, so that what is read beside them shows."""
    check(call, Case(layout=layout, num_queries=19, num_keys=37, size=24), dtype)
    check(call, Case(layout=layout, heads=4, key_heads=2, size=7, p=0.1, causal=True), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "tokens first", "last dimension strided"])
def test_gradient_of_any_layout(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    """The gradient of the output comes strided, expanded (as from a sum), or not at all."""
    case = Case(size=24)
    inputs, (grad_out, grad_lse) = make(case, dtype)

    def relaid(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
        out, lse = call(case, x)
        return out * 1, lse.t() * 1 if lse.dim() == 2 else lse.transpose(-1, -2) * 1

    grads = LAYOUTS[layout](grad_out), grad_lse.transpose(-1, -2).contiguous()
    actual = results_of(relaid, case, inputs, grads)
    actual["lse"] = actual["lse"].transpose(-1, -2)
    assert_accurate(actual, expected(case, dtype), layout)
    x = inputs.map(lambda t: t.clone().to(backend.device).requires_grad_())
    call(case, x)[0].sum().backward()
    y = inputs.map(lambda t: t.clone().to(backend.device).requires_grad_())
    out, _ = call(case, y)
    out.backward(torch.ones_like(out).contiguous())
    for a, b in zip(x[:3], y[:3], strict=True):
        assert_bits_equal(a.grad, b.grad)


# query, key and value, mask (or None), enable_gqa
BROADCAST: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None, bool]] = {
    "2-D": ((5, 8), (7, 8), None, False),
    "2-D, mask": ((5, 8), (7, 8), (5, 7), False),
    "3-D": ((3, 5, 8), (3, 7, 8), (3, 1, 7), False),
    "3-D, keys 2-D": ((3, 5, 8), (7, 8), (5, 7), False),
    "3-D, queries 2-D": ((5, 8), (3, 7, 8), None, False),
    "4-D, one head of keys": ((2, 3, 5, 8), (2, 1, 7, 8), None, False),
    "4-D, one batch of keys": ((2, 3, 5, 8), (1, 3, 7, 8), (2, 1, 5, 7), False),
    "4-D, one batch of queries": ((1, 3, 5, 8), (2, 3, 7, 8), (3, 5, 1), False),
    "4-D, keys 3-D": ((2, 3, 5, 8), (3, 7, 8), (1, 1, 1, 1), False),
    "4-D, one head of queries": ((2, 1, 5, 8), (2, 3, 7, 8), None, False),
    "5-D": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (2, 3, 1, 5, 7), False),
    "5-D, mask 4-D": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (3, 2, 5, 7), False),
    "5-D, mask 4-D of one batch": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (1, 2, 5, 7), False),
    "5-D, mask 3-D": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (2, 5, 7), False),
    "5-D, mask of the first": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (2, 1, 1, 1, 7), False),
    "5-D, broadcast both": ((2, 1, 2, 5, 8), (1, 3, 2, 7, 8), None, False),
    "gqa": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 6, 5, 7), True),
    "mqa": ((2, 6, 5, 8), (2, 1, 7, 8), None, True),
    "gqa 3-D": ((6, 5, 8), (3, 7, 8), None, True),
    "gqa 5-D": ((2, 3, 4, 5, 8), (2, 3, 2, 7, 8), (4, 5, 7), True),
    "gqa of equal heads": ((2, 3, 5, 8), (2, 3, 7, 8), None, True),
}


@pytest.mark.parametrize("shapes", BROADCAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_torch(backend: Backend, shapes: str, dtype: torch.dtype) -> None:
    """Two to five dimensions, broadcast as torch does; shape, values, gradients and order of
    dimensions."""
    query, key, mask, enable_gqa = BROADCAST[shapes]
    generator = torch.Generator().manual_seed(2)
    wanted = [query, key, key, *([mask] if mask else [])]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in wanted]

    def gradients(function: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in given]
        try:
            out = function(*leaves, enable_gqa=enable_gqa)
        except RuntimeError as error:
            pytest.fail(f"{getattr(function, '__module__', function)} raises {error}")
        out.backward(normal(*out.shape).to(out.dtype))
        return [out.detach(), *(t.grad for t in leaves)]

    exact = gradients(torch_attention, *(t.double() for t in tensors))
    torchs = gradients(torch_attention, *tensors)
    ours = gradients(F.scaled_dot_product_attention, *tensors)
    for a, t, e in zip(ours, torchs, exact, strict=True):
        assert (a.shape, a.dtype) == (t.shape, t.dtype)
        # The gradient of a mask that adds the same to all of a row is a difference that is 0.
        allowed = 2 * (t - e).abs().max() + 4 * torch.finfo(dtype).eps * (1 + e.abs().max()) + 1e-5
        assert (a - e).abs().max() <= allowed


def test_mask_gives_dimensions() -> None:
    """Torch refuses a mask with more heads or batches than query; here query is broadcast."""
    for query, mask in (((3, 5, 8), (2, 3, 5, 7)), ((2, 1, 5, 8), (2, 3, 5, 7))):
        q, k, v = normal(*query), *normal(2, *query[:-2], 7, 8)
        out = F.scaled_dot_product_attention(q, k, v, normal(*mask))
        expanded = (t.expand(*mask[:2], *t.shape[-2:]) for t in (q, k, v))
        torch.testing.assert_close(out, torch_attention(*expanded, normal(*mask)))


def test_oracle_matches_torch() -> None:
    for case in (Case(), Case(heads=4, key_heads=2, causal=True), Case(mask="float32 bhls")):
        inputs, _ = make(case, torch.float64)
        inputs = inputs.map(Tensor.double)
        mask = inputs.mask
        if mask is not None:  # torch gives NaN for a row that sees nothing
            mask = mask.masked_fill((mask == -INFINITY).all(-1, keepdim=True), -1e4)
            inputs = inputs._replace(mask=mask)
        out = torch_attention(*inputs[:3], mask, is_causal=case.causal, enable_gqa=True)
        torch.testing.assert_close(dense(case, inputs)[0], out)


@pytest.mark.parametrize("case", [Case(size=257), Case(size=8, value_size=300), Case()], ids=str)
def test_what_no_kernel_serves(case: Case) -> None:
    """The reference does, unless a kernel was asked for by name."""
    dtype = torch.float64 if case == Case() else torch.float32
    check(call, case, dtype)
    with pyfast.use_backend("reference"):
        check(call, case, dtype)
    with pyfast.use_backend("cpu"), pytest.raises(RuntimeError, match="asked for, but"):
        call(case, make(case, dtype)[0])


@pytest.mark.backends("reference")
def test_float64(backend: Backend) -> None:
    for case in (*size_cases()[:6], Case(mask="float32 bhls", alibi="bh", sinks=True, softcap=2.0)):
        check(call, case, torch.float64)
