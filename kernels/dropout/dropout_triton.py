"""y = keep ? x * scale + shift : fill. A program takes BLOCK consecutive elements, one Philox call
for each eight of them; where channels share a mask bit, one call an element. Bound by bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.philox_triton import (
    block_bits,
    element_bits,
    load_seed,
    seed_argument,
    shard_argument,
)

BLOCK = 2048


@triton.jit(do_not_specialize=["seed"])
def dropout_kernel(
    x_pointer,
    y_pointer,
    seed,
    num_elements,
    channel_size,
    first_index,
    row_size,
    row_step,
    threshold,
    stream,
    scale,
    shift,
    fill,
    HAS_SHIFT: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    PER_ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    key = load_seed(seed, SEED_IS_POINTER)
    if PER_ELEMENT:
        bits = block_bits(key, first_index + first, stream, BLOCK)
    else:
        number = index // channel_size
        number = first_index + number // row_size * row_step + number % row_size
        bits = element_bits(key, number, stream)
    inside = index < num_elements
    x = tl.load(x_pointer + index, mask=inside, other=0.0).to(tl.float32)
    y = x * scale
    if HAS_SHIFT:
        y += shift
    y = tl.where(bits.to(tl.int32) >= threshold, y, fill)
    tl.store(y_pointer + index, y.to(y_pointer.dtype.element_ty), mask=inside)


def _rows_of_shard(shape: torch.Size, place: list[int]) -> tuple[int, int, int]:
    """``(first, size, step)``: mask indices are ``first + i // size * step + i % size``, where the
    strides of the whole tensor allow it: those of a shard of the first dimension and one more."""
    size, rows, first, step = 1, 1, place[0], 0
    strides = place[1:] or list(torch.empty(shape, device="meta").stride())
    for length, stride in reversed(list(zip(shape, strides, strict=True))):
        if length == 1:
            continue
        if step == 0 and stride == size:
            size *= length
        elif step == 0 or stride == step * rows:
            step, rows = (stride, length) if step == 0 else (step, rows * length)
        else:
            raise RuntimeError(
                f"dropout: Triton has shards of two dimensions at most, got {tuple(shape)} with "
                f"strides {tuple(strides)} of the whole tensor"
            )
    return first, size, step


def dropout_triton(
    x: Tensor,
    seed: int | Tensor,
    threshold: int,
    stream: int,
    scale: float,
    shift: float,
    fill: float,
    mask_ndim: int,
) -> Tensor:
    """See ``dropout_reference``. Strided input is copied; the result has the strides of x."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    source = x.contiguous()
    target = y if y.is_contiguous() else torch.empty_like(source)
    argument, is_pointer = seed_argument(seed)
    first_index, row_size, row_step = _rows_of_shard(x.shape[:mask_ndim], shard_argument(seed))
    is_whole = row_size == x.shape[:mask_ndim].numel() and first_index % 8 == 0
    grid = (triton.cdiv(x.numel(), BLOCK),)
    dropout_kernel[grid](
        source,
        target,
        argument,
        x.numel(),
        x.shape[mask_ndim:].numel(),
        first_index,
        row_size,
        row_step,
        threshold,
        stream,
        scale,
        shift,
        fill,
        HAS_SHIFT=shift != 0.0,
        SEED_IS_POINTER=is_pointer,
        PER_ELEMENT=mask_ndim == x.dim() and is_whole,
        BLOCK=BLOCK,
        enable_fp_fusion=False,  # as on every backend: multiply and add round separately
    )
    return y if target is y else y.copy_(target)
