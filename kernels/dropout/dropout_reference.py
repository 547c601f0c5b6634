"""Dropout in plain torch: the specification of every backend, and the path for devices and dtypes
without a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.philox_reference import element_bits, score_bits, shard_of


def keep_mask_reference(
    shape: torch.Size | tuple[int, ...],
    seed: int | Tensor,
    threshold: int,
    stream: int,
    device: torch.device,
) -> Tensor:
    """bool of ``shape``: True where the element's 16 bits are at least ``threshold``.

    Args:
        seed: an int or a tensor of one int64; for a shard of a larger tensor (2,): and the index
            of its first element, or (2 + len(shape),): and the strides of the whole as well.
    """
    if isinstance(seed, Tensor):
        seed = seed.to(device)
    seed, place = shard_of(seed)
    if place is None or len(place) == 1:
        size = torch.Size(shape).numel()
        index = torch.arange(size, dtype=torch.int64, device=device).view(shape)
    else:
        index = torch.zeros(shape, dtype=torch.int64, device=device)
        for dim, size in enumerate(shape):
            along = torch.arange(size, device=device) * place[1 + dim]
            index = index + along.view(-1, *(1,) * (len(shape) - 1 - dim))
    if place is not None:
        index = index + place[0]
    return element_bits(seed, index, stream) >= threshold


def attention_mask_reference(
    shape: torch.Size | tuple[int, ...], seed: int | Tensor, threshold: int, device: torch.device
) -> Tensor:
    """The same for attention scores (..., L, S): True where a score is kept."""
    *batch, num_rows, num_columns = shape
    batch_head = torch.arange(torch.Size(batch).numel(), device=device)[:, None, None]
    row = torch.arange(num_rows, device=device)[:, None]
    column = torch.arange(num_columns, device=device)
    if isinstance(seed, Tensor):
        seed = seed.to(device)
    return (score_bits(seed, row, column, batch_head) >= threshold).view(shape)


def dropout_reference(
    x: Tensor,
    seed: int | Tensor,
    threshold: int,
    stream: int,
    scale: float,
    shift: float,
    fill: float,
    mask_ndim: int,
) -> Tensor:
    """``keep ? x * scale + shift : fill``; the first ``mask_ndim`` dimensions index the mask."""
    mask = keep_mask_reference(x.shape[:mask_ndim], seed, threshold, stream, x.device)
    mask = mask.view(x.shape[:mask_ndim] + (1,) * (x.dim() - mask_ndim))
    compute = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    kept = x.to(compute) * scale
    if shift != 0.0:
        kept = kept + shift
    y = torch.where(mask, kept, torch.full((), fill, dtype=compute, device=x.device))
    return torch.empty_like(x).copy_(y)
