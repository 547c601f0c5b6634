"""Gradients of attention's keys and values: see attention_backward_triton.py."""

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
    load_rows,
    store_rows,
)


@triton.jit(do_not_specialize=["seed"])
def key_value_gradient_kernel(
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
    grad_k_pointer,
    grad_v_pointer,
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
    grad_k_b_stride,
    grad_k_h_stride,
    grad_k_n_stride,
    grad_v_b_stride,
    grad_v_h_stride,
    grad_v_n_stride,
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
    heads_per_program,
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
    """A program takes a block of keys, for ``heads_per_program`` of the heads that share them."""
    slot = tl.program_id(0) % num_blocks
    outer = tl.program_id(0) // num_blocks
    first_query = 0
    first_key = 0
    all_queries = num_queries
    num_parts = heads // heads_per_program
    part = outer % num_parts
    b = outer // num_parts
    block = slot
    sequence = b
    if IS_VARLEN:
        sequence, block = find_sequence(slot, cu_k_pointer, num_sequences, BLOCK_N)
        if sequence >= num_sequences:
            return
        first_query = tl.load(cu_q_pointer + sequence).to(tl.int32)
        end_query = tl.minimum(tl.load(cu_q_pointer + sequence + 1), num_queries)
        num_queries = end_query.to(tl.int32) - first_query
        first_key = tl.load(cu_k_pointer + sequence).to(tl.int32)
        end_key = tl.minimum(tl.load(cu_k_pointer + sequence + 1), num_keys)
        num_keys = end_key.to(tl.int32) - first_key
    b64 = b.to(tl.int64)
    key_head = (part * heads_per_program // group).to(tl.int64)
    n0 = block * BLOCK_N
    column = n0 + tl.arange(0, BLOCK_N)
    shift = 0
    if BOTTOM_RIGHT:
        shift = num_keys - num_queries
    start = tl.cast(first_key, tl.int64)
    k_base = k_pointer + b64 * k_b_stride + key_head * k_h_stride + start * k_n_stride
    v_base = v_pointer + b64 * v_b_stride + key_head * v_h_stride + start * v_n_stride
    k = load_rows(k_base, column, k_n_stride, num_keys, HEAD_SIZE, BLOCK_D)
    v = load_rows(v_base, column, v_n_stride, num_keys, VALUE_SIZE, BLOCK_DV)
    key = 0
    if HAS_DROPOUT:
        key = load_seed(seed, SEED_IS_POINTER)

    # Queries that see any of the keys, and those that see all of them.
    last_key = tl.minimum(n0 + BLOCK_N, num_keys) - 1
    begin = tl.maximum(n0 - right - shift, 0) // BLOCK_M * BLOCK_M
    end = tl.minimum(num_queries, last_key + left + 1 - shift)
    full_begin = tl.cdiv(tl.maximum(last_key - right - shift, 0), BLOCK_M) * BLOCK_M
    full_end = tl.maximum(n0 + left + 1 - shift, 0)
    # The rows behind the last query have weights of zero: they need no comparison either.
    all_full = tl.cdiv(num_queries, BLOCK_M) * BLOCK_M
    full_end = tl.where(full_end >= num_queries, all_full, full_end // BLOCK_M * BLOCK_M)
    num_left, num_full, num_right, full_begin, full_end = edge_blocks(
        begin, end, full_begin, full_end, BLOCK_M
    )
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for h in range(part * heads_per_program, (part + 1) * heads_per_program):
        head = tl.cast(h, tl.int64)
        from_query = tl.cast(first_query, tl.int64)
        q_base = q_pointer + b64 * q_b_stride + head * q_h_stride + from_query * q_m_stride
        grad_base = grad_out_pointer + b64 * grad_out_b_stride + head * grad_out_h_stride
        grad_base = grad_base + from_query * grad_out_m_stride
        first_row = (b64 * heads + head) * all_queries + from_query
        mask_base = mask_pointer + b64 * mask_b_stride + head * mask_h_stride
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(slopes_pointer + sequence * slopes_b_stride + head) * LOG2E
        z = (first_head + sequence * head_step + head).to(tl.int32)
        for phase in tl.static_range(2):
            if phase == 0:
                count = num_left + num_right
            else:
                count = num_full
            for t in tl.range(0, count):
                if phase == 0:
                    m0 = tl.where(t < num_left, begin, full_end - num_left * BLOCK_M)
                    m0 = m0 + t * BLOCK_M
                else:
                    m0 = full_begin + t * BLOCK_M
                query = m0 + tl.arange(0, BLOCK_M)
                position = query + shift
                q = load_rows(q_base, query, q_m_stride, num_queries, HEAD_SIZE, BLOCK_D)
                grad_out = load_rows(
                    grad_base, query, grad_out_m_stride, num_queries, VALUE_SIZE, BLOCK_DV
                )
                lse, delta = load_row_values(
                    lse_pointer + first_row, delta_pointer + first_row, query, num_queries
                )
                dropped, _, grad_raw = tile_gradients(
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
                acc_v = tl.dot(
                    tl.trans(dropped.to(q.dtype)), grad_out, acc_v, input_precision=PRECISION
                )
                acc_k = tl.dot(tl.trans(grad_raw.to(q.dtype)), q, acc_k, input_precision=PRECISION)

    out_head = part.to(tl.int64)
    k_out = grad_k_pointer + b64 * grad_k_b_stride + out_head * grad_k_h_stride
    k_out = k_out + start * grad_k_n_stride
    v_out = grad_v_pointer + b64 * grad_v_b_stride + out_head * grad_v_h_stride
    v_out = v_out + start * grad_v_n_stride
    acc_k = acc_k * grad_scale
    acc_v = acc_v * keep_scale
    store_rows(k_out, column, grad_k_n_stride, num_keys, acc_k, HEAD_SIZE, BLOCK_D)
    store_rows(v_out, column, grad_v_n_stride, num_keys, acc_v, VALUE_SIZE, BLOCK_DV)
    if has_special(acc_k) | has_special(acc_v):
        # Once more, with zeros hiding NaN and Inf, a few columns at a time: first those of v.
        value_chunks = tl.cdiv(BLOCK_DV, CHUNK)
        key_chunks = tl.cdiv(BLOCK_D, CHUNK)
        for c in tl.range(0, value_chunks + key_chunks, num_stages=1, disable_licm=True):
            is_value = c < value_chunks
            chunk = tl.where(is_value, c, c - value_chunks)
            column_d = chunk * CHUNK + tl.arange(0, CHUNK)
            wanted = column_d < tl.where(is_value, VALUE_SIZE, HEAD_SIZE)
            acc = tl.zeros((BLOCK_N, CHUNK), tl.float32)
            for h in range(part * heads_per_program, (part + 1) * heads_per_program):
                head = tl.cast(h, tl.int64)
                from_query = tl.cast(first_query, tl.int64)
                q_base = q_pointer + b64 * q_b_stride + head * q_h_stride
                q_base = q_base + from_query * q_m_stride
                grad_base = grad_out_pointer + b64 * grad_out_b_stride + head * grad_out_h_stride
                grad_base = grad_base + from_query * grad_out_m_stride
                first_row = (b64 * heads + head) * all_queries + from_query
                mask_base = mask_pointer + b64 * mask_b_stride + head * mask_h_stride
                slope = 0.0
                if HAS_ALIBI:
                    slope = tl.load(slopes_pointer + sequence * slopes_b_stride + head) * LOG2E
                z = (first_head + sequence * head_step + head).to(tl.int32)
                for m0 in tl.range(begin, end, BLOCK_M, num_stages=1, disable_licm=True):
                    query = m0 + tl.arange(0, BLOCK_M)
                    position = query + shift
                    q = load_rows(q_base, query, q_m_stride, num_queries, HEAD_SIZE, BLOCK_D)
                    grad_out = load_rows(
                        grad_base, query, grad_out_m_stride, num_queries, VALUE_SIZE, BLOCK_DV
                    )
                    lse, delta = load_row_values(
                        lse_pointer + first_row, delta_pointer + first_row, query, num_queries
                    )
                    dropped, _, grad_raw = tile_gradients(
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
                    weight = tl.where(is_value, dropped, grad_raw).to(q.dtype)
                    base = tl.where(is_value, grad_base, q_base)
                    stride = tl.where(is_value, grad_out_m_stride, q_m_stride)
                    rows = tl.load(
                        base + query.to(tl.int64)[:, None] * stride + column_d[None, :],
                        mask=(query < num_queries)[:, None] & wanted[None, :],
                        other=0.0,
                    )
                    acc = dot_hiding(tl.trans(weight), rows, acc, PRECISION)
            acc = acc * tl.where(is_value, keep_scale, grad_scale)
            base = tl.where(is_value, v_out, k_out)
            stride = tl.where(is_value, grad_v_n_stride, grad_k_n_stride)
            tl.store(
                base + column.to(tl.int64)[:, None] * stride + column_d[None, :],
                acc.to(grad_k_pointer.dtype.element_ty),
                mask=(column < num_keys)[:, None] & wanted[None, :],
            )
