"""Products with int8 weights: y = activation(x @ w.T * row_scale * weight_scale + bias).

A program computes a tile of y, transposed: weights are the left operand, which tensor cores take
from registers, where they are converted, and of x 16 rows (or 8) fill an instruction. int8 times
int8 is summed in int32; with other x the weights are converted to its dtype. A single row goes the
same way: nothing else converts and multiplies with so few instructions a weight. Where there are
few tiles, the sum over k is cut into splits, which a second kernel adds in order. Bound by
operations for many rows, by the bytes of the weights for few."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def converted(weight, TYPE: tl.constexpr):
    """int8 in a floating-point type, exactly. In float16 and float32 2**10 or 2**23 + 128 + weight
    by its bits, and a subtraction: the instruction that converts has a fraction of their rate.
    Triton does so in bfloat16 by itself."""
    if tl.float16 == TYPE:
        bits = ((weight ^ -128).to(tl.int16) & 0xFF) | 0x6400
        value = bits.to(tl.float16, bitcast=True) - 1152.0
    elif tl.float32 == TYPE:
        bits = ((weight ^ -128).to(tl.int32) & 0xFF) | 0x4B000000
        value = bits.to(tl.float32, bitcast=True) - 8388736.0
    else:
        value = weight.to(TYPE)
    return value


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(y < 0.0, 0.0, y)
    elif ACTIVATION == "gelu":
        y = y * 0.5 * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(u) is 2 * sigmoid(2 * u)
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def finished(
    total,
    row_scale,
    weight_scale_pointer,
    bias_pointer,
    feature,
    inside,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Scaled and shifted sums; ``feature`` broadcasts to them. Every operation is rounded."""
    y = total.to(tl.float32)
    if HAS_ROW_SCALE:
        y = y * row_scale
    y = y * tl.load(weight_scale_pointer + feature, mask=inside, other=0.0)
    if HAS_BIAS:
        y = y + tl.load(bias_pointer + feature, mask=inside, other=0.0).to(tl.float32)
    return activated(y, ACTIVATION)


@triton.jit
def product_kernel(
    x_pointer,
    weight_pointer,
    row_scale_pointer,
    weight_scale_pointer,
    bias_pointer,
    y_pointer,
    m,
    n,
    k,
    k_of_split,
    x_m_stride,
    weight_n_stride,
    weight_k_stride,
    IS_FINISHED: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y (m, n), or without IS_FINISHED the sums of splits: (splits, m, n). x has dense rows."""
    # Neighbouring programs share x or weights in the cache: GROUP blocks of features by all rows.
    program = tl.program_id(0)
    num_m = tl.cdiv(m, BLOCK_M)
    num_n = tl.cdiv(n, BLOCK_N)
    group = program // (GROUP * num_m)
    height = tl.minimum(num_n - group * GROUP, GROUP)
    block_n = group * GROUP + program % (GROUP * num_m) % height
    block_m = program % (GROUP * num_m) // height
    split = tl.program_id(1)

    feature = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    has_feature, has_row = feature < n, row < m
    begin = split.to(tl.int64) * k_of_split
    column = begin + tl.arange(0, BLOCK_K)
    weights = (
        weight_pointer + feature[:, None] * weight_n_stride + column[None, :] * weight_k_stride
    )
    xs = x_pointer + row[None, :] * x_m_stride + column[:, None]
    is_int8: tl.constexpr = x_pointer.dtype.element_ty == tl.int8
    sum_type: tl.constexpr = tl.int32 if is_int8 else tl.float32
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=sum_type)
    size = tl.minimum(k - begin, k_of_split).to(tl.int32)
    for first in range(0, size, BLOCK_K):
        if EVEN_K:
            weight = tl.load(weights, mask=has_feature[:, None], other=0)
            x = tl.load(xs, mask=has_row[None, :], other=0)
        else:
            inside = tl.arange(0, BLOCK_K) < size - first
            weight = tl.load(weights, mask=has_feature[:, None] & inside[None, :], other=0)
            x = tl.load(xs, mask=has_row[None, :] & inside[:, None], other=0)
        weights += tl.cast(BLOCK_K, tl.int64) * weight_k_stride
        xs += BLOCK_K
        weight = converted(weight, x_pointer.dtype.element_ty)
        total = tl.dot(weight, x, total, input_precision=PRECISION, out_dtype=sum_type)
    inside = has_feature[:, None] & has_row[None, :]
    if IS_FINISHED:
        row_scale = 1.0
        if HAS_ROW_SCALE:
            row_scale = tl.load(row_scale_pointer + row, mask=has_row, other=0.0)[None, :]
        y = finished(
            total,
            row_scale,
            weight_scale_pointer,
            bias_pointer,
            feature[:, None],
            has_feature[:, None],
            HAS_ROW_SCALE,
            HAS_BIAS,
            ACTIVATION,
        )
    else:
        y = total
        y_pointer += split.to(tl.int64) * m * n
    to = y_pointer + row[None, :] * n + feature[:, None]
    tl.store(to, y.to(y_pointer.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(
    partial_pointer,
    row_scale_pointer,
    weight_scale_pointer,
    bias_pointer,
    y_pointer,
    m,
    n,
    splits,
    IS_FINISHED: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y (m, n) from the sums of splits (splits, m, n), added in their order."""
    row = tl.program_id(1).to(tl.int64)
    feature = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = feature < n
    partial = partial_pointer + row * n + feature
    total = tl.load(partial, mask=inside, other=0)
    for _ in range(1, splits):
        partial += tl.cast(m, tl.int64) * n
        total += tl.load(partial, mask=inside, other=0)
    y = total
    if IS_FINISHED:
        row_scale = 1.0
        if HAS_ROW_SCALE:
            row_scale = tl.load(row_scale_pointer + row)
        y = finished(
            total,
            row_scale,
            weight_scale_pointer,
            bias_pointer,
            feature,
            inside,
            HAS_ROW_SCALE,
            HAS_BIAS,
            ACTIVATION,
        )
    tl.store(y_pointer + row * n + feature, y.to(y_pointer.dtype.element_ty), mask=inside)
