"""Scaled dot-product attention in plain torch: the specification of every backend, and the path for
what no kernel serves (float64, head sizes above 256, derivatives of the second order).

Scores are built in this order: ``scale * q k^T``; softcap ``c * tanh(scores / c)``; ALiBi
``- slope * |i' - j|``; the additive mask; then every score that is not visible becomes -inf. Query
i stands at key position ``i' = i`` (top left) or ``i + S - L`` (bottom right) and sees key j when
``i' - left <= j <= i' + right`` (-1: no bound) and the bool mask allows it. The denominator of the
softmax has the term ``exp(sink)`` of the head beside its keys. Dropout follows, then v.

Sources: Vaswani et al. 2017 (attention), Press et al. 2022 (ALiBi), Gemma 2 2024 (softcap), Xiao et
al. 2024 (sinks), Ainslie et al. 2023 (grouped queries).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.philox_reference import score_bits, shard_of


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Products are computed in the dtype that is written down, in autocast too."""

    @functools.wraps(function)
    def call(q: Tensor, *arguments: Any) -> Any:
        if not torch.amp.is_autocast_available(q.device.type):  # the meta device
            return function(q, *arguments)
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *arguments)

    return call


class Rule(NamedTuple):
    """What of a call is not a tensor.

    Attributes:
        threshold: a score is kept iff its 16 random bits are at least this.
        scale: of ``q k^T``.
        softcap: 0 for none.
        left, right: how far a query sees, -1 without bound; causal is ``right = 0``.
        bottom_right: the last query stands at the last key, instead of the first at the first.
    """

    threshold: int
    scale: float
    softcap: float
    left: int
    right: int
    bottom_right: bool


class Sequence(NamedTuple):
    """Where one sequence of a packed batch is: its number, and its slices of queries and keys."""

    number: int
    queries: slice
    keys: slice


def sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[Sequence]:
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for number in range(len(q) - 1):
        yield Sequence(number, slice(q[number], q[number + 1]), slice(k[number], k[number + 1]))


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """``weights @ values`` in which a weight of zero hides any value, NaN and Inf too."""
    if values.is_meta:
        return weights @ values
    finite = values.isfinite()
    if bool(finite.all()):
        return weights @ values
    out = weights @ torch.where(finite, values, 0)
    used = (weights != 0).to(weights.dtype)
    signs = weights.sign()
    plus, minus = (values == torch.inf).to(signs.dtype), (values == -torch.inf).to(signs.dtype)
    undefined = used @ values.isnan().to(used.dtype) > 0
    total, direction = used @ (plus + minus), signs @ (plus - minus)
    undefined |= (total > 0) & (direction.abs() < total)
    out = torch.where(total > 0, direction.sign() * torch.inf, out)
    return torch.where(undefined, torch.nan, out)


def _grouped(x: Tensor, num_heads: int) -> Tensor:
    """(B, Hk, S, n) -> (B, num_heads, S, n) without a copy where each head has its own."""
    group = num_heads // max(1, x.shape[1])
    return x if group == 1 else x.repeat_interleave(group, 1)


def _ungrouped(x: Tensor, num_heads: int) -> Tensor:
    """The sum over the query heads that share a key head."""
    if x.shape[1] == num_heads:
        return x
    return x.unflatten(1, (num_heads, -1)).sum(2)


def _heads_last(x: Tensor) -> Tensor:
    """(B, heads, length, size) with the heads of a token side by side in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _positions(q: Tensor, k: Tensor, bottom_right: bool) -> Tensor:
    """``i' - j``: (L, S) int64."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    i = torch.arange(num_queries, device=q.device)[:, None]
    if bottom_right:
        i = i + (num_keys - num_queries)
    return i - torch.arange(num_keys, device=q.device)


class _Weights(NamedTuple):
    p: Tensor  # softmax, (B, Hq, L, S)
    lse: Tensor  # (B, Hq, L)
    capped: Tensor  # scores after the softcap
    distance: Tensor  # i' - j, (L, S)
    kept: Tensor | None  # dropout mask times its scale


def _weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: int | Tensor,
    rule: Rule,
    first_batch: int = 0,
) -> _Weights:
    """q (B, Hq, L, E), k (B, Hq, S, E), both in the compute type."""
    num_batches, num_heads, num_queries, _ = q.shape
    distance = _positions(q, k, rule.bottom_right)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if rule.left >= 0:
        visible = visible & (distance <= rule.left)
    if rule.right >= 0:
        visible = visible & (-distance <= rule.right)
    scores = (q @ k.transpose(-1, -2)) * rule.scale
    capped = scores
    if rule.softcap > 0:
        capped = scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores.dtype)[..., None, None]
        scores = scores - slopes * distance.abs().to(scores.dtype)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible = visible & (mask != -torch.inf)
        scores = scores + mask.to(scores.dtype)
    scores = torch.where(visible, scores, -torch.inf)
    logits = scores
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(num_batches, -1, num_queries, 1)
        logits = torch.cat([scores, sink], -1)
    if logits.shape[-1] == 0:
        lse = scores.new_full(scores.shape[:-1], -torch.inf)
        p = scores
    else:
        lse = logits.logsumexp(-1)
        top = logits.detach().amax(-1, keepdim=True)
        e = torch.exp(logits - torch.where(top == -torch.inf, 0, top))
        p = e / torch.where(lse == -torch.inf, 1, e.sum(-1))[..., None]
        p = torch.where(visible, p[..., : k.shape[2]], 0)
    kept = None
    if rule.threshold > 0:
        index = torch.arange(num_batches * num_heads, device=q.device).view(num_batches, -1, 1, 1)
        row = torch.arange(num_queries, device=q.device)[:, None]
        column = torch.arange(k.shape[2], device=q.device)
        if isinstance(seed, Tensor):
            seed = seed.to(q.device)
        seed, place = shard_of(seed)
        if place is None:
            index = index + first_batch * num_heads
        else:
            step = place[1] if len(place) > 1 else num_heads
            number = torch.arange(num_batches, device=q.device) + first_batch
            index = index % num_heads + place[0] + number.view(-1, 1, 1, 1) * step
        bits = score_bits(seed, row, column, index)
        keep_rate = (65536 - rule.threshold) / 65536
        kept = (bits >= rule.threshold).to(scores.dtype) * (1 / keep_rate if keep_rate else 0.0)
    return _Weights(p, lse, capped, distance, kept)


@_without_autocast
def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: int | Tensor,
    threshold: int,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    bottom_right: bool,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)``: (B, Hq, L, Ev) in q's dtype, (B, Hq, L) float32 (float64 for float64).

    Args:
        q, k, v: (B, Hq, L, E), (B, Hk, S, E), (B, Hk, S, Ev); Hk divides Hq.
        mask: bool (True: visible) or floating point (added), 4-D, broadcastable to (B, Hq, L, S).
        alibi_slopes: (B or 1, Hq).
        sinks: (Hq,).
        cu_seqlens_q, cu_seqlens_k: (N + 1,) for N sequences packed along L and S, with B = 1.
        seed, threshold, ...: see :class:`Rule`.
    """
    rule = Rule(threshold, scale, softcap, left, right, bottom_right)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _forward(q, k, v, mask, alibi_slopes, sinks, seed, rule, 0)
    if len(cu_seqlens_q) == 1:  # no sequence
        lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q))
        return _heads_last(q.new_empty(*q.shape[:3], v.shape[3])), lse
    outs, lses = [], []
    for number, queries, keys in sequences(cu_seqlens_q, cu_seqlens_k):
        slopes = alibi_slopes
        if slopes is not None and len(slopes) > 1:
            slopes = slopes[number : number + 1]
        part = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        out, lse = _forward(*part, None, slopes, sinks, seed, rule, number)
        outs.append(out)
        lses.append(lse)
    return _heads_last(torch.cat(outs, 2)), torch.cat(lses, 2)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: int | Tensor,
    rule: Rule,
    first_batch: int,
) -> tuple[Tensor, Tensor]:
    compute, num_heads = compute_dtype(q), q.shape[1]
    keys, values = (_grouped(t.to(compute), num_heads) for t in (k, v))
    w = _weights(q.to(compute), keys, mask, alibi_slopes, sinks, seed, rule, first_batch)
    p = w.p if w.kept is None else w.p * w.kept
    return _heads_last(weighted_sum(p, values).to(q.dtype)), w.lse


@_without_autocast
def attention_backward_reference(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: int | Tensor,
    threshold: int,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    bottom_right: bool,
    with_mask: bool,
    with_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the additive mask, ALiBi's slopes and the sinks.

    The last three are empty where they are not wanted (``with_mask``, ``with_slopes``) or there is
    nothing. ``out`` and ``lse`` are computed again from the inputs, so that autograd, which
    differentiates this function for the second derivative, sees what they depend on.
    """
    del out, lse
    rule = Rule(threshold, scale, softcap, left, right, bottom_right)
    tensors = q, k, v, mask, alibi_slopes, sinks
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _backward(grad_out, grad_lse, *tensors, seed, rule, with_mask, with_slopes, 0)
    if len(cu_seqlens_q) == 1:
        grads = [_heads_last(torch.zeros_like(t)) for t in (q, k, v)]
        vectors = [
            q.new_empty(0) if t is None else torch.zeros_like(t) for t in (alibi_slopes, sinks)
        ]
        return (*grads, q.new_empty(0), *vectors)  # type: ignore[return-value]
    parts = []
    for number, queries, keys in sequences(cu_seqlens_q, cu_seqlens_k):
        slopes = alibi_slopes
        if slopes is not None and len(slopes) > 1:
            slopes = slopes[number : number + 1]
        part = _backward(
            grad_out[:, :, queries],
            grad_lse[:, :, queries],
            q[:, :, queries],
            k[:, :, keys],
            v[:, :, keys],
            None,
            slopes,
            sinks,
            seed,
            rule,
            False,
            with_slopes,
            number,
        )
        parts.append(part)
    grad_q, grad_k, grad_v, _, grad_slopes, grad_sinks = zip(*parts, strict=True)
    several = alibi_slopes is not None and len(alibi_slopes) > 1
    return (
        _heads_last(torch.cat(grad_q, 2)),
        _heads_last(torch.cat(grad_k, 2)),
        _heads_last(torch.cat(grad_v, 2)),
        q.new_empty(0),
        torch.cat(grad_slopes) if several else torch.stack(grad_slopes).sum(0),
        torch.stack(grad_sinks).sum(0),
    )


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: int | Tensor,
    rule: Rule,
    with_mask: bool,
    with_slopes: bool,
    first_batch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    compute, num_heads, num_key_heads = compute_dtype(q), q.shape[1], k.shape[1]
    queries = q.to(compute)
    keys, values = (_grouped(t.to(compute), num_heads) for t in (k, v))
    grad_out, grad_lse = grad_out.to(compute), grad_lse.to(compute)
    w = _weights(queries, keys, mask, alibi_slopes, sinks, seed, rule, first_batch)
    p = w.p if w.kept is None else w.p * w.kept
    grad_p = grad_out @ values.transpose(-1, -2)
    if w.kept is not None:
        grad_p = grad_p * w.kept
    grad_p = torch.where(w.p == 0, 0, grad_p)
    delta = (w.p * grad_p).sum(-1) - grad_lse  # (B, Hq, L)
    grad_scores = torch.where(w.p == 0, 0, w.p * (grad_p - delta[..., None]))
    grad_raw = grad_scores
    if rule.softcap > 0:
        grad_raw = grad_scores * (1 - (w.capped / rule.softcap) ** 2)
        grad_raw = torch.where(w.p == 0, 0, grad_raw)
    grad_q = weighted_sum(grad_raw, keys) * rule.scale
    grad_k = weighted_sum(grad_raw.transpose(-1, -2), queries) * rule.scale
    grad_v = weighted_sum(p.transpose(-1, -2), grad_out)
    grad_mask, grad_slopes, grad_sinks = (queries.new_empty(0) for _ in range(3))
    if with_mask and mask is not None:
        grad_mask = grad_scores.sum_to_size(mask.shape).to(mask.dtype)
    if with_slopes and alibi_slopes is not None:
        by_slope = -(grad_scores * w.distance.abs()).sum((-1, -2))
        grad_slopes = by_slope.sum_to_size(alibi_slopes.shape).to(alibi_slopes.dtype)
    if sinks is not None:
        share = torch.exp(sinks.to(compute)[:, None] - w.lse)  # (B, Hq, L)
        share = torch.where(w.lse == -torch.inf, 0, share)
        grad_sinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    return (
        _heads_last(grad_q.to(q.dtype)),
        _heads_last(_ungrouped(grad_k, num_key_heads).to(k.dtype)),
        _heads_last(_ungrouped(grad_v, num_key_heads).to(v.dtype)),
        grad_mask,
        grad_slopes,
        grad_sinks,
    )
