"""The gradient of an additive mask that is broadcast: see attention_backward_triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.philox_triton import load_seed
from .attention_backward_tile_triton import load_row_values, tile_gradients
from .attention_tile_triton import (
    LOG2E,
    load_rows,
)


@triton.jit(do_not_specialize=["seed"])
def mask_gradient_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    mask_pointer,
    slopes_pointer,
    cu_q_pointer,
    cu_k_pointer,
    grad_out_pointer,
    lse_pointer,
    delta_pointer,
    grad_mask_pointer,
    seed,
    first_head,
    head_step,
    q_b_stride,
    q_h_stride,
    q_m_stride,
    k_b_stride,
    k_h_stride,
    k_n_stride,
    v_b_stride,
    v_h_stride,
    v_n_stride,
    mask_b_stride,
    mask_h_stride,
    mask_m_stride,
    mask_n_stride,
    slopes_b_stride,
    grad_out_b_stride,
    grad_out_h_stride,
    grad_out_m_stride,
    heads,
    group,
    num_queries,
    num_keys,
    num_blocks,
    num_sequences,
    threshold,
    keep_scale,
    scale,
    softcap,
    left,
    right,
    grad_scale,
    batch,
    mask_batch,
    mask_heads,
    mask_queries,
    mask_keys,
    BOTTOM_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    MASK_TYPE: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program takes a tile of a mask [mask_batch, mask_heads, mask_queries, mask_keys] and adds
    up, in their order, the tiles of scores that share it."""
    tiles_n = tl.where(mask_keys == 1, 1, tl.cdiv(mask_keys, BLOCK_N))
    tiles_m = tl.where(mask_queries == 1, 1, tl.cdiv(mask_queries, BLOCK_M))
    tile = tl.program_id(0)
    tile_n = tile % tiles_n
    tile_m = tile // tiles_n % tiles_m
    mask_head = tile // tiles_n // tiles_m % mask_heads
    mask_b = tile // tiles_n // tiles_m // mask_heads
    # How many tiles of scores share this one, along each dimension.
    share_n = tl.where(mask_keys == num_keys, 1, tl.cdiv(num_keys, BLOCK_N))
    share_m = tl.where(mask_queries == num_queries, 1, tl.cdiv(num_queries, BLOCK_M))
    share_h = tl.where(mask_heads == heads, 1, heads)
    share_b = tl.where(mask_batch == batch, 1, batch)
    shift = 0
    if BOTTOM_RIGHT:
        shift = num_keys - num_queries
    key = 0
    if HAS_DROPOUT:
        key = load_seed(seed, SEED_IS_POINTER)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in tl.range(0, share_n * share_m * share_h * share_b):
        n0 = (tile_n + t % share_n) * BLOCK_N
        m0 = (tile_m + t // share_n % share_m) * BLOCK_M
        h = mask_head + t // share_n // share_m % share_h
        b = mask_b + t // share_n // share_m // share_h
        first = m0 + shift
        last = tl.minimum(m0 + BLOCK_M, num_queries) - 1 + shift
        if (n0 <= last + right) & (n0 + BLOCK_N > first - left):
            b64 = b.to(tl.int64)
            head = h.to(tl.int64)
            key_head = head // group
            query = m0 + tl.arange(0, BLOCK_M)
            position = query + shift
            column = n0 + tl.arange(0, BLOCK_N)
            q_base = q_pointer + b64 * q_b_stride + head * q_h_stride
            k_base = k_pointer + b64 * k_b_stride + key_head * k_h_stride
            v_base = v_pointer + b64 * v_b_stride + key_head * v_h_stride
            grad_base = grad_out_pointer + b64 * grad_out_b_stride + head * grad_out_h_stride
            q = load_rows(q_base, query, q_m_stride, num_queries, HEAD_SIZE, BLOCK_D)
            k = load_rows(k_base, column, k_n_stride, num_keys, HEAD_SIZE, BLOCK_D)
            v = load_rows(v_base, column, v_n_stride, num_keys, VALUE_SIZE, BLOCK_DV)
            grad_out = load_rows(
                grad_base, query, grad_out_m_stride, num_queries, VALUE_SIZE, BLOCK_DV
            )
            first_row = (b64 * heads + head) * num_queries
            lse, delta = load_row_values(
                lse_pointer + first_row, delta_pointer + first_row, query, num_queries
            )
            mask_base = mask_pointer + b64 * mask_b_stride + head * mask_h_stride
            slope = 0.0
            if HAS_ALIBI:
                slope = tl.load(slopes_pointer + b * slopes_b_stride + head) * LOG2E
            z = first_head + b * head_step + h
            _, grad_scores, _ = tile_gradients(
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
                mask_base,
                mask_m_stride,
                mask_n_stride,
                EDGE=True,
                HAS_SOFTCAP=HAS_SOFTCAP,
                HAS_ALIBI=HAS_ALIBI,
                HAS_DROPOUT=HAS_DROPOUT,
                MASK_TYPE=MASK_TYPE,
                PRECISION=PRECISION,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
            )
            total += grad_scores

    base = grad_mask_pointer
    base = base + (mask_b.to(tl.int64) * mask_heads + mask_head) * mask_queries * mask_keys
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    kind = grad_mask_pointer.dtype.element_ty
    # One of the keys, or of the queries: sums along the tile.
    if (mask_keys == 1) & (mask_queries == 1):
        tl.store(base, tl.sum(tl.sum(total, 1), 0).to(kind))
    elif mask_keys == 1:
        tl.store(base + row, tl.sum(total, 1).to(kind), mask=row < mask_queries)
    elif mask_queries == 1:
        tl.store(base + column, tl.sum(total, 0).to(kind), mask=column < mask_keys)
    else:
        at = base + row.to(tl.int64)[:, None] * mask_keys + column[None, :]
        inside = (row < mask_queries)[:, None] & (column < mask_keys)[None, :]
        tl.store(at, total.to(kind), mask=inside)
