"""torch's attention function, with more features, on the op of attention.py."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from .. import _backend
from .._backend import KERNEL_DTYPES
from ._attention_arguments import (
    autocasted,
    check_context,
    check_rule,
    check_sinks,
    check_slopes,
    is_causal_bias,
)
from ._op import _PLAIN_TYPES, is_distributed, is_eager
from ._rule import check_probability, resolve_seed, threshold_of
from .attention import MAX_HEAD_SIZE, attention_op

_is_autocast_enabled = torch._C._is_any_autocast_enabled
_has_function_mode = torch._C._is_torch_function_mode_enabled
_NO_TENSORS = (None,) * 4  # slopes, sinks, and where packed sequences begin


def _check(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> str:
    """What is wrong with the operands; torch refuses all of it as well, in its own words."""
    for tensor in (query, key, value):
        if not isinstance(tensor, Tensor) or not (
            attn_mask is None or isinstance(attn_mask, Tensor)
        ):
            return "query, key, value and attn_mask must be tensors"
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
        t.expand(*batch, h, *t.shape[-2:]).reshape(math.prod(batch), h, *t.shape[-2:])
        if t.shape[:-2] != (*batch, h) or t.dim() != 4
        else t
        for t, h in zip(tensors, heads, strict=True)
    ]
    shape = torch.Size((*batch, heads[0]))
    return result, shape if query.dim() > 2 or len(shape) > 1 or shape[0] > 1 else torch.Size(())


def _mask_4d(mask: Tensor, batch: torch.Size, num_queries: int, num_keys: int) -> Tensor:
    """The mask as four dimensions that broadcast to (B, heads, L, S); ``batch`` is (..., heads)."""
    torch.broadcast_shapes(mask.shape, (*batch, num_queries, num_keys))
    mask = mask[(None,) * max(0, 4 - mask.dim(), len(batch) + 2 - mask.dim())]
    if mask.dim() == 4:
        return mask
    if math.prod(mask.shape[:-3]) == 1:
        return mask.reshape(1, *mask.shape[-3:])
    leading = batch[:-1]
    return mask.expand(*leading, *mask.shape[-3:]).reshape(math.prod(leading), *mask.shape[-3:])


def _why_torch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, p: float, is_causal: bool
) -> str:
    """Why torch's own function serves a call without extras that is not on the CPU, or nothing."""
    if _backend.forced() is not None or (is_causal and attn_mask is not None):
        return ""
    if attention_op.backend_of(query) == "reference":
        return "no kernel of pyfast's is usable here, and the call has none of its extras"
    size = query.shape[-1]
    if (
        attn_mask is None
        and (p == 0 or (p < 1 and not is_distributed(query)))  # shards have the masks of the whole
        and query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size % 8 == 0
        and 0 < size <= MAX_HEAD_SIZE
        and (not is_causal or query.shape[-2] == key.shape[-2])
    ):
        return "its fused kernels compute the same, and pyfast's was measured to be slower"
    return ""


def _is_simple(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> bool:
    """True for plain tensors on the CPU that the kernels take as they are: nothing to promote,
    expand, or refuse. Asking costs a third of finding the same out one by one."""
    if not (
        type(query) in _PLAIN_TYPES
        and type(key) in _PLAIN_TYPES
        and type(value) in _PLAIN_TYPES
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
        and query.dim() == key.dim() == value.dim() == 4
        and query.dtype == key.dtype == value.dtype
        and query.dtype in KERNEL_DTYPES
        and not _is_autocast_enabled()
        and not _has_function_mode()
        and is_eager(query)
    ):
        return False
    batch, heads, num_queries, size = query.shape
    key_batch, key_heads, num_keys, key_size = key.shape
    if (
        batch != key_batch
        or size != key_size
        or value.shape[:3] != key.shape[:3]
        or (heads != key_heads and not (enable_gqa and key_heads and heads % key_heads == 0))
    ):
        return False
    if mask is None:
        return True
    return (
        type(mask) is Tensor
        and mask.is_cpu
        and mask.dim() == 4
        and (mask.dtype == torch.bool or mask.dtype == query.dtype)
        and all(
            m in (1, s)
            for m, s in zip(mask.shape, (batch, heads, num_queries, num_keys), strict=True)
        )
    )


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
    number of threads. On CUDA, calls without a mask and pyfast's extras that torch's fused kernels
    serve (bfloat16, float16) go to torch, and draw their dropout as torch does; all others go to
    Triton kernels, whose float32 products are three passes of TF32, or one where torch allows TF32;
    :func:`pyfast.explain` tells. On other devices calls that need no extras go to torch.

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
            softcap, slopes, sinks or alignment that does not fit; RuntimeError inside of torch's
            ``context_parallel``, unless the call goes to torch.

    Source: Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023. float32, bfloat16 and
    float16 with E and Ev up to 256 run natively, the rest by the reference.
    """
    plain = (
        window is None
        and not softcap
        and alibi_slopes is None
        and sinks is None
        and causal_alignment == "top_left"
        and not return_lse
        and generator is None
        and seed is None
    )
    if (
        plain
        and dropout_p == 0.0
        and (scale is None or type(scale) is float)
        and _is_simple(query, key, value, attn_mask, enable_gqa)
        and forward_ad._current_level < 0
    ):
        check_context("scaled_dot_product_attention")
        if scale is None:
            scale = query.shape[3] ** -0.5 if query.shape[3] else 1.0
        rule = (0, 0, scale, 0.0, -1, 0 if is_causal else -1, False)
        return attention_op.eager(query, key, value, attn_mask, *_NO_TENSORS, *rule)[0]
    tensors = (query, key, value, attn_mask, alibi_slopes, sinks)
    if is_causal_bias(attn_mask):
        lower = attn_mask.variant.name == "LOWER_RIGHT"  # type: ignore[union-attr]
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
    if problem or not 0.0 <= dropout_p <= 1.0 or isinstance(scale, str):
        with torch.no_grad():
            as_torch()  # torch's error, if it refuses the call as well
        check_probability(dropout_p)
        raise ValueError(f"{op}: {problem}")
    if plain and query.device.type not in ("cpu", "meta"):
        reason = _why_torch(query, key, value, attn_mask, dropout_p, is_causal)
        if reason:
            if _backend.observers:
                _backend.report("attention", attention_op.kernels, query, "torch", reason, "")
            return as_torch()
    softcap, left, right, bottom_right = check_rule(
        op, window, softcap, causal_alignment, is_causal
    )
    num_queries, num_keys, size = query.shape[-2], key.shape[-2], query.shape[-1]
    if scale is None:
        scale = 1 / math.sqrt(size) if size else 1.0
    q, k, v = query, key, value
    if attn_mask is not None and attn_mask.dim() > 2 and attn_mask.shape[:-2] != q.shape[:-2]:
        try:
            leading = torch.broadcast_shapes(attn_mask.shape[:-2], q.shape[:-2])
        except RuntimeError:
            with torch.no_grad():
                as_torch()
            raise
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
    if eager:
        check_context(op)
    seed = resolve_seed(op, q, eager, generator, seed if threshold else 0)
    call = attention_op.eager if eager else attention_op.traced
    arguments = (seed, threshold, float(scale), softcap, left, right, bottom_right)
    out, lse = call(q, k, v, attn_mask, alibi_slopes, sinks, None, None, *arguments)
    if is_distributed(q):
        places: Any = q.placements  # type: ignore[attr-defined]
        if any(place.is_shard(2) for place in places):  # parts of the sequence, as the query
            out = out.redistribute(placements=places)
    if batch is not None:
        out = out.view(*batch, num_queries, value.shape[-1])
        lse = lse.view(*batch, num_queries)
    return (out, lse) if return_lse else out
