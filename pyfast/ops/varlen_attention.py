"""Attention over sequences of different lengths, packed without padding."""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch import Generator, Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ._attention_arguments import autocasted, check_rule, check_sinks, check_slopes
from ._op import is_eager
from ._rule import check_probability, resolve_seed, threshold_of
from .attention import attention_op

_OP = "varlen_attention"


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, x: Tensor, longest: int, eager: bool) -> None:
    """Of ``x``, the packed tokens; values where reading them does not wait for a GPU."""
    if (
        cu_seqlens.dim() != 1
        or len(cu_seqlens) < 1
        or cu_seqlens.is_floating_point()
        or cu_seqlens.device != x.device
    ):
        raise ValueError(
            f"{_OP}: {name} must be (N + 1,) int32 or int64 on {x.device}, "
            f"got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} on {cu_seqlens.device}"
        )
    if not (eager and cu_seqlens.is_cpu):
        return
    bounds, total = cu_seqlens.tolist(), x.shape[0]
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(
            f"{_OP}: {name} must rise from 0 to the {total} packed tokens, got {bounds}"
        )
    if max(lengths, default=0) > longest:
        raise ValueError(
            f"{_OP}: a sequence of {name} has {max(lengths)} tokens, more than the "
            f"maximum that was given, {longest}"
        )


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    generator: Generator | None = None,
    seed: int | Tensor | None = None,
) -> Any:
    """Attention of N sequences that are packed one after the other: no padding, no mask.

    What :func:`torch.nn.attention.varlen.varlen_attn` and flash-attention's
    ``flash_attn_varlen_func`` do, on the CPU too and with dropout, softcap, ALiBi and sinks.
    Differences: ``causal_alignment`` is top left unless said otherwise (they: bottom right), which
    matters only where a sequence has fewer queries than keys. Semantics, gradients and the meaning
    of the other arguments are those of
    :func:`pyfast.nn.functional.scaled_dot_product_attention`.

    Args:
        q: (total_q, Hq, E) floating point.
        k: (total_k, Hk, E); Hk divides Hq, each key head serves Hq / Hk query heads.
        v: (total_k, Hk, Ev).
        cu_seqlens_q: (N + 1,) int32 or int64: where each sequence begins, from 0 to total_q,
            on the device of q. On CUDA the values are not checked, which would wait for the GPU:
            tokens behind the last one are not computed, and those beyond total_q do not exist.
        cu_seqlens_k: (N + 1,): the same for keys and values.
        max_seqlen_q: the longest sequence of queries, or any larger number. Checked on the CPU.
        max_seqlen_k: the longest sequence of keys, or any larger number.
        alibi_slopes: (Hq,) or (N, Hq).

    Returns:
        (total_q, Hq, Ev); with ``return_lse`` also (Hq, total_q) float32.

    Raises:
        ValueError: where shapes, dtypes or sequence bounds do not fit.
    """
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks)
    if has_torch_function(tensors):
        return handle_torch_function(
            varlen_attention,
            tensors,
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            causal_alignment=causal_alignment,
            return_lse=return_lse,
            generator=generator,
            seed=seed,
        )
    check_probability(dropout_p)
    q, k, v = autocasted(q, k, v)
    fits = q.dim() == k.dim() == v.dim() == 3
    fits = fits and k.shape[:2] == v.shape[:2] and q.shape[2] == k.shape[2]
    fits = fits and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    fits = fits and q.dtype == k.dtype == v.dtype and q.is_floating_point()
    if not fits or not q.device == k.device == v.device:
        raise ValueError(
            f"{_OP}: q (total_q, Hq, E), k (total_k, Hk, E) and v (total_k, Hk, Ev) must be of one "
            "floating-point dtype on one device, Hk a divisor of Hq, got "
            + ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (q, k, v))
        )
    softcap, left, right, bottom_right = check_rule(
        _OP, window, softcap, causal_alignment, is_causal
    )
    eager = is_eager(q)
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q, eager)
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k, eager)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{_OP}: cu_seqlens_q and cu_seqlens_k must have one length, "
            f"got {len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        )
    heads_first = [t.transpose(0, 1)[None] for t in (q, k, v)]
    slopes = check_slopes(_OP, alibi_slopes, len(cu_seqlens_q) - 1, heads_first[0])
    sinks = check_sinks(_OP, sinks, heads_first[0])
    threshold = threshold_of(dropout_p)
    seed = resolve_seed(_OP, q, eager, generator, seed if threshold else 0)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[2]) if q.shape[2] else 1.0
    call = attention_op.eager if eager else attention_op.traced
    out, lse = call(
        *heads_first,
        None,
        slopes,
        sinks,
        cu_seqlens_q.long(),
        cu_seqlens_k.long(),
        seed,
        threshold,
        float(scale),
        softcap,
        left,
        right,
        bottom_right,
    )
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out
