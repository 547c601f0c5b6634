"""The device of the backend under test, a GPU where there is one.

What tests compute with and what they expect is made on the CPU; what they call gets it here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

CPU = torch.device("cpu")
_device = CPU


@contextmanager
def use_device(device: torch.device) -> Iterator[None]:
    """A backward pass runs in the thread of the test: ``use_backend`` does not hold in another."""
    global _device
    _device = device
    try:
        with torch.autograd.set_multithreading_enabled(device == CPU):
            yield
    finally:
        _device = CPU


def current_device() -> torch.device:
    return _device


def to_device(x: Tensor) -> Tensor:
    """A differentiable copy with the same strides, NaN in the gaps, as aligned; x on the CPU."""
    if _device == CPU or x.device != CPU or type(x) not in (Tensor, torch.nn.Parameter):
        return x
    offset = x.storage_offset() % 16
    y = x.to(_device)
    if y.stride() == x.stride() and offset == 0:
        return y
    shape = x.shape
    for d, stride in enumerate(x.stride()):
        x = x.narrow(d, 0, 1) if stride == 0 and shape[d] > 1 else x
    steps = ((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    size = offset + (1 + sum(steps) if x.numel() else 0)
    fill = torch.nan if x.is_floating_point() else 1
    memory = torch.full((size,), fill, dtype=x.dtype, device=_device)
    return memory.as_strided(x.shape, x.stride(), offset).copy_(x).expand(shape)


def to_same(place: torch.nn.Module | torch.device, values: Any) -> Any:
    """The values with tensors on a device, or on that of a module; one that is there twice stays
    one."""
    device = next(place.parameters()).device if isinstance(place, torch.nn.Module) else place
    moved: dict[int, Tensor] = {}
    return tree_map_only(Tensor, lambda t: moved.setdefault(id(t), t.to(device)), values)


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on copies of its operands, and its results on the CPU.

    Seeds stay, and results do where all operands are on the device: the test is about layouts.
    """

    @functools.wraps(function)
    def moved(*arguments: Any, **keywords: Any) -> Any:
        if _device == CPU:
            return function(*arguments, **keywords)
        came_from_cpu = False

        def move(x: Tensor) -> Tensor:
            nonlocal came_from_cpu
            y = to_device(x)
            came_from_cpu |= y is not x
            return y

        seed = {"seed": keywords.pop("seed")} if "seed" in keywords else {}
        arguments, keywords = tree_map_only(Tensor, move, (arguments, keywords))
        results = function(*arguments, **keywords, **seed)
        return tree_map_only(Tensor, Tensor.cpu, results) if came_from_cpu else results

    return moved
