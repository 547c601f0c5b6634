"""Calls into the native module: outputs are allocated here, the thread count is torch's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _backend

LARGE = 1 << 18  # elements; below, malloc recycles the block itself

native: Any = _backend.native
get_num_threads = torch.get_num_threads


def large_empty_like(x: Tensor) -> Tensor:
    """``torch.empty_like`` that recycles the memory of CPU outputs instead of mapping it anew."""
    if x.is_cpu:
        y: Tensor | None = native.empty_like(x)
        if y is not None:
            return y
    return torch.empty_like(x)


def empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x) if x.numel() < LARGE else large_empty_like(x)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A contiguous tensor of another shape, from the same memory."""
    if like.is_cpu and math.prod(shape) >= LARGE:
        y: Tensor | None = native.empty(like, shape)
        if y is not None:
            return y
    return like.new_empty(shape)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the kernels compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def column_partials(x: Tensor, num_sums: int) -> Tensor:
    """Scratch for sums over the rows of x: one row per chunk of 32 rows."""
    num_rows = x.shape[:-1].numel()
    shape = (num_sums, (num_rows + 31) // 32, x.shape[-1])
    return torch.empty(shape, dtype=compute_dtype(x), device=x.device)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """The operands as the kernels take them: contiguous, with their values in memory."""
    return [t if t is None else t.contiguous().resolve_neg() for t in tensors]
