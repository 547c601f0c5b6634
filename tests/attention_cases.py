"""What attention must compute: a float64 oracle, the error of one honest implementation in each
dtype, and cases. The oracle materializes every L x S matrix and lets autograd differentiate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
from device_under_test import CPU, current_device, on_device, to_device
from oracle import drop_scale, keep_mask, nan_memory
from torch import Tensor

import pyfast

NAMES = "scaled_dot_product_attention", "varlen_attention", "attention_with_kv_cache"
# They take tensors on the CPU to the device of the backend under test, and back.
F = SimpleNamespace(**{name: on_device(getattr(pyfast.nn.functional, name)) for name in NAMES})
SEED = 0xFEDCBA9876543210
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASK_DTYPES = {
    "bool": torch.bool,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Case:
    """One call. ``mask``: its dtype ("same": that of query), a space, and which of the dimensions
    b, h, l and s are not of size one. ``alibi``: "h" or "bh". ``key_heads``: 0 for ``heads``."""

    batch: tuple[int, ...] = (2,)
    heads: int = 2
    num_queries: int = 17
    num_keys: int = 33
    size: int = 16
    value_size: int = 0
    key_heads: int = 0
    mask: str = ""
    causal: bool = False
    alignment: str = "top_left"
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    alibi: str = ""
    sinks: bool = False
    p: float = 0.0
    scale: float | None = None
    layout: str = "contiguous"

    def __str__(self) -> str:
        """What differs from the default."""
        parts = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return " ".join(parts) or "default"

    @property
    def score_shape(self) -> tuple[int, ...]:
        return (*self.batch, self.heads, self.num_queries, self.num_keys)

    @property
    def scale_value(self) -> float:
        return 1 / math.sqrt(self.size) if self.scale is None else self.scale


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Every floating-point tensor, changed."""
        return Inputs(*(t if t is None or not t.is_floating_point() else change(t) for t in self))


Function = Callable[[Case, Inputs], tuple[Tensor, Tensor]]
_NAN = float("nan")


def _interleaved(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, _NAN)], -1)[..., 0]


def _among(x: Tensor, before: int, after: int) -> Tensor:
    """The last dimension between elements of NaN."""
    return torch.nn.functional.pad(x, (before, after), value=_NAN)[..., before : -after or None]


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(-2, -3).contiguous().transpose(-2, -3)


# Each gives the same values (but "expanded") with other strides, NaN between them.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "tokens first": _tokens_first,
    "columns first": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "last dimension strided": _interleaved,
    "misaligned": lambda x: _among(x, 1, 0),
    "rows with gaps": lambda x: _among(x, 3, 2),
    "every second token": lambda x: torch.stack([x, torch.full_like(x, _NAN)], -2).flatten(-3, -2)[
        ..., ::2, :
    ],
    "expanded": lambda x: x[..., :1, :1, :].expand(x.shape),
    "expanded columns": lambda x: x[..., :1].expand(x.shape),
}


def make(case: Case, dtype: torch.dtype) -> tuple[Inputs, tuple[Tensor, Tensor]]:
    """Contiguous inputs, and gradients of out and lse."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heads, key_heads, size = case.heads, case.key_heads or case.heads, case.size
    value_size = case.value_size or size
    *_, num_queries, num_keys = case.score_shape
    q = normal(*case.batch, heads, num_queries, size)
    k = normal(*case.batch, key_heads, num_keys, size)
    v = normal(*case.batch, key_heads, num_keys, value_size)
    mask = slopes = None
    if case.mask:
        kind, names = case.mask.split()
        letters = "b" * len(case.batch) + "hls"
        sizes = zip(letters, case.score_shape, strict=True)
        shape = [n if letter in names else 1 for letter, n in sizes]
        mask = normal(*shape)
        hidden = normal(*shape) > 0.8
        if "l" in names and num_queries > 2:
            hidden[..., 2, :] = True
        if kind == "bool":
            mask = ~hidden
        else:
            mask = mask.masked_fill(hidden, -torch.inf)
            mask = mask.to(MASK_DTYPES.get(kind, dtype))
    if case.alibi:
        slopes = normal(*((math.prod(case.batch), heads) if case.alibi == "bh" else (heads,)))
        slopes = slopes.abs() / 4
    sinks = normal(heads) if case.sinks else None
    grad_out = normal(*case.score_shape[:-1], value_size).to(dtype)
    grad_lse = normal(*case.score_shape[:-1])
    inputs = Inputs(q.to(dtype), k.to(dtype), v.to(dtype), mask, slopes, sinks)
    return inputs, (grad_out, grad_lse)


def grouped(case: Case, x: Tensor) -> Tensor:
    """A key head for each query head: consecutive query heads share one."""
    return x.repeat_interleave(case.heads // case.key_heads if case.key_heads else 1, -3)


def scores_of(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    """The scores, and which of them a query sees."""
    s = case.scale_value * (x.q @ grouped(case, x.k).transpose(-1, -2))
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    *_, num_queries, num_keys = s.shape
    place = torch.arange(num_queries)[:, None]
    if case.alignment == "bottom_right":
        place = place + num_keys - num_queries
    j = torch.arange(num_keys)
    if x.slopes is not None:
        leading = s.shape[:-2] if x.slopes.dim() == 2 else s.shape[-3:-2]
        s = s - x.slopes.view(*leading, 1, 1) * (place - j).abs()
    visible = torch.ones(s.shape, dtype=torch.bool)
    if x.mask is not None and x.mask.dtype == torch.bool:
        visible = visible & x.mask
    elif x.mask is not None:
        s = s + x.mask
        visible = visible & (x.mask > -torch.inf)
    if case.causal:
        visible = visible & (j <= place)
    if case.window is not None:
        left, right = case.window
        visible = visible & ((left < 0) | (j >= place - left))
        visible = visible & ((right < 0) | (j <= place + right))
    return s, visible


def softmax_of(s: Tensor, visible: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and the logarithm of their denominator; the sink is one more key."""
    sink = s.new_full((1,), -torch.inf) if sinks is None else sinks.to(s.dtype)
    sink = sink[:, None, None].expand(*s.shape[:-1], 1)
    s = torch.cat([s, sink], -1)
    visible = torch.cat([visible, torch.full(sink.shape, sinks is not None)], -1)
    top = s.detach().masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    e = torch.where(visible, torch.exp(torch.where(visible, s - top, 0.0)), 0.0)
    sees_nothing = ~visible.any(-1, keepdim=True)
    total = e.sum(-1, keepdim=True) + sees_nothing
    lse = (total.log() + top).masked_fill(sees_nothing, -torch.inf)
    return (e / total)[..., :-1], lse[..., 0]


def kept_of(case: Case, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies the weights with."""
    if case.p == 0 or 0 in case.score_shape:
        return torch.ones(case.score_shape, dtype=dtype)
    return keep_mask(case.score_shape, case.p, SEED, stream=0).to(dtype) * drop_scale(case.p)


def dense(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    """The oracle, in the dtype of its inputs."""
    p, lse = softmax_of(*scores_of(case, x), x.sinks)
    return (p * kept_of(case, p.dtype)) @ grouped(case, x.v), lse


def call(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    """The function under test."""
    result: tuple[Tensor, Tensor] = F.scaled_dot_product_attention(
        x.q,
        x.k,
        x.v,
        x.mask,
        case.p,
        case.causal,
        scale=case.scale,
        enable_gqa=case.key_heads not in (0, case.heads),
        window=case.window,
        softcap=case.softcap,
        alibi_slopes=x.slopes,
        sinks=x.sinks,
        causal_alignment=case.alignment,
        return_lse=True,
        seed=SEED,
    )
    return result


Results = dict[str, Tensor]


def _laid(layout: str, x: Inputs) -> Inputs:
    q, k, v = (LAYOUTS[layout](t) for t in x[:3])
    return Inputs(q, k, v, *x[3:])


def results_of(
    function: Function,
    case: Case,
    inputs: Inputs,
    grads: tuple[Tensor, Tensor],
    with_slopes: bool = True,
) -> Results:
    """out, lse and the gradients of what is differentiable, by their names; on the CPU."""
    device = CPU if function is dense else current_device()
    leaves = inputs.map(lambda t: t.detach().clone().to(device).requires_grad_())
    if leaves.mask is not None:
        leaves = leaves._replace(mask=leaves.mask.to(device))
    if leaves.slopes is not None:
        leaves.slopes.requires_grad_(with_slopes)
    out, lse = function(case, _laid(case.layout, leaves))
    given = (grads[0].to(out.dtype), grads[1].to(lse.dtype))
    torch.autograd.backward([out, lse], given if function is dense else [*map(to_device, given)])
    results = {"out": out.detach(), "lse": lse.detach()}
    for name, leaf in zip(Inputs._fields, leaves, strict=True):
        if leaf is not None and leaf.requires_grad:
            results[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return {name: result.cpu() for name, result in results.items()}


def _pull(case: Case, leaves: Inputs, grad_scores: Tensor, p: Tensor, grad_out: Tensor) -> Results:
    """Gradients for given ones of the scores, and for given weights."""
    laid = _laid(case.layout, leaves)
    scores, _ = scores_of(case, laid)
    out = p @ grouped(case, laid.v)
    torch.autograd.backward([scores, out], [grad_scores, grad_out])
    pairs = zip(Inputs._fields, leaves, strict=True)
    return {name: t.grad for name, t in pairs if t is not None and t.grad is not None}


class Expected(NamedTuple):
    exact: Results  # float64
    honest: Results  # in the dtype: what its error is compared with
    terms: dict[str, float]  # the size of what is added up, where the result may be far smaller


@cache
def expected(case: Case, dtype: torch.dtype) -> Expected:
    """``honest`` is the usual algorithm: products of the dtype accumulated in float32, the softmax
    in float32, the weights and the gradient of the scores rounded to the dtype, and the sum of
    out * grad_out, from the rounded out, for the sum of p * grad_p."""
    inputs, grads = make(case, dtype)
    exact = results_of(dense, case, inputs.map(Tensor.double), grads)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = inputs.map(lambda t: t.to(compute, copy=True).requires_grad_())
    positive = inputs.map(lambda t: t.to(compute).abs().requires_grad_())
    uncapped = replace(case, softcap=0.0)
    grad_out, grad_lse = (t.to(compute) for t in grads)
    with torch.no_grad():
        laid = _laid(case.layout, leaves)
        scores, visible = scores_of(case, laid)
        p, lse = softmax_of(scores, visible, leaves.sinks)
        kept, values = kept_of(case, compute), grouped(case, laid.v)
        rounded = (p * kept).to(dtype).to(compute)
        out = (rounded @ values).to(dtype)
        grad_p = grad_out @ values.transpose(-1, -2) * kept
        delta = (grad_out * out.to(compute)).sum(-1) - grad_lse
        grad_scores = (p * (grad_p - delta[..., None])).to(dtype).to(compute)
        # The same with the absolute value of every product.
        size_p = grad_out.abs() @ values.abs().transpose(-1, -2) * kept
        size_delta = (p * size_p).sum(-1) + grad_lse.abs()
        size_scores = p * (size_p + size_delta[..., None])
        products = scores_of(uncapped, _laid(case.layout, positive))[0]
        sizes = {"out": p * kept @ values.abs(), "lse": torch.where(visible, products, 0)}
    honest = {"out": out, "lse": lse, **_pull(case, leaves, grad_scores, rounded, grad_out)}
    sizes |= _pull(uncapped, positive, size_scores, p * kept, grad_out.abs())
    if leaves.sinks is not None:
        over = [*range(len(case.batch)), -1]
        share = torch.exp(leaves.sinks.detach()[:, None] - lse)
        honest["sinks"] = -(share * delta).sum(over)
        sizes["sinks"] = (share * size_delta).sum(over)
    for name, leaf in zip(Inputs._fields, inputs, strict=True):
        if name in honest and leaf is not None:
            honest[name] = honest[name].to(leaf.dtype)
    terms = {name: size.abs().max().item() if size.numel() else 0.0 for name, size in sizes.items()}
    for name in terms.keys() - {"lse"}:  # a rounding of a score is one of its weight
        terms[name] *= 1 + terms["lse"] / 8
    return Expected(exact, honest, terms)


def _norms(error: Tensor, by_row: bool) -> Tensor:
    """The largest of all, the root of the sum of squares, and that of each row."""
    norms = [error.abs().max()[None], error.norm()[None]]
    return torch.cat([*norms, error.norm(dim=-1).flatten()] if by_row else norms)


def assert_accurate(actual: Results, wanted: Expected, message: str) -> None:
    """No error above twice that of the honest implementation, plus small constants.

    Twice is the criterion of flash-attention 3. ``2 eps`` of the result is for the rounding of it
    and of the weights, where the honest one is exact by luck (few elements). Where the result is a
    difference of far larger terms, ``8 eps`` of float32 of them is the rounding of the sums, and
    where it has few elements, all of which the honest one may have hit by luck, an eighth of an eps
    of the dtype. Rows of out are held to their own norm: no short one hides behind a long one (not
    where all columns are the same, and the honest row has one chance to be exact).
    """
    for name, value in actual.items():
        exact, honest = wanted.exact[name], wanted.honest[name]
        assert value.dtype == honest.dtype and value.shape == exact.shape, f"{message}, {name}"
        if not value.numel():
            continue
        value = value.double()
        finite = exact.isfinite()
        assert torch.equal(value[~finite], exact[~finite]), f"{message}, {name}: not allowed"
        by_row = name == "out" and value.shape[-1] >= 16
        by_row = by_row and not torch.allclose(exact, exact[..., :1].expand_as(exact))
        parts = [torch.where(finite, t, 0) for t in (value, honest.double(), exact)]
        error, of_honest, size = (
            _norms(t, by_row) for t in (parts[0] - parts[2], parts[1] - parts[2], parts[2])
        )
        eps = torch.finfo(honest.dtype).eps
        slack = torch.finfo(torch.float64 if eps < 1e-12 else torch.float32).eps
        ulps = 64 if eps < 1e-12 else 2
        root = max(1.0, value.numel() ** 0.5)
        terms = torch.full_like(error, wanted.terms[name] * max(1.0, value.shape[-1] ** 0.5))
        terms[0], terms[1] = wanted.terms[name], wanted.terms[name] * root
        allowed = 2 * of_honest + ulps * eps * size + 8 * slack * terms + 1e-30
        if value.numel() < 16 and name not in ("out", "lse"):
            allowed += torch.finfo(wanted.honest["out"].dtype).eps * terms / 8
        wrong = ~(error <= allowed)
        if wrong.any():
            worst = int((error - allowed).nan_to_num(nan=torch.inf).argmax())
            raise AssertionError(
                f"{message}, {name}: error {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
            )


def check(
    function: Function, case: Case, dtype: torch.dtype = torch.float32, with_slopes: bool = True
) -> None:
    """Asserts that a function computes attention and its gradients; outputs start as NaN."""
    inputs, grads = make(case, dtype)
    with nan_memory():
        actual = results_of(function, case, inputs, grads, with_slopes)
    assert_accurate(actual, expected(case, dtype), f"{case} {dtype}")
