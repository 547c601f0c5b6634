"""The demo in several processes: torchrun starts them, FSDP2 shards the models over them."""

from __future__ import annotations

import copy
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from .model import GPT
from .options import Options


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(options: Options) -> int:
    """Run the demo through torchrun on this machine; returns its exit status."""
    words = shlex.split(replace(options, nproc=1).command())[1:]  # torchrun tells their number
    torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={options.nproc}")
    return subprocess.run([sys.executable, "-m", *torchrun, *words], check=False).returncode


@contextmanager
def joined(options: Options) -> Iterator[Options]:
    """The options with the number of processes that torchrun tells, in their group."""
    if not started_by_torchrun():
        yield options
        return
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    try:
        yield replace(options, nproc=dist.get_world_size())
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def part_of(batch: Tensor) -> Tensor:
    """The sequences of this process."""
    if not dist.is_initialized():
        return batch
    return batch.chunk(dist.get_world_size())[rank()]


def mean_over_processes(value: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value.item()


def shard(model: GPT) -> None:
    """Shard the parameters, in place, layer by layer."""
    if not dist.is_initialized():
        return
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def gathered(model: GPT, like: GPT) -> GPT:
    """The model with whole parameters: itself, or a copy of ``like`` with those of all processes.

    Every process must call it.
    """
    if not dist.is_initialized():
        return model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole = copy.deepcopy(like)
    if rank() == 0:  # the others get no values
        whole.load_state_dict(state)
    return whole
