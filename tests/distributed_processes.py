"""Two processes for a test: NCCL where there are two GPUs, else gloo on the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

RANKS = 2
ON_GPUS = torch.cuda.device_count() >= RANKS
DEVICE = "cuda" if ON_GPUS else "cpu"

needs_processes = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


def _in_process(rank: int, worker: Callable[[int], None], store: str) -> None:
    torch.set_num_threads(1)
    if ON_GPUS:
        torch.cuda.set_device(rank)
        torch.set_default_device(DEVICE)
    name = "nccl" if ON_GPUS else "gloo"
    dist.init_process_group(
        name, f"file://{store}", timedelta(seconds=60), world_size=RANKS, rank=rank
    )
    worker(rank)
    dist.barrier()
    os._exit(0)  # gloo's threads abort one exit in twelve


def in_two_processes(worker: Callable[[int], None], folder: Path) -> None:
    """Call ``worker(rank)`` in each; fails where one of them fails."""
    multiprocessing.spawn(_in_process, (worker, str(folder / "store")), nprocs=RANKS)


@functools.cache
def mesh(*shape: int) -> Any:
    """Of one dimension by default, with a name for each of two."""
    from torch.distributed.device_mesh import init_device_mesh

    names = ("data", "tensor")[2 - len(shape) :] if shape else ("tensor",)
    return init_device_mesh(DEVICE, shape or (RANKS,), mesh_dim_names=names)


def seeded_randn(seed: int, *shape: int) -> Tensor:
    """The same numbers on every rank and device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE)


def whole(tensor: Any) -> Tensor:
    """Of all ranks."""
    value: Tensor = tensor.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value
