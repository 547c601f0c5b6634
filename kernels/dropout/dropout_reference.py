"""Dropout in plain torch: the specification of every backend, and the path for devices and dtypes
without a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.philox_reference import element_bits, score_bits


def keep_mask_reference(
    shape: torch.Size | tuple[int, ...],
    seed: int | Tensor,
    threshold: int,
    stream: int,
    device: torch.device,
) -> Tensor:
    """bool of ``shape``: True where the element's 16 bits are at least ``threshold``."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.int64, device=device).view(shape)
    if isinstance(seed, Tensor):
        seed = seed.to(device)
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
