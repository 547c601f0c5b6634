"""Scaled dot-product attention: the op, and torch's function with more features."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import handle_torch_function, has_torch_function

from .. import _backend
from ..kernels.attention.attention_reference import (
    attention_backward_reference,
    attention_reference,
)
from ._native import compute_dtype, empty, get_num_threads, native
from ._op import Op, is_eager
from ._rule import check_probability, resolve_seed, threshold_of

MAX_HEAD_SIZE = 256  # of the kernels
_is_autocast_enabled = torch._C._is_any_autocast_enabled


def heads_last_dim(x: Tensor) -> Tensor:
    """The operand as the kernels take it: any strides but in the last dimension."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    return x.resolve_neg()


def empty_heads(batch: int, heads: int, length: int, size: int, like: Tensor) -> Tensor:
    """(batch, heads, length, size) in the order of memory that torch's attention gives, in which
    the heads of a token lie side by side."""
    return empty((batch, length, heads, size), like).transpose(1, 2)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous().resolve_neg()


def _forward_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: int | Tensor,
    *rule: Any,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    out = empty_heads(batch, heads, length, v.shape[-1], q)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    native.attention(
        heads_last_dim(q),
        heads_last_dim(k),
        heads_last_dim(v),
        out,
        lse,
        mask if mask is None else mask.resolve_neg(),
        _contiguous(alibi_slopes),
        _contiguous(sinks),
        _contiguous(cu_seqlens_q),
        _contiguous(cu_seqlens_k),
        None,
        None,
        None,
        seed,
        *rule,
        get_num_threads(),
    )
    return out, lse


def _backward_native(
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
    batch, heads, length, size = q.shape
    key_heads, num_keys, value_size = v.shape[1:]
    grad_q = empty_heads(batch, heads, length, size, q)
    grad_k = empty_heads(batch, key_heads, num_keys, size, k)
    grad_v = empty_heads(batch, key_heads, num_keys, value_size, v)
    delta = torch.empty_like(lse)  # sum of p * grad_p of a row, less grad_lse
    none = lse.new_empty(0)
    grad_mask = none
    if with_mask and mask is not None:
        grad_mask = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    native.attention_backward(
        heads_last_dim(grad_out),
        _contiguous(grad_lse),
        heads_last_dim(q),
        heads_last_dim(k),
        heads_last_dim(v),
        heads_last_dim(out),
        lse.contiguous(),
        delta,
        mask if mask is None else mask.resolve_neg(),
        _contiguous(alibi_slopes),
        _contiguous(sinks),
        _contiguous(cu_seqlens_q),
        _contiguous(cu_seqlens_k),
        grad_q,
        grad_k,
        grad_v,
        grad_mask if with_mask else None,
        seed,
        threshold,
        scale,
        softcap,
        left,
        right,
        bottom_right,
        get_num_threads(),
    )
    grad_sinks = none
    if sinks is not None:
        share = torch.exp(sinks[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
        grad_sinks = -(share * delta).sum((0, 2))
    if grad_mask.numel() and mask is not None:
        grad_mask = grad_mask.to(mask.dtype)
    return grad_q, grad_k, grad_v, grad_mask, none, grad_sinks


def _limits(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str:
    if q.dtype == torch.float64:
        return "its kernel does not compute in float64"
    if q.shape[-1] > MAX_HEAD_SIZE or v.shape[-1] > MAX_HEAD_SIZE:
        return f"its kernel serves head sizes up to {MAX_HEAD_SIZE}"
    return ""


def _limits_backward(grad_out: Tensor, grad_lse: Tensor, *arguments: Any) -> str:
    if arguments[-1]:
        return "its kernel has no gradient of alibi_slopes"
    return _limits(*arguments)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    out = q.new_empty((batch, length, heads, v.shape[-1])).transpose(1, 2)
    return out, q.new_empty((batch, heads, length), dtype=compute_dtype(q))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    seed = inputs[8]
    ctx.seed = seed if isinstance(seed, int) else None
    ctx.rule = inputs[9:]
    saved = (*inputs[:8], *output, None if ctx.seed is not None else seed)
    ctx.save_for_backward(*saved)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if ctx.seed is not None:
        seed = ctx.seed
    grads = _backward_op(
        grad_out, grad_lse, *tensors, out, lse, seed, *ctx.rule, needs[3], needs[4]
    )
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
    return (*wanted, *(None,) * 9)


attention_op = Op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor seed, int threshold, float scale,"
    " float softcap, int left, int right, bool bottom_right) -> (Tensor, Tensor)",
    {"cpu": _forward_native, "reference": attention_reference},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=(0, 1, 2, 3, 4),
    limits=_limits,
)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    mask, alibi_slopes, sinks = arguments[:3]
    with_mask, with_slopes = arguments[-2:]
    compute = compute_dtype(q)
    vectors = []
    for tensor, wanted in ((mask, with_mask), (alibi_slopes, with_slopes), (sinks, True)):
        if tensor is not None and wanted:
            vectors.append(tensor.new_empty(tensor.shape))
        else:
            vectors.append(q.new_empty(0, dtype=compute))
    heads = (
        t.transpose(1, 2).new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v)
    )
    return (*heads, *vectors)


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    seed = inputs[12]
    ctx.seed = seed if isinstance(seed, int) else None
    ctx.rule = inputs[13:]
    ctx.save_for_backward(*inputs[:12], None if ctx.seed is not None else seed)


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Through the reference, with the same dropout mask."""
    *tensors, out, lse, seed = ctx.saved_tensors
    if ctx.seed is not None:
        seed = ctx.seed
    wanted = [i for i in range(8) if ctx.needs_input_grad[i]]

    def first_order(*inputs: Tensor) -> tuple[Tensor, ...]:
        arguments = list(tensors)
        for i, value in zip(wanted, inputs, strict=True):
            arguments[i] = value
        return attention_backward_reference(*arguments, out, lse, seed, *ctx.rule)

    values, pullback = torch.func.vjp(first_order, *(tensors[i] for i in wanted))
    cotangents = (g.to(value.dtype) for g, value in zip(grads, values, strict=True))
    found = iter(pullback(tuple(cotangents)))
    first = [next(found) if i in wanted else None for i in range(8)]
    return (*first, *(None,) * (len(ctx.needs_input_grad) - 8))


_backward_op = Op(
    "attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v,"
    " Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, Tensor out, Tensor lse, Tensor seed, int threshold, float scale,"
    " float softcap, int left, int right, bool bottom_right, bool with_mask, bool with_slopes)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"cpu": _backward_native, "reference": attention_backward_reference},
    fake=_fake_backward,
    setup_context=_setup_context_backward,
    backward=_double_backward,
    differentiable=(0, 1, 2, 3, 4, 5, 6),
    limits=_limits_backward,
)


def check_rule(
    op: str,
    window: tuple[int, int] | None,
    softcap: float,
    causal_alignment: str,
    is_causal: bool,
) -> tuple[float, int, int, bool]:
    """(softcap, left, right, bottom_right); -1 is no bound."""
    left, right = -1, -1
    if window is not None:
        if (
            not isinstance(window, (tuple, list))
            or len(window) != 2
            or not all(isinstance(side, int) and side >= -1 for side in window)
        ):
            raise ValueError(f"{op}: window must be (left, right), two ints >= -1, got {window!r}")
        left, right = window
    if is_causal:
        right = 0
    if not softcap >= 0 or math.isinf(softcap):
        raise ValueError(f"{op}: softcap must be a finite number >= 0, got {softcap!r}")
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(
            f'{op}: causal_alignment must be "top_left" or "bottom_right", got {causal_alignment!r}'
        )
    return float(softcap), left, right, causal_alignment == "bottom_right"


def check_slopes(op: str, slopes: Tensor | None, batch: int, q: Tensor) -> Tensor | None:
    """ALiBi's slopes as (batch or 1, heads) in the compute type; q is (batch, heads, ...)."""
    if slopes is None:
        return None
    heads = q.shape[1]
    if tuple(slopes.shape) not in ((heads,), (1, heads), (batch, heads)) or (
        not slopes.is_floating_point() or slopes.device != q.device
    ):
        raise ValueError(
            f"{op}: alibi_slopes must be ({heads},) or ({batch}, {heads}) floating point on "
            f"{q.device}, got {tuple(slopes.shape)} {slopes.dtype} on {slopes.device}"
        )
    return slopes.to(compute_dtype(q)).view(-1, heads)


def check_sinks(op: str, sinks: Tensor | None, q: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    if sinks.shape != q.shape[1:2] or not sinks.is_floating_point() or sinks.device != q.device:
        raise ValueError(
            f"{op}: sinks must be ({q.shape[1]},) floating point on {q.device}, "
            f"got {tuple(sinks.shape)} {sinks.dtype} on {sinks.device}"
        )
    return sinks.to(compute_dtype(q))


def autocasted(*tensors: Tensor | None) -> list[Any]:
    """The operands in the dtype of autocast, where it is on: torch's rule for attention."""
    first = tensors[0]
    if first is None or not torch.is_autocast_enabled(first.device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def _check(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> str:
    """What is wrong with the operands; torch refuses all of it as well, in its own words."""
    for tensor in (query, key, value):
        if tensor.dim() < 2 or not tensor.is_floating_point():
            return "query, key and value must be floating point of at least two dimensions"
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value must have one dtype"
    if not query.device == key.device == value.device:
        return "query, key and value must be on one device"
    if key.shape[-2] != value.shape[-2] or query.shape[-1] != key.shape[-1]:
        return (
            f"query (..., L, E), key (..., S, E) and value (..., S, Ev) do not match: "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            return f"attn_mask must be bool or floating point, got {attn_mask.dtype}"
        if attn_mask.device != query.device:
            return f"attn_mask must be on {query.device}, got {attn_mask.device}"
    return ""


def _broadcast_batch(
    tensors: tuple[Tensor, Tensor, Tensor], enable_gqa: bool
) -> tuple[list[Tensor], torch.Size]:
    """query, key and value as (B, heads, length, size), and the batch shape of the result."""
    query = tensors[0]
    heads = [t.shape[-3] if t.dim() > 2 else 1 for t in tensors]
    if enable_gqa:
        batch = torch.broadcast_shapes(*(t.shape[:-3] for t in tensors))
        most = max(heads[1:])
        if heads[1] != heads[2]:
            tensors = tuple(  # type: ignore[assignment]
                t if i == 0 else t.repeat_interleave(most // heads[i], -3)
                for i, t in enumerate(tensors)
            )
            heads = [heads[0], most, most]
    else:
        whole = torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))
        batch, full = whole[:-1], whole[-1] if whole else 1
        # One head of keys for all queries is a group, and need not be repeated.
        heads = [full, *(heads[1:] if heads[1] == heads[2] == 1 else (full, full))]
    result = [
        t.expand(*batch, h, *t.shape[-2:]).reshape(batch.numel(), h, *t.shape[-2:])
        if t.shape[:-2] != (*batch, h) or t.dim() != 4
        else t
        for t, h in zip(tensors, heads, strict=True)
    ]
    shape = torch.Size((*batch, heads[0]))
    return result, shape if query.dim() > 2 or len(shape) > 1 or shape[0] > 1 else torch.Size(())


def _mask_4d(mask: Tensor, batch: torch.Size, num_queries: int, num_keys: int) -> Tensor:
    """The mask as four dimensions that broadcast to (B, heads, L, S)."""
    torch.broadcast_shapes(mask.shape, (*batch, num_queries, num_keys))
    mask = mask[(None,) * max(0, 4 - mask.dim())]
    if mask.dim() > 4:
        leading = batch[:-1]
        if mask.shape[:-3].numel() == 1:
            return mask.reshape(1, *mask.shape[-3:])
        return mask.expand(*leading, *mask.shape[-3:]).reshape(leading.numel(), *mask.shape[-3:])
    return mask


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    generator: Generator | None = None,
    seed: int | Tensor | None = None,
) -> Any:
    """``dropout(softmax(scale * query @ key.T + mask)) @ value`` without an L x S matrix.

    Replaces :func:`torch.nn.functional.scaled_dot_product_attention`. Differences: ``attn_mask``
    and ``is_causal`` may be given together; a row that may look at nothing gives zeros and has zero
    gradients; NaN or Inf in a key or value that is masked out (False, or -inf in an additive mask)
    or dropped does not reach the result; the gradient of an additive mask, broadcast or not, costs
    no more memory than the mask; the dropout mask is a function of the seed
    (:func:`pyfast.dropout_mask` with ``stream=0``), regenerated in the backward pass; bfloat16 and
    float16 accumulate in float32, gradients too. On the CPU the result does not depend on the
    number of threads. Calls on other devices that need none of pyfast's extras go to torch.

    The scores are, in this order: ``scale * q k^T``, ``softcap * tanh(scores / softcap)``,
    ``- alibi_slopes * |i' - j|``, ``+ attn_mask``, -inf for every key that is not visible. Query i
    is at ``i' = i``, or ``i + S - L`` with ``causal_alignment="bottom_right"``.

    Args:
        query: (..., Hq, L, E), two to five dimensions, floating point, any strides; a last
            dimension with a stride is copied. Leading dimensions broadcast.
        key: (..., Hk, S, E).
        value: (..., Hk, S, Ev).
        attn_mask: broadcastable to (..., Hq, L, S): bool, True for visible, or floating point,
            added.
        dropout_p: probability of a weight to be zeroed, always applied. Default: 0.0
        is_causal: key j is visible to query i when ``j <= i'``. Default: ``False``
        scale: of the scores. Default: ``1 / sqrt(E)``
        enable_gqa: Hk may be a divisor of Hq: each key head serves Hq / Hk query heads, unrepeated.
        window: (left, right): key j is visible when ``i' - left <= j <= i' + right``; -1 for no
            bound. The cost is that of the window. Default: None
        softcap: bound of the scores, 0 for none. Default: 0.0
        alibi_slopes: (Hq,) or (B, Hq). A gradient for it is computed by the reference.
        sinks: (Hq,): logits of one more key per head, whose value is zero.
        causal_alignment: ``"top_left"`` (torch) or ``"bottom_right"``: where the last query stands
            at the last key. It places ``window`` and ALiBi as well.
        return_lse: return ``(out, lse)``. Default: ``False``
        generator: where the seed is drawn from. Default: torch's default CPU generator
        seed: the 64-bit seed of the dropout mask, an int or a tensor of one int64.

    Returns:
        (..., Hq, L, Ev) in the dtype of query, the heads of a token side by side in memory as
        torch has them. With ``return_lse`` also (..., Hq, L) float32 (float64 for float64): the
        natural logarithm of the softmax denominator, sink included; -inf where a row sees neither
        a key nor a sink. Both are differentiable, twice (the second derivative by the reference).

    Raises:
        RuntimeError, ValueError: torch's errors for what torch refuses; ValueError for a window,
            softcap, slopes, sinks or alignment that does not fit.

    Source: Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023. float32, bfloat16 and
    float16 with E and Ev up to 256 run natively, the rest by the reference.
    """
    tensors = (query, key, value, attn_mask, alibi_slopes, sinks)
    if isinstance(attn_mask, CausalBias):
        lower = attn_mask.variant == CausalVariant.LOWER_RIGHT
        attn_mask, is_causal = None, True
        causal_alignment = "bottom_right" if lower else causal_alignment
    elif has_torch_function(tensors):
        return handle_torch_function(
            scaled_dot_product_attention,
            tensors,
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            causal_alignment=causal_alignment,
            return_lse=return_lse,
            generator=generator,
            seed=seed,
        )
    op = "scaled_dot_product_attention"
    if _is_autocast_enabled():
        query, key, value, attn_mask = autocasted(query, key, value, attn_mask)
    as_torch = functools.partial(
        F.scaled_dot_product_attention,
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    problem = _check(query, key, value, attn_mask)
    if problem or not 0.0 <= dropout_p <= 1.0:
        with torch.no_grad():
            as_torch()  # torch's error, if it refuses the call as well
        check_probability(dropout_p)
        raise ValueError(f"{op}: {problem}")
    extras = window, softcap or None, alibi_slopes, sinks, generator, seed
    plain = causal_alignment == "top_left" and not return_lse and all(e is None for e in extras)
    if (
        plain
        and query.device.type not in ("cpu", "meta")
        and _backend.forced() is None
        and not (is_causal and attn_mask is not None)
        and attention_op.backend_of(query) == "reference"
    ):
        return as_torch()
    softcap, left, right, bottom_right = check_rule(
        op, window, softcap, causal_alignment, is_causal
    )
    num_queries, num_keys, size = query.shape[-2], key.shape[-2], query.shape[-1]
    if scale is None:
        scale = 1 / math.sqrt(size) if size else 1.0
    q, k, v = query, key, value
    if attn_mask is not None and attn_mask.dim() > 2 and attn_mask.shape[:-2] != q.shape[:-2]:
        leading = torch.broadcast_shapes(attn_mask.shape[:-2], q.shape[:-2])
        q = q.expand(*leading, num_queries, size)
    batch: torch.Size | None = None
    if not (q.dim() == k.dim() == v.dim() == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]):
        try:
            if enable_gqa:
                counts = [t.shape[-3] if t.dim() > 2 else 1 for t in (q, k, v)]
                if any(c == 0 or counts[0] % c for c in counts[1:]):
                    raise RuntimeError(f"{op}: query heads must be a multiple of key heads")
            (q, k, v), batch = _broadcast_batch((q, k, v), enable_gqa)
        except RuntimeError:
            with torch.no_grad():
                as_torch()
            raise
    if attn_mask is not None:
        heads = batch if batch is not None else q.shape[:2]
        try:
            attn_mask = _mask_4d(attn_mask, heads, num_queries, num_keys)
        except RuntimeError:
            with torch.no_grad():
                as_torch()
            raise
        if attn_mask.dtype == torch.float64 and q.dtype != torch.float64:
            attn_mask = attn_mask.float()
    alibi_slopes = check_slopes(op, alibi_slopes, q.shape[0], q)
    sinks = check_sinks(op, sinks, q)
    threshold = threshold_of(dropout_p)
    eager = is_eager(q)
    seed = resolve_seed(op, q, eager, generator, seed if threshold else 0)
    call = attention_op.eager if eager else attention_op.traced
    arguments = (seed, threshold, float(scale), softcap, left, right, bottom_right)
    out, lse = call(q, k, v, attn_mask, alibi_slopes, sinks, None, None, *arguments)
    if batch is not None:
        out = out.view(*batch, num_queries, value.shape[-1])
        lse = lse.view(*batch, num_queries)
    return (out, lse) if return_lse else out
