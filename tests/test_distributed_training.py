"""Patched models under DistributedDataParallel, FSDP2, checkpoints and pipelines, in two processes:
the losses of one process with torch's optimizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_processes import (
    DEVICE,
    RANKS,
    in_two_processes,
    needs_processes,
    seeded_randn,
    whole,
)
from torch import Tensor, nn

import pyfast

pytestmark = needs_processes

if dist.is_available():
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
    from torch.nn.parallel import DistributedDataParallel

SIZE, HEADS, CLASSES, BATCH, LENGTH = 16, 4, 5, 4, 6
LIMIT = 0.5
OPTIONS = {"lr": 0.01, "weight_decay": 0.1}


class Model(nn.Module):
    def __init__(self, dropout: float, patch: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Linear(7, SIZE)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(SIZE, HEADS, 24, dropout, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(SIZE, CLASSES)
        if patch:
            pyfast.patch(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def data(step: int, rank: int) -> tuple[Tensor, Tensor]:
    seed = 10 * step + rank
    y = seeded_randn(seed + 5, BATCH * LENGTH, CLASSES).argmax(-1)
    return seeded_randn(seed, BATCH, LENGTH, 7), y


def loss_of(net: nn.Module, step: int, rank: int) -> Tensor:
    """As a rank has it: seeded for itself, as every data-parallel program does."""
    x, y = data(step, rank)
    torch.manual_seed(1000 * step + rank)
    return nn.functional.cross_entropy(net(x).flatten(0, 1).float(), y)


def train_alone(net: nn.Module, optimizer: Any, steps: range, clip: bool = True) -> list[float]:
    """One process with the data of all ranks: what rank 0 loses."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        for rank in range(RANKS):
            loss = loss_of(net, step, rank)
            (loss / RANKS).backward()
            if rank == 0:
                losses.append(loss.item())
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), LIMIT)
        optimizer.step()
    return losses


def train(net: nn.Module, optimizer: Any, rank: int, steps: range) -> list[float]:
    """What rank 0 lost, on every rank."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(net, step, rank)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    shared = torch.tensor(losses)
    dist.broadcast(shared, 0)
    return shared.tolist()


def shard(net: Model, **options: Any) -> Model:
    for layer in net.layers:
        fully_shard(layer, **options)
    return fully_shard(net, **options)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def check_data_parallel(rank: int) -> None:
    for dropout in (0.0, 0.3):
        alone = Model(dropout)
        expected = train_alone(alone, torch.optim.AdamW(alone.parameters(), **OPTIONS), range(3))
        for wrap in (DistributedDataParallel, shard):
            net = wrap(Model(dropout))
            optimizer = pyfast.optim.AdamW(net.parameters(), **OPTIONS, max_grad_norm=LIMIT)
            assert_close(train(net, optimizer, rank, range(3)), expected)
            for p, (name, q) in zip(net.parameters(), alone.named_parameters(), strict=True):
                if not name.endswith("in_proj_bias"):  # AdamW scales the zero of keys' bias up
                    assert_close(whole(p), whole(q), 1e-4)
        if dropout == 0.0:
            stock = Model(0.0, patch=False)
            optimizer = torch.optim.AdamW(stock.parameters(), **OPTIONS)
            assert_close(train_alone(stock, optimizer, range(3)), expected)
            without = Model(0.0)
            optimizer = torch.optim.AdamW(without.parameters(), **OPTIONS)
            wrong = train_alone(without, optimizer, range(3), clip=False)
            assert abs(wrong[-1] - expected[-1]) > 1e-4  # the comparison sees missing clipping


def check_mixed_precision(rank: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    losses = []
    for patch, library in ((False, torch.optim), (True, pyfast.optim)):
        net = shard(Model(0.0, patch), mp_policy=policy)
        optimizer = library.AdamW(net.parameters(), **OPTIONS)
        losses.append(train(net, optimizer, rank, range(4)))
        assert all(p.dtype == torch.float32 for p in net.parameters())
    assert losses[0] != losses[1]
    assert_close(losses[1], losses[0], 2e-2)


def optimizer_of(net: nn.Module) -> pyfast.optim.AdamW:
    return pyfast.optim.AdamW(net.parameters(), **OPTIONS, max_grad_norm=LIMIT)


def check_saving(rank: int) -> None:
    net = shard(Model(0.3))
    optimizer = optimizer_of(net)
    train(net, optimizer, rank, range(2))
    model_state, optimizer_state = get_state_dict(net, optimizer)
    folder = os.environ["PYFAST_TEST_FOLDER"]
    state = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.save(state, checkpoint_id=f"{folder}/checkpoint")
    losses = train(net, optimizer, rank, range(2, 5))
    if rank == 0:
        torch.save(losses, f"{folder}/losses.pt")


def check_pipeline(rank: int) -> None:
    """Two stages of one layer, two micro-batches."""
    net = Model(0.3)
    parts = [nn.Sequential(net.embed, net.layers[0]), nn.Sequential(net.layers[1], net.head)]
    x, y = data(0, 0)
    y = y.view(BATCH, LENGTH)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out.flatten(0, 1), y.flatten())

    stage = PipelineStage(parts[rank], rank, RANKS, x.device)
    schedule = ScheduleGPipe(stage, 2, loss_fn=loss_fn)
    torch.manual_seed(50 + rank)
    losses: list[Tensor] = []
    if rank == 0:
        schedule.step(x)
    else:
        schedule.step(target=y, losses=losses)

    alone = Model(0.3)
    torch.manual_seed(50)
    hidden = [alone.layers[0](alone.embed(part)) for part in x.chunk(2)]
    torch.manual_seed(51)
    outputs = [alone.head(alone.layers[1](part)) for part in hidden]
    expected = [loss_fn(out, part) for out, part in zip(outputs, y.chunk(2), strict=True)]
    (sum(expected) / 2).backward()
    if rank == 1:
        assert_close(torch.stack(losses).detach(), torch.stack(expected).detach())
    others = [
        nn.Sequential(alone.embed, alone.layers[0]),
        nn.Sequential(alone.layers[1], alone.head),
    ]
    count = 0
    for p, q in zip(parts[rank].parameters(), others[rank].parameters(), strict=True):
        assert_close(p.grad, q.grad)
        count += int(q.grad.abs().max() > 1e-3)
    assert count > 5


def check_training(rank: int) -> None:
    check_data_parallel(rank)
    check_mixed_precision(rank)
    check_pipeline(rank)
    check_saving(rank)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYFAST_TEST_FOLDER", str(tmp_path))
    in_two_processes(check_training, tmp_path)
    check_resumed_alone(tmp_path)


def check_resumed_alone(folder: Path) -> None:
    """One process goes on with what two have saved."""
    net = Model(0.3).to(DEVICE)
    optimizer = optimizer_of(net)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(state, checkpoint_id=f"{folder}/checkpoint", no_dist=True)
    set_state_dict(
        net,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    losses = train_alone(net, optimizer, range(2, 5), clip=False)
    assert_close(losses, torch.load(folder / "losses.pt"))
    fresh = Model(0.3).to(DEVICE)
    assert abs(train_alone(fresh, optimizer_of(fresh), range(2, 3))[0] - losses[0]) > 1e-3
