"""pyfast's optimizers in two processes: DistributedDataParallel, and DTensors of FSDP2."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

import pyfast

RANKS = 2
STEPS = 4
OPTIONS = {"lr": 0.01, "weight_decay": 0.1}

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


def in_process(rank: int, worker: Callable[[int], None], store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{store}", timedelta(seconds=20), world_size=RANKS, rank=rank
    )
    worker(rank)
    dist.barrier()
    os._exit(0)  # gloo's threads abort one exit in twelve, with torch's optimizers too


def in_two_processes(worker: Callable[[int], None], tmp_path: Path) -> None:
    multiprocessing.spawn(in_process, (worker, str(tmp_path / "store")), nprocs=RANKS)


def model() -> nn.Sequential:
    """Odd sizes: ranks hold shards of different sizes, and none of the last bias."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 1))


def data(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(6, 9, generator=generator), torch.randn(6, 1, generator=generator) * 5


def backward(net: nn.Module, step: int, rank: int) -> None:
    x, y = (t.to(next(net.parameters()).dtype) for t in data(step, rank))
    nn.functional.mse_loss(net(x), y).backward()


def train(net: nn.Module, optimizer: Any, rank: int, steps: range = range(STEPS)) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(net, step, rank)
        optimizer.step()


def train_alone(limit: float) -> tuple[nn.Module, list[float]]:
    """One process with the data of all ranks, torch's optimizer and torch's clipping."""
    net, norms = model(), []
    optimizer = torch.optim.AdamW(net.parameters(), **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(RANKS):
            backward(net, step, rank)
        for p in net.parameters():
            assert p.grad is not None
            p.grad /= RANKS
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), limit).item())
        optimizer.step()
    return net, norms


def whole(value: Tensor) -> Tensor:
    """Of all ranks."""
    value = value.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def assert_all_close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(whole(a), whole(e), rtol=rtol, atol=atol)


def local_tensors(net: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    for name, p in net.named_parameters():
        for key, value in {"": p.detach(), **optimizer.state[p]}.items():
            yield f"{name} {key}", value.to_local() if hasattr(value, "to_local") else value


def assert_same_locally(first: tuple[nn.Module, Any], second: tuple[nn.Module, Any]) -> None:
    expected = dict(local_tensors(*second))
    actual = dict(local_tensors(*first))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


def check_ddp(rank: int) -> None:
    nets = [nn.parallel.DistributedDataParallel(model()) for _ in range(3)]
    limit = {"max_grad_norm": 1.0}
    ours = pyfast.optim.AdamW(nets[0].parameters(), **OPTIONS)
    torchs = torch.optim.AdamW(nets[1].parameters(), **OPTIONS)
    clipping = pyfast.optim.AdamW(nets[2].parameters(), **OPTIONS, **limit)
    for net, optimizer in zip(nets, (ours, torchs, clipping), strict=True):
        train(net, optimizer, rank)
    assert_all_close(nets[0].parameters(), nets[1].parameters())
    alone, norms = train_alone(1.0)
    assert max(norms) > 1.0
    assert_all_close(nets[2].parameters(), alone.parameters())
    torch.testing.assert_close(clipping.grad_norm, torch.tensor(norms[-1]))
    for p in nets[0].parameters():
        copies = [torch.empty_like(p) for _ in range(RANKS)]
        dist.all_gather(copies, p.detach())
        assert torch.equal(*copies)


def sharded(kind: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = model().to(dtype)
    fully_shard(net, mesh=init_device_mesh("cpu", (RANKS,)))
    return net, kind(net.parameters(), **{**OPTIONS, **options})


def check_fsdp_against_torch(rank: int) -> None:
    from torch.distributed.tensor import DTensor

    (net, ours), (other, torchs) = sharded(pyfast.optim.AdamW), sharded(torch.optim.AdamW)
    train(net, ours, rank), train(other, torchs, rank)
    assert_all_close(net.parameters(), other.parameters())
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert ours.state[p].keys() == torchs.state[q].keys()
        for name in ("exp_avg", "exp_avg_sq"):
            state, expected = ours.state[p][name], torchs.state[q][name]
            assert isinstance(state, DTensor) and isinstance(expected, DTensor)
            assert state.placements == expected.placements and state.shape == expected.shape
            assert_all_close([state], [expected])
        assert not isinstance(ours.state[p]["step"], DTensor)


def check_fsdp_clips_globally(rank: int) -> None:
    net, ours = sharded(pyfast.optim.AdamW, max_grad_norm=1.0)
    alone, norms = train_alone(1.0)
    for step in range(STEPS):
        train(net, ours, rank, range(step, step + 1))
        torch.testing.assert_close(ours.grad_norm, torch.tensor(norms[step]))
    assert_all_close(net.parameters(), alone.parameters())
    for limit, norm_type in ((0.5, 2.0), (0.5, 1.0)):  # torch has no Inf norm of empty shards
        ours.zero_grad()
        backward(net, 0, rank)
        grads = [whole(p.grad).clone() for p in net.parameters()]
        norm = pyfast.optim.clip_grad_norm_(net.parameters(), limit, norm_type)
        expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]), norm_type)
        torch.testing.assert_close(whole(norm), expected)
        scale = min(1.0, limit / (expected.item() + 1e-6))
        assert_all_close([p.grad for p in net.parameters()], [g * scale for g in grads])


EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"amsgrad": True},
    {"ema_decay": 0.5, "state_dtype": "bfloat16", "max_grad_norm": 1.0},
    {"dtype": torch.bfloat16, "master_weights": True, "state_dtype": "float32"},
    {"dtype": torch.float16, "master_weights": True},
    {"dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 3},
)


def check_fsdp_checkpoint(rank: int) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    for extras in EXTRAS:
        # gloo and NCCL do not gather int16, which the remainders of master weights are.
        for full in (False,) if "master_weights" in extras else (False, True):
            options = StateDictOptions(full_state_dict=full)
            net, ours = sharded(pyfast.optim.AdamW, **extras)
            train(net, ours, rank)
            saved = copy.deepcopy(get_optimizer_state_dict(net, ours, options=options))
            other, loaded = sharded(pyfast.optim.AdamW, **extras)
            other.load_state_dict(net.state_dict())
            set_optimizer_state_dict(other, loaded, saved, options=options)
            assert_same_locally((other, loaded), (net, ours))
            train(net, ours, rank, range(9, 11)), train(other, loaded, rank, range(9, 11))
            assert_same_locally((other, loaded), (net, ours))


def check_partial_gradients(rank: int) -> None:
    """A replicated weight and sharded inputs: its gradient is a sum that is still in parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_module

    mesh = init_device_mesh("cpu", (RANKS,))
    x = DTensor.from_local(torch.full((2, 3), rank + 1.0), mesh, [Shard(0)])
    weights, norms = [], []
    for library in (torch.optim, pyfast.optim):
        net = nn.Linear(3, 2, bias=False)
        nn.init.ones_(net.weight)
        net = distribute_module(net, mesh)
        net(x).sum().backward()
        optimizer = library.SGD(net.parameters(), lr=0.1)
        optimizer.step()
        weights.append(net.weight.to_local())
        norms.append(net.weight.grad.full_tensor().norm())
    torch.testing.assert_close(*weights)
    torch.testing.assert_close(*norms)


def check_fsdp_patched(rank: int) -> None:
    (net, patched), (other, ours) = sharded(torch.optim.AdamW), sharded(pyfast.optim.AdamW)
    train(net, patched, rank, range(2))
    other.load_state_dict(net.state_dict())
    ours.load_state_dict(copy.deepcopy(patched.state_dict()))
    assert pyfast.patch_optimizer(patched) is patched
    train(net, patched, rank, range(2, 4)), train(other, ours, rank, range(2, 4))
    assert_same_locally((net, patched), (other, ours))


def check_fsdp_extras(rank: int) -> None:
    """What is stored for each element is stored with the shard."""
    net, ours = sharded(pyfast.optim.AdamW, state_dtype="bfloat16", ema_decay=0.5, zero_grads=True)
    before = [whole(p).clone() for p in net.parameters()]
    averages = [value.clone() for value in before]
    for step in range(STEPS):
        backward(net, step, rank)
        ours.step()
        for p, average in zip(net.parameters(), averages, strict=True):
            assert not whole(p.grad).any()
            average.lerp_(whole(p), 0.5)
    with ours.ema_parameters():
        assert_all_close(net.parameters(), averages)
    other, plain = sharded(torch.optim.AdamW)
    train(other, plain, rank)
    changes = (
        torch.cat(
            [(whole(p) - old).flatten() for p, old in zip(x.parameters(), before, strict=True)]
        )
        for x in (net, other)
    )
    change, expected = changes
    assert (change - expected).norm() < 0.05 * expected.norm()


def check_fsdp(rank: int) -> None:
    check_fsdp_against_torch(rank)
    check_fsdp_clips_globally(rank)
    check_fsdp_checkpoint(rank)
    check_fsdp_patched(rank)
    check_partial_gradients(rank)
    check_fsdp_extras(rank)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    in_two_processes(check_ddp, tmp_path)


def test_fully_sharded(tmp_path: Path) -> None:
    in_two_processes(check_fsdp, tmp_path)
