"""A program holds one quantization block in registers, or several short ones. Longer blocks are cut
into chunks, so that one block alone uses the whole GPU: one kernel for the largest values of every
chunk, one that reads them all and quantizes a chunk. Bound by bytes.

Largest values are integers, the bits of floats, which have the same order with Inf and NaN at the
end; division is IEEE; adding and subtracting 1.5 * 2**23 rounds halves to even."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch_triton import Launch, Plans, kind_of, launch

_plans = Plans()
MAX_COLUMNS = 16384
CHUNK = 8192
MAX_CHUNKS = 1024  # of a block
_ROUND = tl.constexpr(12582912.0)
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def rounded(quotient):
    """The nearest integer, halves to even, of a number cut to where every result is clamped."""
    return (tl.minimum(tl.maximum(quotient, -1024.0), 1024.0) + _ROUND) - _ROUND


@triton.jit
def load_values(x_pointer, smooth_pointer, offset, column, inside, HAS_SMOOTH: tl.constexpr):
    value = tl.load(x_pointer + offset, mask=inside, other=0.0).to(tl.float32)
    if HAS_SMOOTH:
        value = value * tl.load(smooth_pointer + column, mask=inside, other=0.0)
    return value


@triton.jit
def extremes(value, AXIS: tl.constexpr):
    """The bits of the largest value above zero, and those of the largest below it, negated."""
    bits = value.to(tl.int32, bitcast=True)
    low = tl.where(bits < 0, bits & 0x7FFFFFFF, 0)
    return tl.max(tl.maximum(bits, 0), axis=AXIS), tl.max(low, axis=AXIS)


@triton.jit
def step_of(
    scale_in_pointer, index, high, low, mask, SCALE_IN: tl.constexpr, SYMMETRIC: tl.constexpr
):
    """(scale, zero point, whether all is finite) of blocks; SCALE_IN: 0 none, 1 one, 2 of each."""
    is_finite = tl.maximum(high, low) < _INFINITY
    high_value = tl.where(is_finite, high, 0).to(tl.float32, bitcast=True)
    low_value = tl.where(is_finite, low, 0).to(tl.float32, bitcast=True)
    if SCALE_IN == 1:
        scale = tl.load(scale_in_pointer) + tl.zeros_like(high_value)
    elif SCALE_IN == 2:
        scale = tl.load(scale_in_pointer + index, mask=mask)
    elif SYMMETRIC:
        scale = tl.math.div_rn(tl.maximum(high_value, low_value), 127.0)
    else:
        scale = tl.math.div_rn(high_value * 0.5 + low_value * 0.5, 127.5)
    scale = tl.where(scale == 0.0, 1.0, scale)
    is_finite = is_finite & (scale == scale)
    scale = tl.where(is_finite, scale, 1.0)
    zero = tl.zeros_like(scale)
    if not SYMMETRIC:
        zero = -128.0 - rounded(tl.math.div_rn(-low_value, scale))
        zero = tl.where(is_finite, tl.minimum(tl.maximum(zero, -128.0), 127.0), 0.0)
    return scale, zero, is_finite


@triton.jit
def quantized(value, scale, zero, is_finite, SYMMETRIC: tl.constexpr):
    quotient = rounded(tl.math.div_rn(tl.where(is_finite, value, 0.0), scale))
    if SYMMETRIC:
        quotient = tl.minimum(tl.maximum(quotient, -127.0), 127.0)
    else:
        quotient = tl.minimum(tl.maximum(quotient + zero, -128.0), 127.0)
    return tl.where(is_finite, quotient, 0.0).to(tl.int32).to(tl.int8)


@triton.jit
def block_kernel(
    x_pointer,
    scale_in_pointer,
    smooth_pointer,
    values_pointer,
    scale_pointer,
    zero_point_pointer,
    num_blocks,
    blocks_per_row,
    row_size,
    block_size,
    SCALE_IN: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row = index // blocks_per_row
    exists = index < num_blocks
    place = tl.arange(0, COLUMNS)[None, :]
    column = ((index - row * blocks_per_row) * block_size)[:, None] + place
    inside = exists[:, None] & (place < block_size) & (column < row_size)
    offset = (row * row_size)[:, None] + column
    value = load_values(x_pointer, smooth_pointer, offset, column, inside, HAS_SMOOTH)
    high, low = extremes(value, 1)
    scale, zero, is_finite = step_of(
        scale_in_pointer, index, high, low, exists, SCALE_IN, SYMMETRIC
    )
    tl.store(scale_pointer + index, tl.where(is_finite, scale, float("nan")), mask=exists)
    if not SYMMETRIC:
        tl.store(zero_point_pointer + index, zero.to(tl.int32), mask=exists)
    result = quantized(value, scale[:, None], zero[:, None], is_finite[:, None], SYMMETRIC)
    tl.store(values_pointer + offset, result, mask=inside)


@triton.jit
def chunk_extremes_kernel(
    x_pointer,
    smooth_pointer,
    extremes_pointer,
    blocks_per_row,
    row_size,
    block_size,
    chunks_per_block,
    parts_per_chunk,
    HAS_SMOOTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    index = program // chunks_per_block
    first = (program - index * chunks_per_block) * parts_per_chunk * COLUMNS
    row = index // blocks_per_row
    begin = (index - row * blocks_per_row) * block_size
    high = tl.zeros((COLUMNS,), dtype=tl.int32)
    low = tl.zeros((COLUMNS,), dtype=tl.int32)
    for part in range(parts_per_chunk):
        place = first + part * COLUMNS + tl.arange(0, COLUMNS)
        column = begin + place
        inside = (place < block_size) & (column < row_size)
        offset = row * row_size + column
        value = load_values(x_pointer, smooth_pointer, offset, column, inside, HAS_SMOOTH)
        bits = value.to(tl.int32, bitcast=True)
        high = tl.maximum(high, bits)
        low = tl.maximum(low, tl.where(bits < 0, bits & 0x7FFFFFFF, 0))
    tl.store(extremes_pointer + program * 2, tl.max(high, axis=0))
    tl.store(extremes_pointer + program * 2 + 1, tl.max(low, axis=0))


@triton.jit
def chunk_values_kernel(
    x_pointer,
    scale_in_pointer,
    smooth_pointer,
    values_pointer,
    scale_pointer,
    zero_point_pointer,
    extremes_pointer,
    blocks_per_row,
    row_size,
    block_size,
    chunks_per_block,
    parts_per_chunk,
    SCALE_IN: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    index = program // chunks_per_block
    chunk = program - index * chunks_per_block
    chunks = tl.arange(0, CHUNKS)
    pointers = extremes_pointer + (index * chunks_per_block + chunks) * 2
    high = tl.max(tl.load(pointers, mask=chunks < chunks_per_block, other=0), axis=0)
    low = tl.max(tl.load(pointers + 1, mask=chunks < chunks_per_block, other=0), axis=0)
    scale, zero, is_finite = step_of(scale_in_pointer, index, high, low, None, SCALE_IN, SYMMETRIC)
    if chunk == 0:
        tl.store(scale_pointer + index, tl.where(is_finite, scale, float("nan")))
        if not SYMMETRIC:
            tl.store(zero_point_pointer + index, zero.to(tl.int32))
    row = index // blocks_per_row
    begin = (index - row * blocks_per_row) * block_size
    for part in range(parts_per_chunk):
        place = (chunk * parts_per_chunk + part) * COLUMNS + tl.arange(0, COLUMNS)
        column = begin + place
        inside = (place < block_size) & (column < row_size)
        offset = row * row_size + column
        value = load_values(x_pointer, smooth_pointer, offset, column, inside, HAS_SMOOTH)
        result = quantized(value, scale, zero, is_finite, SYMMETRIC)
        tl.store(values_pointer + offset, result, mask=inside)


def block_tile(size: int) -> tuple[int, int, int]:
    """Blocks and columns of a program, and its warps: about 16 elements a thread."""
    columns = max(16, triton.next_power_of_2(size))
    blocks = max(1, 2048 // columns)
    return blocks, columns, max(4, min(16, columns // 512))


def quantize_int8_triton(
    x: Tensor, scale: Tensor | None, smooth: Tensor | None, block_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``quantize_int8_reference``."""
    x = x.contiguous()
    row_size = x.shape[-1]
    shape = (*x.shape[:-1], -(-row_size // block_size))
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    new_scale = torch.empty(shape, dtype=torch.float32, device=x.device)
    zero_point = torch.empty(0 if symmetric else shape, dtype=torch.int32, device=x.device)
    if x.numel() == 0:
        return values, new_scale, zero_point
    scale = None if scale is None else scale.contiguous()
    smooth = None if smooth is None else smooth.contiguous()
    tensors = x, scale, smooth, values, new_scale, zero_point
    key = (*map(kind_of, tensors), block_size)
    if not _plans.run(key, tensors):
        _plans.keep(key, tensors, *_launch(*tensors, min(block_size, row_size)))
    return values, new_scale, zero_point


def _launch(
    x: Tensor,
    scale: Tensor | None,
    smooth: Tensor | None,
    values: Tensor,
    new_scale: Tensor,
    zero_point: Tensor,
    block_size: int,
) -> tuple[list[Launch], list[Tensor]]:
    """What is launched, and its temporaries. ``zero_point``: empty if symmetric."""
    symmetric = zero_point.numel() == 0
    unused = new_scale
    blocks = {
        "blocks_per_row": new_scale.shape[-1],
        "row_size": x.shape[-1],
        "block_size": block_size,
    }
    inputs = {
        "x_pointer": x,
        "smooth_pointer": unused if smooth is None else smooth,
        "HAS_SMOOTH": smooth is not None,
    }
    outputs = {
        "scale_in_pointer": unused if scale is None else scale,
        "values_pointer": values,
        "scale_pointer": new_scale,
        "zero_point_pointer": unused if symmetric else zero_point,
        "SCALE_IN": 0 if scale is None else 1 if scale.numel() == 1 else 2,
        "SYMMETRIC": symmetric,
    }
    num_blocks = new_scale.numel()
    if block_size <= MAX_COLUMNS:
        num_together, columns, num_warps = block_tile(block_size)
        made = launch(
            block_kernel,
            (triton.cdiv(num_blocks, num_together),),
            {
                **inputs,
                **outputs,
                **blocks,
                "num_blocks": num_blocks,
                "BLOCKS": num_together,
                "COLUMNS": columns,
            },
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
        return [made], []
    num_parts = triton.cdiv(block_size, CHUNK)
    parts_per_chunk = triton.cdiv(num_parts, MAX_CHUNKS)
    chunks = triton.cdiv(num_parts, parts_per_chunk)
    found = torch.empty((num_blocks, chunks, 2), dtype=torch.int32, device=x.device)
    cut = {
        **blocks,
        "chunks_per_block": chunks,
        "parts_per_chunk": parts_per_chunk,
        "COLUMNS": CHUNK,
        "extremes_pointer": found,
    }
    grid = (num_blocks * chunks,)
    last = {**inputs, **outputs, **cut, "CHUNKS": triton.next_power_of_2(chunks)}
    return [
        launch(kernel, grid, arguments, num_warps=8, enable_fp_fusion=False)
        for kernel, arguments in (
            (chunk_extremes_kernel, {**inputs, **cut}),
            (chunk_values_kernel, last),
        )
    ], [found]
