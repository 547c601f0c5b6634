"""Attention over packed sequences: each as if it were alone, but for the number of its mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from attention_cases import (
    DTYPES,
    LAYOUTS,
    SEED,
    Case,
    F,
    Inputs,
    grouped,
    scores_of,
    softmax_of,
)
from conftest import Backend
from device_under_test import CPU
from oracle import assert_bits_equal, drop_scale, keep_mask, nan_memory, normal
from torch import Tensor

pytestmark = pytest.mark.backends("reference", "cpu", "triton")


class Packed(NamedTuple):
    """``case``: what holds for every sequence; its lengths do not count."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    case: Case


LENGTHS = (3, 17, 64, 1, 70), (5, 9, 64, 33, 65)
PACKED = {
    "plain": Packed(*LENGTHS, Case()),
    "one sequence": Packed((40,), (70,), Case(size=64)),
    "sequences of one": Packed((1,) * 6, (1,) * 6, Case(causal=True)),
    "causal": Packed(*LENGTHS, Case(causal=True, size=33, value_size=17)),
    "causal, bottom right": Packed(*LENGTHS, Case(causal=True, alignment="bottom_right")),
    "without queries": Packed((0, 5, 0, 7, 0), (3, 0, 0, 9, 4), Case(causal=True)),
    "without anything": Packed((0, 0), (0, 0), Case()),
    "groups": Packed(*LENGTHS, Case(heads=6, key_heads=2)),
    "dropout": Packed(*LENGTHS, Case(heads=3, p=0.3)),
    "dropout of everything": Packed(*LENGTHS, Case(p=1.0)),
    "window": Packed(*LENGTHS, Case(window=(4, 2), alignment="bottom_right")),
    "softcap": Packed(*LENGTHS, Case(softcap=1.5, scale=0.7)),
    "slopes": Packed(*LENGTHS, Case(alibi="h", alignment="bottom_right")),
    "slopes of each": Packed(*LENGTHS, Case(alibi="bh")),
    "sinks": Packed((3, 0, 64, 1), (5, 9, 64, 0), Case(sinks=True)),
    "all": Packed(
        *LENGTHS,
        Case(
            heads=4,
            key_heads=2,
            causal=True,
            window=(20, -1),
            softcap=2.0,
            alibi="bh",
            sinks=True,
            p=0.2,
            alignment="bottom_right",
        ),
    ),
    "longer": Packed((150, 20, 300), (300, 130, 257), Case((), 1, causal=True, p=0.1)),
}


def bounds(lengths: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(dtype)


def make(packed: Packed, dtype: torch.dtype) -> list[Tensor | None]:
    """q, k, v, slopes, sinks."""
    case = packed.case
    generator = torch.Generator().manual_seed(7)
    random = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    key_heads, value_size = case.key_heads or case.heads, case.value_size or case.size
    q = random(sum(packed.lengths_q), case.heads, case.size)
    k = random(sum(packed.lengths_k), key_heads, case.size)
    v = random(sum(packed.lengths_k), key_heads, value_size)
    number = len(packed.lengths_q)
    shape = (number, case.heads) if case.alibi == "bh" else (case.heads,)
    slopes = random(*shape).abs() if case.alibi else None
    sinks = random(case.heads) if case.sinks else None
    return [q.to(dtype), k.to(dtype), v.to(dtype), slopes, sinks]


def call(packed: Packed, tensors: list[Any], **keywords: Any) -> tuple[Tensor, Tensor]:
    q, k, v, slopes, sinks = tensors
    case = packed.case
    result: tuple[Tensor, Tensor] = F.varlen_attention(
        q,
        k,
        v,
        bounds(packed.lengths_q),
        bounds(packed.lengths_k),
        max(packed.lengths_q),
        max(packed.lengths_k) + 3,
        case.p,
        case.causal,
        scale=case.scale,
        window=case.window,
        softcap=case.softcap,
        alibi_slopes=slopes,
        sinks=sinks,
        causal_alignment=case.alignment,
        return_lse=True,
        **{"seed": SEED, **keywords},
    )
    return result


def one_by_one(packed: Packed, tensors: list[Any]) -> tuple[Tensor, Tensor]:
    """The oracle, in the dtype of its inputs."""
    q, k, v, slopes, sinks = tensors
    case, number = packed.case, len(packed.lengths_q)
    shape = number, case.heads, max(packed.lengths_q), max(packed.lengths_k)
    kept = keep_mask(shape, case.p, SEED, stream=0) * drop_scale(case.p)
    parts_q = q.transpose(0, 1).split(packed.lengths_q, 1)
    parts_k, parts_v = (t.transpose(0, 1).split(packed.lengths_k, 1) for t in (k, v))
    outs, lses = [], []
    for n in range(number):
        own = slopes[n] if slopes is not None and slopes.dim() == 2 else slopes
        p, lse = softmax_of(*scores_of(case, Inputs(parts_q[n], parts_k[n], q, None, own)), sinks)
        if case.p > 0:
            p = p * kept[n, :, : p.shape[1], : p.shape[2]]
        outs.append(p @ grouped(case, parts_v[n]))
        lses.append(lse)
    return torch.cat(outs, 1).transpose(0, 1), torch.cat(lses, 1)


def results_of(function: Any, packed: Packed, tensors: list[Any], slopes: bool) -> list[Tensor]:
    leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
    if leaves[3] is not None:
        leaves[3].requires_grad_(slopes)
    out, lse = function(packed, leaves)
    grads = [normal(*t.shape).to(t.dtype) for t in (out, lse)]
    torch.autograd.backward([out, lse], grads)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in wanted]
    return [out.detach(), lse.detach(), *gradients]


def assert_close(actual: Tensor, exact: Tensor, dtype: torch.dtype, message: str) -> None:
    """Two roundings of the dtype, or some of float32, of the largest element.

    test_attention.py holds the kernel to its own error; this is about which elements meet.
    """
    assert actual.shape == exact.shape
    finite = exact.isfinite()
    assert torch.equal(actual[~finite].double(), exact[~finite]), message
    if finite.any():
        error = (actual[finite] - exact[finite]).abs().max()
        eps = max(2 * torch.finfo(dtype).eps, 32 * torch.finfo(torch.float32).eps)
        assert error <= eps * exact[finite].abs().max().clamp(min=1), f"{message}: {error:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_matches_oracle(backend: Backend, name: str, dtype: torch.dtype) -> None:
    packed, slopes = PACKED[name], backend.name == "reference"
    tensors = make(packed, dtype)
    double = [t if t is None else t.double() for t in tensors]
    with nan_memory():
        actual = results_of(call, packed, tensors, slopes)
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    exact = results_of(one_by_one, packed, double, slopes)
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        assert_close(a, e, dtype, f"result {i}")


def test_no_sequence(backend: Backend) -> None:
    empty = torch.empty(0, 2, 8, requires_grad=True)
    none = torch.zeros(1, dtype=torch.int32)
    out = F.varlen_attention(empty, empty, empty, none, none, 0, 0)
    assert out.shape == (0, 2, 8)
    out.sum().backward()


def test_float64() -> None:
    packed = PACKED["all"]
    tensors = [t if t is None else t.double() for t in make(packed, torch.float32)]
    for a, e in zip(
        results_of(call, packed, tensors, True),
        results_of(one_by_one, packed, tensors, True),
        strict=True,
    ):
        torch.testing.assert_close(a, e, check_dtype=False)


def test_is_attention_where_the_lengths_are_equal(backend: Backend) -> None:
    """The same dropout mask, too."""
    q, k, v = normal(3, 3, 20, 2, 16)
    ends = torch.arange(4) * 20
    flat = (t.flatten(0, 1) for t in (q, k, v))
    out = F.varlen_attention(*flat, ends, ends, 20, 20, 0.3, True, seed=4)
    whole = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), None, 0.3, True, seed=4
    )
    torch.testing.assert_close(out.view(3, 20, 2, 16).transpose(1, 2), whole)


@pytest.mark.parametrize("name", ["causal", "all"])
def test_noncontiguous(backend: Backend, name: str) -> None:
    """Operands that are parts of one projection, heads first, with a strided last dimension."""
    packed = PACKED[name]
    q, k, v, slopes, sinks = make(packed, torch.float32)
    assert q is not None and k is not None and v is not None
    wanted = call(packed, [q, k, v, slopes, sinks])
    for layout in ("last dimension strided", "rows with gaps", "tokens first"):
        change = LAYOUTS[layout]
        actual = call(packed, [change(q), change(k), change(v), slopes, sinks])
        for a, w in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a, w)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(backend: Backend, dtype: torch.dtype) -> None:
    packed = PACKED["all"]
    every = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        every.append(results_of(call, packed, make(packed, dtype), False))
    for other in every[1:]:
        for a, b in zip(other, every[0], strict=True):
            assert_bits_equal(a, b)


def test_sequences_do_not_see_each_other(backend: Backend) -> None:
    """NaN in one sequence stays there, gradients included."""
    packed = PACKED["causal"]
    tensors = make(packed, torch.float32)
    wanted = results_of(call, packed, tensors, False)
    poisoned = [t if t is None else t.clone() for t in tensors]
    for i, lengths in ((0, packed.lengths_q), (1, packed.lengths_k), (2, packed.lengths_k)):
        ends = bounds(lengths)
        tensor = poisoned[i]
        assert tensor is not None
        tensor[ends[2] : ends[3]] = float("nan")
    actual = results_of(call, packed, poisoned, False)
    ends_q, ends_k = bounds(packed.lengths_q), bounds(packed.lengths_k)
    for i, ends in ((0, ends_q), (2, ends_q), (3, ends_k), (4, ends_k)):
        others = torch.ones(len(actual[i]), dtype=torch.bool)
        others[ends[2] : ends[3]] = False
        torch.testing.assert_close(actual[i][others], wanted[i][others])
        assert actual[i][~others].isnan().all()


def test_double_backward(backend: Backend) -> None:
    packed = Packed((3, 4), (5, 2), Case(p=0.3, size=4, causal=True, softcap=2.0))
    second = []
    for function, dtype in ((call, torch.float32), (one_by_one, torch.float64)):
        leaves = [
            t if t is None else t.to(dtype).requires_grad_() for t in make(packed, torch.float32)
        ]
        out, lse = function(packed, leaves)
        total = out.square().sum() + lse.masked_fill(lse.isinf(), 0).square().sum()
        first = torch.autograd.grad(total, leaves[:3], create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves[:3]))
    for a, e in zip(*second, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


def arguments() -> dict[str, Any]:
    ends = bounds((2, 3))
    return {
        "q": normal(5, 4, 8),
        "k": normal(5, 2, 8),
        "v": normal(5, 2, 8),
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends,
        "max_seqlen_q": 3,
        "max_seqlen_k": 3,
    }


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "batch": ({"q": normal(1, 5, 4, 8)}, "q .total_q, Hq, E."),
    "head size": ({"k": normal(5, 2, 7)}, "q .total_q, Hq, E."),
    "tokens of v": ({"v": normal(4, 2, 8)}, "q .total_q, Hq, E."),
    "heads": ({"q": normal(5, 3, 8)}, "Hk a divisor of Hq"),
    "dtype": ({"v": normal(5, 2, 8).double()}, "one floating-point dtype"),
    "float bounds": ({"cu_seqlens_q": torch.tensor([0.0, 5.0])}, "cu_seqlens_q must be"),
    "bounds of two dimensions": ({"cu_seqlens_k": bounds((2, 3))[None]}, "cu_seqlens_k must be"),
    "bounds of nothing": ({"cu_seqlens_q": bounds(())[:0]}, "cu_seqlens_q must be"),
    "bounds that fall": ({"cu_seqlens_q": torch.tensor([0, 6, 5])}, "cu_seqlens_q must rise"),
    "bounds behind 0": ({"cu_seqlens_q": torch.tensor([1, 2, 5])}, "cu_seqlens_q must rise"),
    "bounds too short": ({"cu_seqlens_k": torch.tensor([0, 2, 4])}, "cu_seqlens_k must rise"),
    "bounds too long": ({"cu_seqlens_k": torch.tensor([0, 2, 6])}, "cu_seqlens_k must rise"),
    "other number": ({"cu_seqlens_k": torch.tensor([0, 5])}, "must have one length|a sequence of"),
    "maximum": ({"max_seqlen_q": 2}, "a sequence of cu_seqlens_q has 3 tokens"),
    "maximum of keys": ({"max_seqlen_k": 0}, "a sequence of cu_seqlens_k has 3 tokens"),
    "device": (
        {"cu_seqlens_k": torch.zeros(4, dtype=torch.int32, device="meta")},
        "cu_seqlens_k must be .* on (cpu|cuda:0), got",
    ),
    "window": ({"window": (0,)}, "window must be"),
    "softcap": ({"softcap": -1}, "softcap must be"),
    "alignment": ({"causal_alignment": "left"}, "causal_alignment must be"),
    "slopes": ({"alibi_slopes": torch.ones(3, 4)}, "alibi_slopes must be"),
    "sinks": ({"sinks": torch.ones(2)}, "sinks must be"),
    "p": ({"dropout_p": 1.5}, "dropout probability"),
}


@pytest.mark.parametrize("name", BAD)
def test_rejects(backend: Backend, name: str) -> None:
    F.varlen_attention(**arguments())
    changed, text = BAD[name]
    if backend.device != CPU and ("must rise" in text or text.startswith("a sequence of")):
        pytest.skip("values on a GPU are not read: that would wait for it")
    with pytest.raises(ValueError, match=text):
        F.varlen_attention(**{**arguments(), **changed})
