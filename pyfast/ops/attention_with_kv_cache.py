"""Attention of new queries over a cache of keys and values: the step of a decoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention.attention_reference import attention_reference
from ._attention_arguments import check_rule, check_sinks, check_slopes
from ._native import contiguous, get_num_threads, native
from ._op import Op, is_eager
from .attention import empty_heads, fake_forward
from .attention import heads_last_dim as _heads
from .attention import limits as _limits

_OP = "attention_with_kv_cache"
_CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _attend_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    lengths: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: int | Tensor,
    *rule: Any,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    out = empty_heads(batch, heads, length, v.shape[-1], q)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    native.attention(
        _heads(q),
        _heads(k),
        _heads(v),
        out,
        lse,
        None,
        contiguous(alibi_slopes)[0],
        contiguous(sinks)[0],
        None,
        None,
        lengths,
        k_scale,
        v_scale,
        0,
        0,
        *rule,
        True,
        get_num_threads(),
    )
    return out, lse


def _attend_triton(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from ..kernels.attention.attention_triton import attention_with_kv_cache_triton

    k_scale, v_scale, lengths, slopes, sinks, *rest = arguments
    slopes, sinks = contiguous(slopes)[0], contiguous(sinks)[0]
    operands = (_heads(q), _heads(k), _heads(v), k_scale, v_scale, lengths.contiguous())
    return attention_with_kv_cache_triton(*operands, slopes, sinks, *rest)


def _attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    lengths: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: int | Tensor,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    """Batch by batch over the keys that count, dequantized."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.shape[0] == 0:
        return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=compute)
    outs, lses = [], []
    for b, length in enumerate(lengths.tolist()):
        keys, values = (
            t[b : b + 1, :, :length].to(compute)
            * (1 if s is None else s[b : b + 1, :, :length, None])
            for t, s in ((k, k_scale), (v, v_scale))
        )
        slopes = alibi_slopes
        if slopes is not None and len(slopes) > 1:
            slopes = slopes[b : b + 1]
        operands = q[b : b + 1].to(compute), keys, values, None, slopes, sinks, None, None
        out, lse = attention_reference(*operands, 0, 0, scale, softcap, left, right, True)
        outs.append(out.to(q.dtype))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


_attend = Op(
    "attention_with_kv_cache(Tensor q, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale,"
    " Tensor lengths, Tensor? alibi_slopes, Tensor? sinks, Tensor seed, float scale,"
    " float softcap, int left, int right) -> (Tensor, Tensor)",
    {"cpu": _attend_native, "triton": _attend_triton, "reference": _attend_reference},
    fake=fake_forward,
    limits=_limits,
)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n) as int8 and one float32 scale per token: symmetric, absmax / 127, half to even."""
    x = x.float()
    # By a tensor: torch multiplies by the reciprocal of a number on CUDA, which is rounded.
    scale = x.abs().amax(-1) / torch.full((), 127.0, device=x.device)
    values = (x / torch.where(scale == 0, 1, scale)[..., None]).round().clamp(-127, 127)
    return values.to(torch.int8), scale


def _append(cache: Tensor, scales: Tensor | None, new: Tensor, positions: Tensor | int) -> None:
    """Write (B, Hk, n, size) behind the tokens that the cache has."""
    if scales is not None:
        new, new_scales = quantize_tokens(new)
    new = new.to(cache.dtype)
    if isinstance(positions, int):
        end = positions + new.shape[2]
        cache[:, :, positions:end] = new
        if scales is not None:
            scales[:, :, positions:end] = new_scales
        return
    index = positions[:, None] + torch.arange(new.shape[2], device=cache.device)  # (B, n)
    batch = torch.arange(cache.shape[0], device=cache.device)[:, None]
    cache.transpose(1, 2)[batch, index] = new.transpose(1, 2)
    if scales is not None:
        scales.transpose(1, 2)[batch, index] = new_scales.transpose(1, 2)


def _describe(tensors: dict[str, Tensor | None]) -> str:
    return ", ".join(
        f"{name} {tuple(t.shape)} {t.dtype} on {t.device}"
        for name, t in tensors.items()
        if t is not None
    )


def _check_shapes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    fits = all(t is None or (t.dim() == 4 and t.device == q.device) for t in tensors.values())
    fits = fits and q.dtype in _CACHE_DTYPES and (k is None) == (v is None)
    fits = fits and k_cache.shape[:3] == v_cache.shape[:3] and q.shape[0] == k_cache.shape[0]
    fits = fits and q.shape[3] == k_cache.shape[3]
    fits = fits and k_cache.shape[1] > 0 and q.shape[1] % k_cache.shape[1] == 0
    fits = fits and k_cache.dtype == v_cache.dtype and k_cache.dtype in (q.dtype, torch.int8)
    if fits and k is not None and v is not None:
        fits = k.shape[:3] == v.shape[:3] and k.shape[:2] == k_cache.shape[:2]
        fits = fits and (k.shape[3], v.shape[3]) == (k_cache.shape[3], v_cache.shape[3])
        fits = fits and k.dtype == v.dtype == q.dtype
    if not fits:
        raise ValueError(
            f"{_OP}: q (B, Hq, L, E), k_cache (B, Hk, C, E), v_cache (B, Hk, C, Ev) and, both or "
            "neither, k (B, Hk, n, E), v (B, Hk, n, Ev) must be on one device, Hk a divisor of Hq, "
            "of one floating-point dtype (the caches may be int8), got " + _describe(tensors)
        )
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    for name, scale in scales.items():
        quantized = k_cache.dtype == torch.int8
        if quantized != (scale is not None):
            raise ValueError(f"{_OP}: {name} goes with int8 caches, got {_describe(tensors)}")
        if scale is not None and (
            scale.shape != k_cache.shape[:3]
            or scale.dtype != torch.float32
            or scale.device != q.device
        ):
            raise ValueError(
                f"{_OP}: {name} must be {tuple(k_cache.shape[:3])} float32 on {q.device}, "
                f"got {_describe({name: scale})}"
            )


def _checked_seqlens(
    cache_seqlens: int | Tensor | None, k_cache: Tensor, num_new: int, eager: bool
) -> int | Tensor:
    """How many tokens the cache has, an int or (B,) int64; with the new ones they must fit."""
    capacity, batch = k_cache.shape[2], k_cache.shape[0]
    if cache_seqlens is None:
        if num_new:
            raise ValueError(f"{_OP}: k and v need cache_seqlens, the place to write them")
        return capacity
    if isinstance(cache_seqlens, Tensor):
        if (
            tuple(cache_seqlens.shape) != (batch,)
            or cache_seqlens.dtype not in (torch.int32, torch.int64)
            or cache_seqlens.device != k_cache.device
        ):
            raise ValueError(
                f"{_OP}: cache_seqlens must be an int or ({batch},) int32 or int64 on "
                f"{k_cache.device}, got {_describe({'cache_seqlens': cache_seqlens})}"
            )
        counts = cache_seqlens.tolist() if eager and cache_seqlens.is_cpu else []
    else:
        counts = [cache_seqlens]
    if any(not 0 <= count <= capacity - num_new for count in counts):
        raise ValueError(
            f"{_OP}: cache_seqlens must be in [0, {capacity - num_new}] for a cache of {capacity} "
            f"tokens and {num_new} new ones, got {counts}"
        )
    return cache_seqlens.long() if isinstance(cache_seqlens, Tensor) else cache_seqlens


def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    is_causal: bool = False,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Append the keys and values of new tokens to a cache, in place, and attend to all of it.

    Torch has no such function; flash-attention's ``flash_attn_with_kvcache`` has its heads behind
    the tokens. The last query stands at the last token of its sequence: ``is_causal``, ``window``
    and ``alibi_slopes`` count from there (bottom right). A few queries over many keys are split
    over the keys, so that all threads read memory. For inference: there is no gradient.

    Args:
        q: (B, Hq, L, E) float32, bfloat16, float16 or float64.
        k_cache: (B, Hk, C, E) with room for C tokens, q's dtype or int8; any strides. Hk divides
            Hq. Written at the places of the new tokens.
        v_cache: (B, Hk, C, Ev), the dtype of k_cache.
        k: (B, Hk, n, E), the new tokens; None to attend to what is there.
        v: (B, Hk, n, Ev).
        cache_seqlens: how many tokens each sequence has before this call, an int or (B,) int32 or
            int64 on q's device. On CUDA the values are not checked, which would wait for the GPU.
            Default: C
        is_causal: a query sees no key behind its own place. Default: ``False``
        k_scale: (B, Hk, C) float32 for int8 caches: a cached key is ``k_cache * k_scale``. The
            scales of new tokens (absmax / 127) are written.
        v_scale: (B, Hk, C) float32, the same for values.
        scale, window, softcap, alibi_slopes, sinks, return_lse: as in
            :func:`pyfast.nn.functional.scaled_dot_product_attention`.

    Returns:
        (B, Hq, L, Ev) in q's dtype; with ``return_lse`` also (B, Hq, L) float32.

    Raises:
        ValueError: where shapes or dtypes do not fit, or the cache is too short; nothing is written
            then.
        RuntimeError: if q, k or v requires a gradient and gradients are enabled.
    """
    operands = (q, k_cache, v_cache, k, v, alibi_slopes, sinks)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        raise RuntimeError(
            f"{_OP} has no gradient: call it under torch.no_grad(), or use "
            "scaled_dot_product_attention"
        )
    _check_shapes(q, k_cache, v_cache, k, v, k_scale, v_scale)
    num_new = 0 if k is None else k.shape[2]
    eager = is_eager(q)
    positions = _checked_seqlens(cache_seqlens, k_cache, num_new, eager)
    softcap, left, right, _ = check_rule(_OP, window, softcap, "bottom_right", is_causal)
    slopes = check_slopes(_OP, alibi_slopes, q.shape[0], q)
    sinks = check_sinks(_OP, sinks, q)
    _attend.check_limits(q, k_cache, v_cache)
    if num_new and k is not None and v is not None:
        _append(k_cache, k_scale, k, positions)
        _append(v_cache, v_scale, v, positions)
    if isinstance(positions, Tensor):
        lengths = positions + num_new
    else:
        lengths = torch.full((q.shape[0],), positions + num_new, device=q.device)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3]) if q.shape[3] else 1.0
    call = _attend.eager if eager else _attend.traced
    rule = (float(scale), softcap, left, right)
    out, lse = call(q, k_cache, v_cache, k_scale, v_scale, lengths, slopes, sinks, 0, *rule)
    return (out, lse) if return_lse else out
