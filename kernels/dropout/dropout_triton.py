"""y = keep ? x * scale + shift : fill. A program takes BLOCK consecutive elements, one Philox call
for each eight of them; where channels share a mask bit, one call an element. Bound by bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.philox_triton import block_bits, element_bits, load_seed, seed_argument

BLOCK = 2048


@triton.jit(do_not_specialize=["seed"])
def dropout_kernel(
    x_pointer,
    y_pointer,
    seed,
    num_elements,
    channel_size,
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
        bits = block_bits(key, first, stream, BLOCK)
    else:
        bits = element_bits(key, index // channel_size, stream)
    inside = index < num_elements
    x = tl.load(x_pointer + index, mask=inside, other=0.0).to(tl.float32)
    y = x * scale
    if HAS_SHIFT:
        y += shift
    y = tl.where(bits.to(tl.int32) >= threshold, y, fill)
    tl.store(y_pointer + index, y.to(y_pointer.dtype.element_ty), mask=inside)


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
    grid = (triton.cdiv(x.numel(), BLOCK),)
    dropout_kernel[grid](
        source,
        target,
        argument,
        x.numel(),
        x.shape[mask_ndim:].numel(),
        threshold,
        stream,
        scale,
        shift,
        fill,
        HAS_SHIFT=shift != 0.0,
        SEED_IS_POINTER=is_pointer,
        PER_ELEMENT=mask_ndim == x.dim(),
        BLOCK=BLOCK,
    )
    return y if target is y else y.copy_(target)
