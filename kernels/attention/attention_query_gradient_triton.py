"""Gradients of attention's queries and of its additive mask: see attention_backward_triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.philox_triton import load_seed
from .attention_backward_tile_triton import load_row_values, tile_gradients
from .attention_tile_triton import (
    LOG2E,
    dot_hiding,
    edge_blocks,
    find_sequence,
    has_special,
    key_blocks,
    load_rows,
    store_rows,
)


@triton.jit(do_not_specialize=["seed"])
def query_gradient_kernel(
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
    grad_q_pointer,
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
    grad_q_b_stride,
    grad_q_h_stride,
    grad_q_m_stride,
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
    STORE_MASK: tl.constexpr,
):
    """A program takes a block of queries. STORE_MASK: also writes the gradient of a mask
    [batch, heads, num_queries, num_keys], which is zero where nothing is written."""
    slot = tl.program_id(0) % num_blocks
    outer = tl.program_id(0) // num_blocks
    first_query = 0
    first_key = 0
    all_queries = num_queries
    b = outer // heads
    sequence = b
    block = num_blocks - 1 - slot
    if IS_VARLEN:
        sequence, block = find_sequence(slot, cu_q_pointer, num_sequences, BLOCK_M)
        if sequence >= num_sequences:
            return
        first_query = tl.load(cu_q_pointer + sequence).to(tl.int32)
        end_query = tl.minimum(tl.load(cu_q_pointer + sequence + 1), num_queries)
        num_queries = end_query.to(tl.int32) - first_query
        first_key = tl.load(cu_k_pointer + sequence).to(tl.int32)
        end_key = tl.minimum(tl.load(cu_k_pointer + sequence + 1), num_keys)
        num_keys = end_key.to(tl.int32) - first_key
    b64 = b.to(tl.int64)
    head = (outer % heads).to(tl.int64)
    key_head = head // group
    m0 = block * BLOCK_M
    query = m0 + tl.arange(0, BLOCK_M)
    last = tl.minimum(m0 + BLOCK_M, num_queries) - 1
    shift = 0
    if BOTTOM_RIGHT:
        shift = num_keys - num_queries
    position = query + shift
    from_query = tl.cast(first_query, tl.int64)
    from_key = tl.cast(first_key, tl.int64)
    q_base = q_pointer + b64 * q_b_stride + head * q_h_stride + from_query * q_m_stride
    grad_base = grad_out_pointer + b64 * grad_out_b_stride + head * grad_out_h_stride
    grad_base = grad_base + from_query * grad_out_m_stride
    k_base = k_pointer + b64 * k_b_stride + key_head * k_h_stride + from_key * k_n_stride
    v_base = v_pointer + b64 * v_b_stride + key_head * v_h_stride + from_key * v_n_stride
    first_row = (b64 * heads + head) * all_queries + from_query
    mask_base = mask_pointer + b64 * mask_b_stride + head * mask_h_stride
    q = load_rows(q_base, query, q_m_stride, num_queries, HEAD_SIZE, BLOCK_D)
    grad_out = load_rows(grad_base, query, grad_out_m_stride, num_queries, VALUE_SIZE, BLOCK_DV)
    lse, delta = load_row_values(
        lse_pointer + first_row, delta_pointer + first_row, query, num_queries
    )
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_pointer + sequence * slopes_b_stride + head) * LOG2E
    key = 0
    if HAS_DROPOUT:
        key = load_seed(seed, SEED_IS_POINTER)
    z = (first_head + sequence * head_step + head).to(tl.int32)
    begin, end, full_begin, full_end = key_blocks(
        m0 + shift, last + shift, num_keys, left, right, BLOCK_N
    )
    num_left, num_full, num_right, full_begin, full_end = edge_blocks(
        begin, end, full_begin, full_end, BLOCK_N
    )
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for phase in tl.static_range(2):
        if phase == 0:
            count = num_left + num_right
        else:
            count = num_full
        for t in tl.range(0, count):
            if phase == 0:
                n0 = tl.where(t < num_left, begin, full_end - num_left * BLOCK_N) + t * BLOCK_N
            else:
                n0 = full_begin + t * BLOCK_N
            column = n0 + tl.arange(0, BLOCK_N)
            k = load_rows(k_base, column, k_n_stride, num_keys, HEAD_SIZE, BLOCK_D)
            v = load_rows(v_base, column, v_n_stride, num_keys, VALUE_SIZE, BLOCK_DV)
            _, grad_scores, grad_raw = tile_gradients(
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
                EDGE=phase == 0,
                HAS_SOFTCAP=HAS_SOFTCAP,
                HAS_ALIBI=HAS_ALIBI,
                HAS_DROPOUT=HAS_DROPOUT,
                MASK_TYPE=MASK_TYPE,
                PRECISION=PRECISION,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
            )
            if STORE_MASK:
                at = grad_mask_pointer + first_row * num_keys
                at = at + query.to(tl.int64)[:, None] * num_keys + column[None, :]
                inside = (query < num_queries)[:, None] & (column < num_keys)[None, :]
                tl.store(at, grad_scores.to(grad_mask_pointer.dtype.element_ty), mask=inside)
            acc = tl.dot(grad_raw.to(k.dtype), k, acc, input_precision=PRECISION)

    out = grad_q_pointer + b64 * grad_q_b_stride + head * grad_q_h_stride
    out = out + from_query * grad_q_m_stride
    acc = acc * grad_scale
    store_rows(out, query, grad_q_m_stride, num_queries, acc, HEAD_SIZE, BLOCK_D)
    if has_special(acc):
        # Once more, with zeros hiding NaN and Inf, a few columns at a time.
        for d0 in tl.range(0, BLOCK_D, CHUNK, num_stages=1, disable_licm=True):
            column_d = d0 + tl.arange(0, CHUNK)
            wanted = (column_d < HEAD_SIZE)[None, :]
            part = tl.zeros((BLOCK_M, CHUNK), tl.float32)
            for n0 in tl.range(begin, end, BLOCK_N, num_stages=1, disable_licm=True):
                column = n0 + tl.arange(0, BLOCK_N)
                k = load_rows(k_base, column, k_n_stride, num_keys, HEAD_SIZE, BLOCK_D)
                v = load_rows(v_base, column, v_n_stride, num_keys, VALUE_SIZE, BLOCK_DV)
                _, _, grad_raw = tile_gradients(
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
                rows = tl.load(
                    k_base + column.to(tl.int64)[:, None] * k_n_stride + column_d[None, :],
                    mask=(column < num_keys)[:, None] & wanted,
                    other=0.0,
                )
                part = dot_hiding(grad_raw.to(k.dtype), rows, part, PRECISION)
            tl.store(
                out + query.to(tl.int64)[:, None] * grad_q_m_stride + column_d[None, :],
                (part * grad_scale).to(grad_q_pointer.dtype.element_ty),
                mask=(query < num_queries)[:, None] & wanted,
            )
