"""What Triton's tables of tiles ask about a GPU."""

from __future__ import annotations

import functools

import torch


def chip(device: torch.device, dtype: torch.dtype) -> str:
    """The row of a table that holds for a device."""
    if device.type != "cuda":
        return "interpreter"
    if dtype == torch.float32:
        return "float32"
    if _capability(_index(device)) == (9, 0):
        return "hopper"
    return "large" if has_large_memory(device) else "small"


def has_large_memory(device: torch.device) -> bool:
    """More shared memory than the 100 KB that every chip has."""
    capability = _capability(_index(device))
    return capability == (8, 0) or capability[0] in (9, 10)


def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # of the interpreter: enough that tests have several splits
    return _num_multiprocessors(_index(device))


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else -1


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(None if index < 0 else index)


@functools.cache
def _num_multiprocessors(index: int) -> int:
    device = None if index < 0 else index
    return torch.cuda.get_device_properties(device).multi_processor_count
