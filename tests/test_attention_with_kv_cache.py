"""Attention over a cache: what is appended, what is read, what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import DTYPES, Case, F, Inputs, grouped, scores_of, softmax_of
from conftest import Backend
from device_under_test import CPU, current_device, to_same
from oracle import assert_bits_equal, nan_memory, normal
from test_varlen_attention import assert_close
from torch import Tensor

pytestmark = pytest.mark.backends("reference", "cpu", "triton")
attend = F.attention_with_kv_cache
INT8 = torch.int8
CAPACITY = 70
# Of two sequences: before the call, and how many are new.
FILLED: dict[str, tuple[Any, int]] = {
    "full": (None, 0),
    "int": (33, 0),
    "int, appended": (33, 5),
    "to the end": (65, 5),
    "from nothing": (0, 7),
    "different": (torch.tensor([64, 1]), 0),
    "different, appended": (torch.tensor([64, 1], dtype=torch.int32), 6),
    "one empty": (torch.tensor([0, 40]), 0),
    "one empty, appended": (torch.tensor([0, 40]), 1),
}


class Call:
    """Operands in buffers with guard zones of NaN (or 99): what is behind the cache stays."""

    def __init__(
        self,
        dtype: torch.dtype,
        filled: str = "different, appended",
        queries: int = 6,
        size: int = 16,
        value_size: int = 24,
        quantized: bool = False,
        layout: str = "heads first",
        heads: tuple[int, int] = (4, 2),
        capacity: int = CAPACITY,
    ) -> None:
        self.seqlens, self.num_new = FILLED[filled]
        generator = torch.Generator().manual_seed(11)
        random = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        self.q = random(2, heads[0], queries, size).to(dtype)
        self.buffers, self.caches, self.news = [], [], []
        self.scales: list[Tensor | None] = []
        for n in (size, value_size):
            values = random(2, heads[1], capacity, n)
            if layout == "tokens first":
                buffer = torch.full((2, capacity + 2, heads[1], n + 3), torch.nan, dtype=dtype)
                view = lambda b, n=n: b[:, 1:-1, :, 2 : 2 + n].transpose(1, 2)  # noqa: E731
            else:
                buffer = torch.full((2, heads[1], capacity + 2, n + 3), torch.nan, dtype=dtype)
                view = lambda b, n=n: b[:, :, 1:-1, 2 : 2 + n]  # noqa: E731
            if quantized:
                buffer = torch.full(buffer.shape, 99, dtype=INT8)
                values = values.clamp(-3, 3) * 42
                self.scales.append(random(2, heads[1], capacity).abs() / 40)
            else:
                self.scales.append(None)
            cache = view(buffer)
            cache.copy_(values.round() if quantized else values)
            self.buffers.append(buffer)
            self.caches.append(cache)
            self.news.append(random(2, heads[1], self.num_new, n).to(dtype))

    def lengths(self) -> list[int]:
        """Of both sequences, with the new tokens."""
        before = self.seqlens if self.seqlens is not None else self.caches[0].shape[2]
        return [
            int(n) + self.num_new
            for n in (before if isinstance(before, Tensor) else (before, before))
        ]

    def poison_what_is_behind(self) -> None:
        """Nobody reads the places behind the last token."""
        for b, end in enumerate(self.lengths()):
            for cache, scale in zip(self.caches, self.scales, strict=True):
                start = end - self.num_new  # the new tokens are written by the call
                if scale is None:
                    cache[b, :, start:] = torch.nan
                else:
                    scale[b, :, start:] = torch.nan

    def __call__(self, **keywords: Any) -> tuple[Tensor, Tensor]:
        k, v = self.news if self.num_new else (None, None)
        device = current_device()
        there = [buffer.to(device) for buffer in self.buffers]  # with all guard zones
        caches = [
            memory.as_strided(cache.shape, cache.stride(), cache.storage_offset())
            for memory, cache in zip(there, self.caches, strict=True)
        ]
        scales = [s if s is None else s.to(device) for s in self.scales]
        given = dict(zip(("k_scale", "v_scale"), scales, strict=True))
        operands = (self.q, *caches, k, v, self.seqlens)
        try:
            with nan_memory():
                result: tuple[Tensor, Tensor] = attend(
                    *operands, return_lse=True, **given, **keywords
                )
        finally:
            pairs = zip((*self.buffers, *self.scales), (*there, *scales), strict=True)
            for here, written in pairs if device != CPU else ():
                if here is not None:
                    here.copy_(written)
        return result

    def appended(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Whole buffers and scales as they must be after the call."""
        buffers = [buffer.clone() for buffer in self.buffers]
        scales = [s if s is None else s.clone() for s in self.scales]
        for i, new in enumerate(self.news):
            old = self.caches[i]
            cache = buffers[i].as_strided(old.size(), old.stride(), old.storage_offset())
            for b, end in enumerate(self.lengths()):
                where = slice(end - self.num_new, end)
                tokens, scale = new[b], scales[i]
                if scale is not None:
                    scale[b, :, where] = tokens.float().abs().amax(-1) / 127
                    step = scale[b, :, where].clone()
                    step[step == 0] = 1
                    tokens = (tokens.float() / step[..., None]).round()
                cache[b, :, where] = tokens.to(cache.dtype)
        return buffers, scales

    def exact(self, case: Case, slopes: Any = None, sinks: Any = None) -> tuple[Tensor, Tensor]:
        """From the caches as they are now, in float64."""
        outs, lses = [], []
        for b, length in enumerate(self.lengths()):
            k, v = (
                c[b, :, :length].double() * (1 if s is None else s[b, :, :length, None].double())
                for c, s in zip(self.caches, self.scales, strict=True)
            )
            own = None if slopes is None else (slopes if slopes.dim() == 1 else slopes[b]).double()
            inputs = Inputs(self.q[b].double(), k, v, None, own)
            p, lse = softmax_of(*scores_of(case, inputs), sinks)
            outs.append(p @ grouped(case, v))
            lses.append(lse)
        return torch.stack(outs), torch.stack(lses)


def checked(call: Call, case: Case, dtype: torch.dtype, **keywords: Any) -> None:
    call.poison_what_is_behind()
    buffers, scales = call.appended()
    out, lse = call(**keywords)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    for a, e in zip((*call.buffers, *call.scales), (*buffers, *scales), strict=True):
        if a is None:
            continue
        if a.dtype == INT8:
            assert torch.equal(a, e)
        else:
            assert_bits_equal(a, e)
    slopes, sinks = keywords.get("alibi_slopes"), keywords.get("sinks")
    exact = call.exact(case, slopes, sinks)
    assert_close(out, exact[0], dtype, "out")
    assert_close(lse, exact[1], torch.float32, "lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("filled", FILLED)
def test_matches_oracle(backend: Backend, filled: str, quantized: bool, dtype: torch.dtype) -> None:
    """Any strides; what is written is exact, and nothing else changes."""
    for layout in ("heads first", "tokens first"):
        call = Call(dtype, filled, quantized=quantized, layout=layout)
        case = Case((), 4, size=16, key_heads=2, causal=True, alignment="bottom_right")
        checked(call, case, dtype, is_causal=True)


@pytest.mark.parametrize("quantized", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (6, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("queries", [1, 2, 7, 40])
def test_queries_and_heads(
    backend: Backend, queries: int, heads: tuple[int, int], quantized: bool
) -> None:
    """One query over many keys, and as many queries as keys."""
    for dtype, size in ((torch.float32, 33), (torch.bfloat16, 64)):
        call = Call(dtype, "different", queries, size, 16, quantized, heads=heads, capacity=300)
        call.seqlens = torch.tensor([300, 129])
        checked(call, Case((), heads[0], size=size, key_heads=heads[1]), dtype)


FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "not causal": ({}, {}),
    "window": ({"window": (4, 0)}, {"window": (4, 0)}),
    "window, causal": ({"window": (9, 3), "is_causal": True}, {"window": (9, 3), "causal": True}),
    "softcap and scale": ({"softcap": 1.5, "scale": 0.7}, {"softcap": 1.5, "scale": 0.7}),
    "slopes": ({"alibi_slopes": torch.tensor([0.5, 0.2, 0.1, 0.05])}, {}),
    "slopes of each": ({"alibi_slopes": normal(2, 4).abs()}, {}),
    "strided slopes": ({"alibi_slopes": normal(4, 2).abs().t()}, {}),
    "half slopes": ({"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0]).half()}, {}),
    "sinks": ({"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}, {}),
    "strided sinks": ({"sinks": torch.arange(8.0)[::2]}, {}),
}


@pytest.mark.parametrize("quantized", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("name", FEATURES)
def test_features(backend: Backend, name: str, quantized: bool) -> None:
    keywords, wanted = FEATURES[name]
    for filled in ("different, appended", "one empty", "int, appended"):
        call = Call(torch.float32, filled, quantized=quantized)
        case = Case((), 4, size=16, key_heads=2, alignment="bottom_right", **wanted)
        checked(call, case, torch.float32, **keywords)


def test_quantized_tokens_of_zero(backend: Backend) -> None:
    """Their scale is 0, and nothing is NaN; the largest becomes 127."""
    call = Call(torch.float32, "different, appended", quantized=True)
    call.news[0][0, 0, 0] = 0
    call.news[1][1] = 0
    call.news[0][1, 1, 2] = torch.arange(16) - 15.0
    checked(call, Case((), 4, size=16, key_heads=2), torch.float32)
    assert call.caches[0][1, 1, 1 + 2].tolist()[0] == -127


def test_decodes_like_attention(backend: Backend) -> None:
    """Token by token what causal attention gives at once."""
    q, k, v = normal(3, 2, 2, 12, 16).to(backend.device)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    k_cache, v_cache = torch.full((2, 2, 2, 20, 16), torch.nan, device=backend.device)
    first = attend(q[:, :, :5], k_cache, v_cache, k[:, :, :5], v[:, :, :5], 0, True)
    outs = [first]
    for n in range(5, 12):
        now = slice(n, n + 1)
        outs.append(attend(q[:, :, now], k_cache, v_cache, k[:, :, now], v[:, :, now], n, True))
    torch.testing.assert_close(torch.cat(outs, 2), wanted)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("quantized", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(backend: Backend, dtype: torch.dtype, quantized: bool) -> None:
    """Split over the keys, whatever the number of threads."""
    every = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        call = Call(dtype, "full", 1, quantized=quantized, heads=(2, 1), capacity=3000)
        every.append(call())
    for other in every[1:]:
        for a, b in zip(other, every[0], strict=True):
            assert_bits_equal(a, b)


def test_empty(backend: Backend) -> None:
    for shape in ((0, 2, 3, 8), (2, 2, 0, 8)):
        cache = torch.zeros(shape[0], 2, 10, 8)
        assert attend(torch.zeros(shape), cache, cache).shape == shape
    out, lse = attend(normal(2, 2, 3, 8), *torch.zeros(2, 2, 2, 0, 8), return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()


def test_float64() -> None:
    """By the reference; lse is float64 too."""
    call = Call(torch.float64)
    out, lse = call(is_causal=True)
    case = Case((), 4, size=16, key_heads=2, causal=True, alignment="bottom_right")
    for a, e in zip((out, lse), call.exact(case), strict=True):
        torch.testing.assert_close(a, e)


def test_has_no_gradient(backend: Backend) -> None:
    call = Call(torch.float32)
    call.q.requires_grad_()
    before = [buffer.clone() for buffer in call.buffers]
    with pytest.raises(RuntimeError, match="has no gradient"):
        call()
    for a, b in zip(call.buffers, before, strict=True):
        assert_bits_equal(a, b)
    with torch.no_grad():
        assert not call()[0].requires_grad


def arguments(**changed: Any) -> dict[str, Any]:
    cache = torch.zeros(2, 2, 10, 8)
    new = normal(2, 2, 3, 8)
    given = {"q": normal(2, 4, 3, 8), "k_cache": cache, "v_cache": cache.clone()}
    return {**given, "k": new, "v": new, "cache_seqlens": 4, **changed}


SCALE = torch.ones(2, 2, 10)
INT8_CACHE = torch.zeros(2, 2, 10, 8, dtype=INT8)
BAD: dict[str, dict[str, Any]] = {
    "too long": {"cache_seqlens": 8},
    "too long, one": {"cache_seqlens": torch.tensor([1, 8])},
    "too long without new tokens": {"cache_seqlens": 11, "k": None, "v": None},
    "below 0": {"cache_seqlens": -1},
    "below 0, one": {"cache_seqlens": torch.tensor([-1, 2])},
    "no place": {"cache_seqlens": None},
    "places of floats": {"cache_seqlens": torch.tensor([1.0, 2.0])},
    "places of another batch": {"cache_seqlens": torch.tensor([1, 2, 3])},
    "k alone": {"v": None},
    "k of another dtype": {"k": normal(2, 2, 3, 8).double()},
    "k of other heads": {"k": normal(2, 4, 3, 8), "v": normal(2, 4, 3, 8)},
    "k of another size": {"k": normal(2, 2, 3, 7)},
    "v of other tokens": {"v": normal(2, 2, 2, 8)},
    "q of another batch": {"q": normal(1, 4, 3, 8)},
    "q of another size": {"q": normal(2, 4, 3, 9)},
    "q of three dimensions": {"q": normal(4, 3, 8)},
    "q of other heads": {"q": normal(2, 3, 3, 8)},
    "q of another dtype": {"q": normal(2, 4, 3, 8).bfloat16()},
    "caches of two dtypes": {"v_cache": torch.zeros(2, 2, 10, 8).double()},
    "caches of two lengths": {"v_cache": torch.zeros(2, 2, 9, 8)},
    "integers without scales": {"k_cache": INT8_CACHE, "v_cache": INT8_CACHE},
    "one scale": {"k_cache": INT8_CACHE, "v_cache": INT8_CACHE, "k_scale": SCALE},
    "scales of floats": {"k_scale": SCALE, "v_scale": SCALE},
    "scale of another shape": {
        "k_cache": INT8_CACHE,
        "v_cache": INT8_CACHE,
        "k_scale": SCALE[..., :9],
        "v_scale": SCALE,
    },
    "scale of another dtype": {
        "k_cache": INT8_CACHE,
        "v_cache": INT8_CACHE,
        "k_scale": SCALE,
        "v_scale": SCALE.double(),
    },
    "window": {"window": (1, -2)},
    "softcap": {"softcap": -1.0},
    "slopes": {"alibi_slopes": torch.ones(2)},
    "sinks": {"sinks": torch.ones(2)},
}


@pytest.mark.parametrize("name", BAD)
def test_rejects(backend: Backend, name: str) -> None:
    """With nothing written."""
    if backend.device != CPU and name in ("too long, one", "below 0, one"):
        pytest.skip("values on a GPU are not read: that would wait for it")
    attend(**arguments())
    given = to_same(backend.device, arguments(**BAD[name]))
    before = {key: t.clone() for key, t in given.items() if isinstance(t, Tensor)}
    with pytest.raises(ValueError, match="attention_with_kv_cache: "):
        attend(**given)
    for key, tensor in before.items():
        assert torch.equal(given[key], tensor)


def test_rejects_lengths_on_another_device(backend: Backend) -> None:
    given = to_same(backend.device, arguments())
    lengths = torch.zeros(given["q"].shape[0], dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=rf"cache_seqlens must be .* on {backend.device.type}"):
        attend(**{**given, "cache_seqlens": lengths})


@pytest.mark.backends("cpu")
def test_rejects_what_its_kernel_does_not_serve(backend: Backend) -> None:
    with pytest.raises(RuntimeError, match="'cpu' was asked for, but"):
        Call(torch.float64)()
