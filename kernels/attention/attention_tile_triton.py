"""What the Triton kernels of attention share: which keys a tile of queries sees, the scores of a
tile, and products in which a zero hides NaN and Inf. Scores are in units of log 2: exp2 is what the
hardware has. attention_reference.py states what is computed."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def find_sequence(slot, bounds_pointer, num_sequences, BLOCK: tl.constexpr):
    """Packed sequences are cut into blocks each for itself: ``(sequence, block)`` of the slot, the
    sequence being num_sequences where there are more slots than blocks."""
    sequence = 0
    first = 0  # slot of the first block of the sequences from `start` on
    block = slot
    for start in range(0, num_sequences, 128):
        index = start + tl.arange(0, 128)
        inside = index < num_sequences
        begin = tl.load(bounds_pointer + index, mask=inside, other=0)
        end = tl.load(bounds_pointer + index + 1, mask=inside, other=0)
        blocks = ((end - begin + BLOCK - 1) // BLOCK).to(tl.int32)
        ends = first + tl.cumsum(blocks, 0)
        before = inside & (ends <= slot)
        sequence += tl.sum(before.to(tl.int32), 0)
        block -= tl.sum(tl.where(before, blocks, 0), 0)
        first += tl.sum(blocks, 0)
    return sequence, block


@triton.jit
def key_blocks(first, last, num_keys, left, right, BLOCK_N: tl.constexpr):
    """The keys that queries at positions first .. last see: ``(begin, end, full_begin, full_end)``,
    of which the last two enclose the blocks that all of them see whole. All but ``end`` are
    multiples of BLOCK_N."""
    begin = tl.maximum(first - left, 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(num_keys, last + right + 1)
    full_begin = tl.cdiv(tl.maximum(last - left, 0), BLOCK_N) * BLOCK_N
    full_end = tl.maximum(tl.minimum(num_keys, first + right + 1), 0) // BLOCK_N * BLOCK_N
    return begin, end, full_begin, full_end


@triton.jit
def edge_blocks(begin, end, full_begin, full_end, BLOCK: tl.constexpr):
    """``(num_left, num_full, num_right, full_begin, full_end)``: how many blocks lie before, in and
    behind the full ones, which are cut to what lies between begin and end."""
    stop = begin + tl.cdiv(tl.maximum(end - begin, 0), BLOCK) * BLOCK
    full_begin = tl.minimum(tl.maximum(full_begin, begin), stop)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), stop)
    num_left = (full_begin - begin) // BLOCK
    num_right = (stop - full_end) // BLOCK
    return num_left, (full_end - full_begin) // BLOCK, num_right, full_begin, full_end


@triton.jit
def load_rows(pointer, row, stride, num_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a matrix [num_rows, SIZE], zero outside of it: [len(row), BLOCK]."""
    column = tl.arange(0, BLOCK)
    pointers = pointer + row.to(tl.int64)[:, None] * stride + column[None, :]
    inside = (row < num_rows)[:, None]
    if SIZE != BLOCK:
        inside = inside & (column < SIZE)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_rows(pointer, row, stride, num_rows, x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    pointers = pointer + row.to(tl.int64)[:, None] * stride + column[None, :]
    inside = (row < num_rows)[:, None]
    if SIZE != BLOCK:
        inside = inside & (column < SIZE)[None, :]
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def tanh(x):
    """A polynomial (Cephes' tanhf) where the quotient of exponentials would cancel."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    e = tl.exp2(tl.abs(x) * (2 * LOG2E))
    far = 1.0 - 2.0 / (e + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * z * p, tl.where(x < 0, -far, far))


@triton.jit
def tile_scores(
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
    mask_pointer,
    mask_m_stride,
    mask_n_stride,
    EDGE: tl.constexpr,
    IS_INT8: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    MASK_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``(scores, slope of the softcap)`` of queries [M] at ``position`` and keys ``column`` [N].

    ``slope`` and ``softcap`` are in units of log 2, ``scale`` as well unless there is a softcap,
    which it is then a fraction of. EDGE: some of the keys are not visible to some of the queries.
    MASK_TYPE: 0 none, 1 bool, 2 added.
    """
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if IS_INT8:
        s = s * k_scale[None, :]
    derivative = 1.0
    if HAS_SOFTCAP:
        t = tanh(s)
        s = softcap * t
        derivative = 1.0 - t * t
    distance = position[:, None] - column[None, :]
    if HAS_ALIBI:
        s = s - slope * tl.abs(distance).to(tl.float32)
    if MASK_TYPE > 0:
        offset = query.to(tl.int64)[:, None] * mask_m_stride
        offset = offset + column.to(tl.int64)[None, :] * mask_n_stride
        inside = (query < num_queries)[:, None] & (column < num_keys)[None, :]
        mask = tl.load(mask_pointer + offset, mask=inside, other=0)
        if MASK_TYPE == 1:
            s = tl.where(mask != 0, s, -float("inf"))
        else:
            mask = mask.to(tl.float32)
            # The lowest float, a customary mask, must not become -inf: it is still visible.
            # Not tl.maximum, to which NaN is nothing.
            mask_log2 = mask * LOG2E
            s = s + tl.where(mask_log2 < LOWEST, LOWEST, mask_log2)
            s = tl.where(mask == -float("inf"), -float("inf"), s)
    if EDGE:
        visible = (distance <= left) & (distance >= -right)
        visible = visible & (column < num_keys)[None, :] & (query < num_queries)[:, None]
        s = tl.where(visible, s, -float("inf"))
    return s, derivative


@triton.jit
def has_special(x):
    """Whether a tile has NaN or Inf."""
    return tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1), 0) > 0


@triton.jit
def dot_hiding(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` where a zero in a hides NaN and Inf in b.

    Their products are counted apart: in thousands how many terms of a sum are infinite, in ones
    how many more are positive. NaN counts as one of each sign.
    """
    infinity = float("inf")
    total = tl.dot(
        a, tl.where(tl.abs(b) < infinity, b, 0.0).to(b.dtype), total, input_precision=PRECISION
    )
    plus = tl.where(b == -infinity, 0, tl.where(tl.abs(b) < infinity, 0, 1))
    minus = tl.where(b == infinity, 0, tl.where(tl.abs(b) < infinity, 0, 1))
    code = (1025 * plus + 1023 * minus).to(tl.float16)
    mirrored = (1023 * plus + 1025 * minus).to(tl.float16)
    marks = tl.dot((a > 0).to(tl.float16), code)
    marks = tl.dot((a < 0).to(tl.float16), mirrored, marks)
    count = tl.floor((marks + 512.0) / 1024.0)
    net = marks - 1024.0 * count
    special = tl.where(net > 0, infinity, -infinity)
    special = tl.where(tl.abs(net) < count, float("nan"), special)
    return total + tl.where(count > 0, special, 0.0)
