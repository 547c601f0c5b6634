"""The gradient of a tile of attention's scores: shared by the kernels of the backward pass."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.philox_triton import score_bits
from .attention_tile_triton import LOG2E, tile_scores


@triton.jit
def tile_gradients(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    position,
    column,
    query,
    n0,
    key,
    z,
    num_queries,
    num_keys,
    threshold,
    keep_scale,
    scale,
    softcap,
    left,
    right,
    slope,
    mask_pointer,
    mask_m_stride,
    mask_n_stride,
    EDGE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    MASK_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``(dropped weights less their scale, gradient of the scores, the same before the softcap)``
    of a tile; ``lse`` is in units of log 2, inf where nothing is seen."""
    s, derivative = tile_scores(
        q,
        k,
        1.0,
        position,
        column,
        query,
        num_queries,
        num_keys,
        scale,
        softcap,
        left,
        right,
        slope,
        mask_pointer,
        mask_m_stride,
        mask_n_stride,
        EDGE=EDGE,
        IS_INT8=False,
        HAS_SOFTCAP=HAS_SOFTCAP,
        HAS_ALIBI=HAS_ALIBI,
        MASK_TYPE=MASK_TYPE,
        PRECISION=PRECISION,
    )
    p = tl.exp2(s - lse[:, None])
    grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    dropped = p
    if HAS_DROPOUT:
        bits = score_bits(key, query, n0, z, 0, BLOCK_M, BLOCK_N)
        keep = bits.to(tl.int32) >= threshold
        dropped = tl.where(keep, p, 0.0)
        grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
    grad_scores = tl.where(p == 0.0, 0.0, p * (grad_p - delta[:, None]))
    grad_raw = grad_scores
    if HAS_SOFTCAP:
        grad_raw = tl.where(p == 0.0, 0.0, grad_scores * derivative)
    return dropped, grad_scores, grad_raw


@triton.jit
def load_row_values(lse_pointer, delta_pointer, row, num_rows):
    """``(lse in units of log 2, delta)``; inf where the weights of a row are zeros."""
    lse = tl.load(lse_pointer + row, mask=row < num_rows, other=-float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)
    return lse, tl.load(delta_pointer + row, mask=row < num_rows, other=0.0)
