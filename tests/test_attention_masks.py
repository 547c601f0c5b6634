"""What a query sees: layouts of masks, what is hidden stays hidden, and the dropout mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import (
    DTYPES,
    SEED,
    Case,
    F,
    Inputs,
    assert_accurate,
    call,
    check,
    expected,
    make,
    results_of,
)
from conftest import Backend
from oracle import assert_bits_equal, drop_scale, keep_mask, nan_memory, normal
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import pyfast

pytestmark = pytest.mark.backends("reference", "cpu", "triton")
attention = F.scaled_dot_product_attention
INFINITY = float("inf")

MASK_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda m: m.transpose(-1, -2).contiguous().transpose(-1, -2),
    "heads last": lambda m: m.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "every second column": lambda m: torch.stack([m, m.flip(-1)], -1)[..., 0],
    "every second row": lambda m: torch.stack([m, m.flip(-1)], -2).flatten(-3, -2)[..., ::2, :],
    "misaligned": lambda m: torch.cat([m[..., :1], m, m[..., :2]], -1)[..., 1:-2],
    "expanded rows": lambda m: m[:, :, :1].expand_as(m),
    "expanded columns": lambda m: m[..., :1].expand_as(m),
    "expanded heads": lambda m: m[:, :1].expand_as(m),
    "one element": lambda m: m[:1, :1, :1, :1].expand_as(m),
}


@pytest.mark.parametrize("kind", ["bool", "float32", "same"])
@pytest.mark.parametrize("layout", MASK_LAYOUTS)
def test_strided_masks(backend: Backend, layout: str, kind: str) -> None:
    """The same bits as of a contiguous copy, and the gradient of an expanded mask is the sum."""
    dtype = torch.bfloat16 if kind == "same" else torch.float32
    case = Case(heads=3, num_queries=18, num_keys=37, mask=f"{kind} bhls")
    inputs, grads = make(case, dtype)
    assert inputs.mask is not None
    whole = MASK_LAYOUTS[layout](inputs.mask)

    def strided(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
        assert x.mask is not None
        return call(case, x._replace(mask=MASK_LAYOUTS[layout](x.mask)))

    def copied(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
        assert x.mask is not None
        return call(case, x._replace(mask=MASK_LAYOUTS[layout](x.mask).contiguous()))

    assert layout == "misaligned" or whole.stride() != inputs.mask.stride()
    ours, wanted = (results_of(function, case, inputs, grads) for function in (strided, copied))
    eps = 8 * torch.finfo(dtype).eps
    for name, value in wanted.items():
        if backend.name == "cpu" and name != "mask":
            assert_bits_equal(ours[name], value, name)
        torch.testing.assert_close(ours[name], value, rtol=eps, atol=eps)


def test_strided_mask_is_right(backend: Backend) -> None:
    case = Case(heads=3, num_queries=18, num_keys=37, mask="float32 bhls")
    inputs, grads = make(case, torch.float32)
    for layout in ("transposed", "heads last", "every second column", "misaligned"):
        change = MASK_LAYOUTS[layout]
        function = lambda c, x: call(c, x._replace(mask=change(x.mask)))  # noqa: B023, E731
        results = results_of(function, case, inputs, grads)
        assert_accurate(results, expected(case, torch.float32), layout)


HIDDEN = 11  # of these keys of NaN
Hide = dict[str, Any]


def hiding(queries: int, keys: int) -> dict[str, Hide]:
    """Ways to call attention so that no query sees the last keys."""
    visible = torch.ones(queries, keys, dtype=torch.bool)
    visible[:, -HIDDEN:] = False
    additive = torch.zeros(queries, keys).masked_fill(~visible, -INFINITY)
    behind = keys - HIDDEN - queries
    return {
        "bool": {"attn_mask": visible},
        "bool of one row": {"attn_mask": visible[:1]},
        "additive": {"attn_mask": additive},
        "additive of one row": {"attn_mask": additive[0]},
        "causal": {"is_causal": True},
        "causal and softcap": {"is_causal": True, "softcap": 2.0},
        "window": {"window": (-1, behind)},
        "window and slopes": {"window": (3, behind), "alibi_slopes": torch.tensor([0.5, 0.1])},
        "bool and dropout": {"attn_mask": visible, "dropout_p": 0.4, "seed": 3},
        "bool and sinks": {"attn_mask": visible, "sinks": torch.tensor([0.5, 1.0])},
    }


def everything(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = attention(*leaves, return_lse=True, **keywords)
    torch.autograd.backward([out, lse], [normal(*t.shape).to(t.dtype) for t in (out, lse)])
    return [out.detach(), lse.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", hiding(1, 20))
@pytest.mark.parametrize("value", [float("nan"), INFINITY, -INFINITY, 3e38], ids=str)
def test_hidden_keys_do_not_matter(
    backend: Backend, way: str, value: float, dtype: torch.dtype
) -> None:
    """Whatever is in a key, or a value, that nobody sees."""
    for queries, keys in ((9, 20), (33, 90), (1, 12)):
        keywords = hiding(queries, keys)[way]
        if "causal" in way:
            queries = keys - HIDDEN
        q, k, v = normal(1, 2, queries, 16), *normal(2, 1, 2, keys, 16)
        q, k, v = (t.to(dtype) for t in (q, k, v))
        k[:, :, -HIDDEN:] = v[:, :, -HIDDEN:] = 0
        wanted = everything(q, k, v, **keywords)
        for place in ("k", "v", "both"):
            poisoned = [k.clone(), v.clone()]
            for i, name in enumerate(("k", "v")):
                if place in (name, "both"):
                    poisoned[i][:, :, -HIDDEN:] = value
            actual = everything(q, *poisoned, **keywords)
            for name, a, w in zip(("out", "lse", "q", "k", "v"), actual, wanted, strict=True):
                assert a.isfinite().all(), f"{place}, {name}"
                torch.testing.assert_close(a, w)
            for grad in actual[3:]:
                assert not grad[:, :, -HIDDEN:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive", "causal", "window"])
def test_only_who_sees_nan_gets_it(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    """A key of NaN in the middle: the other rows, and their gradients, stay as they are."""
    n, at = 70, 20
    q, k, v = (t.to(dtype) for t in normal(3, 1, 1, n, 16))
    visible = {
        "bool": normal(n, n) > 0,
        "additive": normal(n, n) > 0,
        "causal": torch.ones(n, n, dtype=torch.bool).tril(),
        "window": torch.ones(n, n, dtype=torch.bool).tril(2).triu(-3),
    }[kind]
    keywords: dict[str, Any] = {
        "bool": {"attn_mask": visible},
        "additive": {"attn_mask": torch.zeros(n, n).masked_fill(~visible, -INFINITY)},
        "causal": {"is_causal": True},
        "window": {"window": (3, 2)},
    }[kind]
    wanted = everything(q, k, v, **keywords)
    for place in (k, v):
        before = place.clone()
        place[:, :, at] = float("nan")
        actual = everything(q, k, v, **keywords)
        place.copy_(before)
        sees = visible[:, at]
        for i in (0, 2):
            torch.testing.assert_close(actual[i][:, :, ~sees], wanted[i][:, :, ~sees])
            assert actual[i][:, :, sees].isnan().all()


def test_dropped_nan(backend: Backend) -> None:
    """A dropped weight hides a value of NaN from the result."""
    q, k, v = normal(3, 1, 2, 40, 16)
    mask = keep_mask((1, 2, 40, 40), 0.5, 9, stream=0)
    wanted = attention(q, k, v, dropout_p=0.5, seed=9)
    v[:, :, 7] = float("nan")
    out = attention(q, k, v, dropout_p=0.5, seed=9)
    kept = mask[..., 7]
    assert out[kept].isnan().all()
    torch.testing.assert_close(out[~kept], wanted[~kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_see_nothing(backend: Backend, dtype: torch.dtype) -> None:
    """Zeros, -inf, no gradient: for one row, for a block of rows, for all."""
    for rows in ([3], list(range(16, 70)), list(range(90))):
        visible = normal(90, 70) > -0.5
        visible[rows] = False
        additive = torch.zeros(90, 70, dtype=dtype).masked_fill(~visible, -INFINITY)
        for mask in (visible, additive):
            q, k, v = (t.to(dtype) for t in (normal(1, 2, 90, 16), *normal(2, 1, 2, 70, 16)))
            with nan_memory():
                out, lse, grad_q, grad_k, grad_v = everything(q, k, v, attn_mask=mask)
            assert not out[:, :, rows].any() and not grad_q[:, :, rows].any()
            assert (lse[:, :, rows] == -INFINITY).all()
            assert all(t.isfinite().all() for t in (out, grad_q, grad_k, grad_v))
            assert lse.isfinite().sum() == 2 * (90 - len(rows))


def test_additive_mask_that_hides_has_no_gradient(backend: Backend) -> None:
    mask = normal(2, 1, 18, 37).masked_fill(normal(2, 1, 18, 37) > 0.5, -INFINITY)
    mask[:, :, 4] = -INFINITY
    leaf = mask.clone().requires_grad_()
    q, k, v = normal(2, 3, 18, 8), *normal(2, 2, 3, 37, 8)
    attention(q, k, v, leaf).square().sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert torch.equal(leaf.grad[mask == -INFINITY], torch.zeros(int((mask == -INFINITY).sum())))
    assert leaf.grad[mask > -INFINITY].count_nonzero() == (mask > -INFINITY).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_the_smallest_number(backend: Backend, dtype: torch.dtype) -> None:
    """Models that mask with finfo.min: hidden as good as with -inf, and a row of nothing else is
    uniform as in torch, because it is -inf nowhere."""
    q, k, v = (t.to(dtype) for t in normal(3, 1, 2, 33, 16))
    mask = torch.full((33, 33), torch.finfo(dtype).min, dtype=dtype).triu(1)
    torch.testing.assert_close(attention(q, k, v, mask), attention(q, k, v, is_causal=True))
    mask[5] = torch.finfo(dtype).min
    actual = attention(q, k, v, mask)
    eps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual[:, :, 5], v.float().mean(2).to(dtype), rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_rows_of_the_smallest_number(
    backend: Backend, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """exp(score - lse) is 1 for each key there, because lse has no digit left for log(S)."""
    if backend.name in ("cpu", "triton"):
        reason = "as in torch's CPU kernel: the backward pass knows a row by its lse in float32"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    q, k, v = (t.to(dtype).requires_grad_() for t in normal(3, 1, 2, 33, 16))
    mask = torch.full((33, 33), torch.finfo(dtype).min, dtype=dtype)
    attention(q, k, v, mask).sum().backward()
    assert v.grad is not None
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(v.grad, torch.ones_like(v), rtol=eps, atol=eps)


def test_causal_bias(backend: Backend) -> None:
    """torch's mask objects, which name the alignment."""
    q, k, v = (t.to(backend.device) for t in (normal(1, 2, 9, 8), *normal(2, 1, 2, 14, 8)))
    for bias, alignment in ((causal_upper_left, "top_left"), (causal_lower_right, "bottom_right")):
        wanted = attention(q, k, v, is_causal=True, causal_alignment=alignment)
        assert_bits_equal(attention(q, k, v, bias(9, 14)), wanted)
        on_cpu = (t.cpu() for t in (q, k, v))
        torchs = torch.nn.functional.scaled_dot_product_attention(*on_cpu, bias(9, 14))
        torch.testing.assert_close(wanted.cpu(), torchs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_mask_is_that_of_the_seed(backend: Backend, p: float, dtype: torch.dtype) -> None:
    """Equal weights and the identity for v: what comes out is the mask, to the bit."""
    for lengths in ((40, 256), (130, 33), (1, 9), (65, 64)):
        num_queries, num_keys = lengths
        q, k = torch.zeros(2, 3, num_queries, 8), normal(2, 3, num_keys, 8)
        v = torch.eye(num_keys).expand(2, 3, num_keys, num_keys)
        out = attention(q.to(dtype), k.to(dtype), v.to(dtype), dropout_p=p, seed=SEED)
        mask = keep_mask((2, 3, *lengths), p, SEED, stream=0)
        assert torch.equal(out != 0, mask), lengths
        wanted = mask * (drop_scale(p) / num_keys)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), wanted.double(), rtol=2 * eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_mask_of_the_gradient(backend: Backend, dtype: torch.dtype) -> None:
    """grad_v is the transposed weights times grad_out: with the identity for it, the mask."""
    q, k = torch.zeros(2, 2, 50, 8, dtype=dtype), normal(2, 2, 37, 8).to(dtype)
    v = torch.zeros(2, 2, 37, 50, dtype=dtype, requires_grad=True)
    out = attention(q, k, v, dropout_p=0.3, seed=SEED)
    out.backward(torch.eye(50, dtype=dtype).expand(2, 2, 50, 50))
    assert v.grad is not None
    mask = keep_mask((2, 2, 50, 37), 0.3, SEED, stream=0)
    assert torch.equal(v.grad.transpose(-1, -2) != 0, mask)


def test_dropout_statistics(backend: Backend) -> None:
    """The mean over seeds is attention without dropout; fates are independent of each other."""
    q, k, v = normal(3, 1, 1, 64, 16)
    wanted, seeds = attention(q, k, v), 400
    total = sum(attention(q, k, v, dropout_p=0.5, seed=seed) for seed in range(seeds))
    p = torch.softmax(q @ k.transpose(-1, -2) / 4, -1)
    deviation = ((p.square() @ v.square()) / seeds).sqrt()
    z = (total / seeds - wanted) / deviation
    assert z.abs().max() < 5 and 0.9 < z.std() < 1.1
    masks = pyfast.dropout_mask((4, 3, 200, 300), 0.25, 1, stream=0)
    fates = masks.double() - 0.75
    for other in (fates.roll(1, -1), fates.roll(1, -2), fates.roll(1, 1), fates.roll(1, 0)):
        assert (fates * other).mean().abs() < 5 * 0.25 * 0.75 / math.sqrt(fates.numel())


@pytest.mark.parametrize("threads", [1, 2])
def test_dropout_and_groups(backend: Backend, threads: int) -> None:
    """The number of a mask is that of the query head, whoever computes it."""
    torch.set_num_threads(threads)
    for case in (
        Case((2,), 6, 20, 70, key_heads=2, p=0.3),
        Case((), 4, 70, 20, key_heads=1, p=0.3, causal=True),
        Case((2, 3), 2, 9, 9, p=0.3),
    ):
        check(call, case)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("mask_shape", [(1, 1), (3, 1), (1, 4)], ids=str)
@pytest.mark.parametrize(("key_heads", "num_keys"), [(1, 270), (4, 270), (4, 1100)])
def test_shared_mask_has_one_order_of_sums(
    backend: Backend, mask_shape: tuple[int, int], key_heads: int, num_keys: int
) -> None:
    """Heads and sequences add to one gradient in turn, also with more threads than processors."""
    q = normal(3, 4, 140, 8)
    k, v = normal(2, 3, key_heads, num_keys, 8)
    mask = normal(*mask_shape, 140, num_keys).requires_grad_()

    def gradient(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        return torch.autograd.grad(attention(q, k, v, mask, enable_gqa=True).sum(), mask)[0]

    wanted = gradient(1)
    with pyfast.use_backend("reference"):
        torch.testing.assert_close(wanted, gradient(1), rtol=1e-4, atol=1e-4)
    for _ in range(20):
        for threads in (2, 5):
            assert_bits_equal(gradient(threads), wanted, "mask")
