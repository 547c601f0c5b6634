"""The forward pass of attention: the online softmax, and the sum of its splits.

A program takes a block of queries of one head over the keys they see, first the blocks at the edges
of what is visible, then the full ones, which need no comparison. With a few queries (a decoding
step) the query heads that share a key head are the rows of one program, and the keys are cut into
splits that a second kernel combines: keys are then read once, by all of the GPU. Bound by tensor
cores and exponentials, for a few queries by the bytes of keys and values.
Sources: Dao 2023 (FlashAttention-2), Dao et al. 2023 (Flash-Decoding).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.philox_triton import load_seed, score_bits
from .attention_tile_triton import (
    LN2,
    LOG2E,
    dot_hiding,
    edge_blocks,
    find_sequence,
    has_special,
    key_blocks,
    load_rows,
    tile_scores,
)


@triton.jit(do_not_specialize=["seed"])
def forward_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    out_pointer,
    lse_pointer,
    mask_pointer,
    slopes_pointer,
    sinks_pointer,
    cu_q_pointer,
    cu_k_pointer,
    lengths_pointer,
    k_scale_pointer,
    v_scale_pointer,
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
    out_b_stride,
    out_h_stride,
    out_m_stride,
    mask_b_stride,
    mask_h_stride,
    mask_m_stride,
    mask_n_stride,
    slopes_b_stride,
    k_scale_b_stride,
    k_scale_h_stride,
    k_scale_n_stride,
    v_scale_b_stride,
    v_scale_h_stride,
    v_scale_n_stride,
    batch,
    heads,
    group,
    num_queries,
    num_keys,
    num_blocks,
    num_sequences,
    num_splits,
    threshold,
    keep_scale,
    scale,
    softcap,
    left,
    right,
    BOTTOM_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    MASK_TYPE: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_INT8: tl.constexpr,
    IS_PACKED: tl.constexpr,
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
    """A row is a query; if IS_PACKED, ``group`` rows are a query, one for each of the heads that
    share a key head. ``num_splits`` results are written one behind the other."""
    slot = tl.program_id(0) % num_blocks
    outer = tl.program_id(0) // num_blocks
    split = tl.program_id(1)
    all_queries = num_queries
    first_query = 0
    first_key = 0
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
        b = tl.program_id(0) * 0
    else:
        block = num_blocks - 1 - slot  # a causal mask makes the last blocks the longest
        sequence = 0
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if IS_PACKED:
        num_rows = num_queries * group
        query = row // group
        b = outer // (heads // group)
        sequence = b
        key_head = outer % (heads // group)
        head = key_head * group + row % group
        first = block * BLOCK_M // group
        last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // group, num_queries - 1)
    else:
        num_rows = num_queries
        query = row
        if not IS_VARLEN:
            b = outer // heads
            sequence = b
        head = outer % heads
        key_head = head // group
        first = block * BLOCK_M
        last = tl.minimum(first + BLOCK_M, num_queries) - 1
    if HAS_LENGTHS:
        num_keys = tl.minimum(tl.load(lengths_pointer + b), num_keys).to(tl.int32)
    shift = 0
    if BOTTOM_RIGHT:
        shift = num_keys - num_queries
    position = query + shift
    b64 = tl.cast(b, tl.int64)
    head64 = tl.cast(head, tl.int64)
    key_head64 = tl.cast(key_head, tl.int64)

    q_base = q_pointer + b64 * q_b_stride
    q_offset = (query + first_query).to(tl.int64) * q_m_stride + head64 * q_h_stride
    column_d = tl.arange(0, BLOCK_D)
    q = tl.load(
        q_base + q_offset[:, None] + column_d[None, :],
        mask=(row < num_rows)[:, None] & (column_d < HEAD_SIZE)[None, :],
        other=0.0,
    )
    start = tl.cast(first_key, tl.int64)
    k_base = k_pointer + b64 * k_b_stride + key_head64 * k_h_stride + start * k_n_stride
    v_base = v_pointer + b64 * v_b_stride + key_head64 * v_h_stride + start * v_n_stride
    k_scale_base = k_scale_pointer + b64 * k_scale_b_stride + key_head64 * k_scale_h_stride
    v_scale_base = v_scale_pointer + b64 * v_scale_b_stride + key_head64 * v_scale_h_stride
    mask_base = mask_pointer + b64 * mask_b_stride + head64 * mask_h_stride
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_pointer + sequence * slopes_b_stride + head) * LOG2E
        if IS_PACKED:
            slope = slope[:, None]
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks_pointer + head) * LOG2E + tl.zeros((BLOCK_M,), tl.float32)
        if split == 0:
            m = sink
            total = tl.where(sink == -float("inf"), 0.0, 1.0)
    if HAS_DROPOUT:
        key = load_seed(seed, SEED_IS_POINTER)
        z = first_head + sequence * head_step + head

    begin, end, full_begin, full_end = key_blocks(
        first + shift, last + shift, num_keys, left, right, BLOCK_N
    )
    part = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), num_splits) * BLOCK_N
    begin = begin + split * part
    end = tl.minimum(end, begin + part)
    num_left, num_full, num_right, full_begin, full_end = edge_blocks(
        begin, end, full_begin, full_end, BLOCK_N
    )
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
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
            k_scale = 1.0
            if IS_INT8:
                inside = column < num_keys
                at = column.to(tl.int64)
                k_scale = tl.load(k_scale_base + at * k_scale_n_stride, mask=inside, other=0.0)
                v_scale = tl.load(v_scale_base + at * v_scale_n_stride, mask=inside, other=0.0)
                k = k.to(q.dtype)
                v = v.to(q.dtype)
            s, _ = tile_scores(
                q,
                k,
                k_scale,
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
                mask_base,
                mask_m_stride,
                mask_n_stride,
                EDGE=phase == 0,
                IS_INT8=IS_INT8,
                HAS_SOFTCAP=HAS_SOFTCAP,
                HAS_ALIBI=HAS_ALIBI,
                MASK_TYPE=MASK_TYPE,
                PRECISION=PRECISION,
            )
            m_new = tl.maximum(m, tl.max(s, 1))
            if phase == 0 or MASK_TYPE > 0:
                top = tl.where(m_new == -float("inf"), 0.0, m_new)
            else:
                top = m_new
            p = tl.exp2(s - top[:, None])
            shrink = tl.exp2(m - top)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            if HAS_DROPOUT:
                bits = score_bits(key, row, n0, z, 0, BLOCK_M, BLOCK_N)
                p = tl.where(bits.to(tl.int32) >= threshold, p, 0.0)
            if IS_INT8:
                p = tl.where(p == 0.0, 0.0, p * v_scale[None, :])
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            m = m_new

    top = tl.where(m == -float("inf"), 0.0, m)
    lse = tl.where(total == 0.0, -float("inf"), (top + tl.log2(total)) * LN2)
    share = keep_scale / tl.where(total == 0.0, 1.0, total)
    lse_base = lse_pointer + split.to(tl.int64) * batch * heads * all_queries
    lse_row = (b64 * heads + head64) * all_queries + first_query + query
    tl.store(lse_base + lse_row, lse, mask=row < num_rows)
    out_base = out_pointer + split.to(tl.int64) * batch * out_b_stride + b64 * out_b_stride
    out_row = (query + first_query).to(tl.int64) * out_m_stride + head64 * out_h_stride
    if has_special(acc):
        # NaN or Inf: once more, with zero weights hiding them, a few columns at a time.
        for d0 in tl.range(0, BLOCK_DV, CHUNK, num_stages=1, disable_licm=True):
            chunk = d0 + tl.arange(0, CHUNK)
            wanted = (chunk < VALUE_SIZE)[None, :]
            part_acc = tl.zeros((BLOCK_M, CHUNK), tl.float32)
            for n0 in tl.range(begin, end, BLOCK_N, num_stages=1, disable_licm=True):
                column = n0 + tl.arange(0, BLOCK_N)
                inside = column < num_keys
                at = column.to(tl.int64)
                k = load_rows(k_base, column, k_n_stride, num_keys, HEAD_SIZE, BLOCK_D)
                v = tl.load(
                    v_base + at[:, None] * v_n_stride + chunk[None, :],
                    mask=inside[:, None] & wanted,
                    other=0.0,
                )
                k_scale = 1.0
                if IS_INT8:
                    k_scale = tl.load(k_scale_base + at * k_scale_n_stride, mask=inside, other=0.0)
                    v_scale = tl.load(v_scale_base + at * v_scale_n_stride, mask=inside, other=0.0)
                    k = k.to(q.dtype)
                    v = (v.to(tl.float32) * v_scale[:, None]).to(q.dtype)
                s, _ = tile_scores(
                    q,
                    k,
                    k_scale,
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
                    mask_base,
                    mask_m_stride,
                    mask_n_stride,
                    EDGE=True,
                    IS_INT8=IS_INT8,
                    HAS_SOFTCAP=HAS_SOFTCAP,
                    HAS_ALIBI=HAS_ALIBI,
                    MASK_TYPE=MASK_TYPE,
                    PRECISION=PRECISION,
                )
                p = tl.exp2(s - top[:, None])
                if HAS_DROPOUT:
                    bits = score_bits(key, row, n0, z, 0, BLOCK_M, BLOCK_N)
                    p = tl.where(bits.to(tl.int32) >= threshold, p, 0.0)
                part_acc = dot_hiding(p.to(v.dtype), v, part_acc, PRECISION)
            tl.store(
                out_base + out_row[:, None] + chunk[None, :],
                (part_acc * share[:, None]).to(out_pointer.dtype.element_ty),
                mask=(row < num_rows)[:, None] & wanted,
            )

    else:
        column_dv = tl.arange(0, BLOCK_DV)
        tl.store(
            out_base + out_row[:, None] + column_dv[None, :],
            (acc * share[:, None]).to(out_pointer.dtype.element_ty),
            mask=(row < num_rows)[:, None] & (column_dv < VALUE_SIZE)[None, :],
        )


@triton.jit
def combine_kernel(
    parts_pointer,
    part_lse_pointer,
    out_pointer,
    lse_pointer,
    out_b_stride,
    out_h_stride,
    out_m_stride,
    heads,
    num_queries,
    num_rows,
    num_splits,
    VALUE_SIZE: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """A program takes one row; parts [num_splits, num_rows, VALUE_SIZE] are divided by their own
    denominators."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS).to(tl.int64)
    column = tl.arange(0, BLOCK_DV)
    inside = split < num_splits
    lse = tl.load(part_lse_pointer + split * num_rows + row, mask=inside, other=-float("inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp2((lse - top) * LOG2E)
    total = tl.sum(weight, 0)
    tl.store(lse_pointer + row, tl.where(total == 0.0, -float("inf"), top + tl.log2(total) * LN2))
    used = inside & (weight != 0.0)
    part = tl.load(
        parts_pointer + (split[:, None] * num_rows + row) * VALUE_SIZE + column[None, :],
        mask=used[:, None] & (column < VALUE_SIZE)[None, :],
        other=0.0,
    )
    share = weight / tl.where(total == 0.0, 1.0, total)
    out = tl.sum(tl.where(used[:, None], part * share[:, None], 0.0), 0)
    query = row % num_queries
    head = row // num_queries % heads
    b = row // num_queries // heads
    base = out_pointer + b * out_b_stride + head * out_h_stride + query * out_m_stride
    tl.store(base + column, out.to(out_pointer.dtype.element_ty), mask=column < VALUE_SIZE)
