"""Tensor parallelism in two processes: losses and gradients of one process, dropout included."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_processes import (
    DEVICE,
    in_two_processes,
    mesh,
    needs_processes,
    seeded_randn,
    whole,
)
from torch import Tensor, nn

import pyfast

pytestmark = needs_processes

if torch.distributed.is_available():
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    from pyfast.distributed import HeadwiseParallel, split_projections

SIZE, HEADS, BATCH, LENGTH = 16, 4, 3, 5


def packed_gradients(net: nn.Module) -> dict[str, Tensor]:
    """Of all parameters, those of separate projections as one."""
    found: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    for name, p in net.named_parameters():
        prefix, _, last = name.rpartition(".")
        if last in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            parts.setdefault(prefix, []).append(whole(p.grad))
        else:
            found[name] = whole(p.grad)
    for prefix, three in parts.items():
        if three[0].shape == three[1].shape == three[2].shape:
            found[f"{prefix}.in_proj_weight".lstrip(".")] = torch.cat(three)
    return found


def assert_same_gradients(actual: nn.Module, expected: nn.Module) -> None:
    a, e = packed_gradients(actual), packed_gradients(expected)
    assert a.keys() == e.keys()
    for name, value in e.items():
        torch.testing.assert_close(a[name], value, rtol=1e-4, atol=1e-5, msg=f"{name} differs")


def check_attention(rank: int) -> None:
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, 3:] = True
    additive = seeded_randn(1, BATCH * HEADS, LENGTH, LENGTH)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    cases: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        ({"dropout": 0.0}, {}),
        ({"dropout": 0.5}, {"need_weights": False}),
        ({"dropout": 0.5, "batch_first": True}, {"average_attn_weights": False}),
        ({"dropout": 0.5}, {"key_padding_mask": padding, "need_weights": False}),
        ({"dropout": 0.5, "bias": False}, {"attn_mask": additive}),
        ({"dropout": 0.5}, {"attn_mask": causal, "is_causal": True, "need_weights": False}),
        ({"add_bias_kv": True, "add_zero_attn": True}, {"key_padding_mask": padding}),
        ({"kdim": 6, "vdim": 7, "dropout": 0.25}, {"need_weights": False}),
    )
    for options, call in cases:
        torch.manual_seed(4)
        net = pyfast.nn.MultiheadAttention(SIZE, HEADS, **options)
        if net.in_proj_bias is not None:
            nn.init.normal_(net.in_proj_bias)
        parallel = parallelize_module(copy.deepcopy(net), mesh(), HeadwiseParallel())
        shape = (BATCH, LENGTH) if net.batch_first else (LENGTH, BATCH)
        sizes = [SIZE] if net.kdim == SIZE else [SIZE, net.kdim, net.vdim]
        inputs = [seeded_randn(size, *shape, size) for size in sizes]
        grads = []
        outs = []
        for module in (net, parallel):
            leaves = [t.clone().requires_grad_() for t in inputs]
            torch.manual_seed(9)
            q, k, v = leaves if len(leaves) == 3 else leaves * 3
            out, weights = module(q, k, v, **call)
            loss = out.square().sum() + (0 if weights is None else weights.square().sum())
            loss.backward()
            grads.append([leaf.grad for leaf in leaves])
            outs.append([out] if weights is None else [out, weights])
        what = f"{options} {call.keys()}"
        for a, e in zip(grads[1] + outs[1], grads[0] + outs[0], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5, msg=f"{what} differs")
        assert_same_gradients(parallel, net)


class Model(nn.Module):
    """Two encoder layers, with every dropout that they have."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(SIZE, HEADS, 24, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(SIZE, 3)
        pyfast.patch(self)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding))


def parallel_copy(net: Model, where: Any = None) -> Model:
    plan = {
        "encoder.layers.*.self_attn": HeadwiseParallel(),
        "encoder.layers.*.linear1": ColwiseParallel(use_local_output=False),
        "encoder.layers.*.linear2": RowwiseParallel(),
    }
    return parallelize_module(copy.deepcopy(net), where or mesh(), plan)


def optimizer_of(net: nn.Module) -> pyfast.optim.AdamW:
    return pyfast.optim.AdamW(net.parameters(), lr=0.01, max_grad_norm=0.5)


def train(net: nn.Module, steps: range = range(3), optimizer: Any = None) -> list[float]:
    """Losses: they show whether all masks and gradients before were the same."""
    optimizer = optimizer or optimizer_of(net)
    losses = []
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool, device=DEVICE)
    padding[1, 2:] = True
    for step in steps:
        optimizer.zero_grad()
        x = seeded_randn(step, BATCH, LENGTH, SIZE)
        y = seeded_randn(step + 50, BATCH * LENGTH, 3).argmax(-1)
        torch.manual_seed(step)
        loss = nn.functional.cross_entropy(net(x, padding).flatten(0, 1), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_encoder(rank: int) -> None:
    for options in (
        {"dropout": 0.0},
        {"dropout": 0.3},
        {"dropout": 0.3, "norm_first": True, "activation": "gelu"},
    ):
        torch.manual_seed(3)
        net = Model(**options)
        parallel = parallel_copy(net)
        copies = copy.deepcopy(net)
        expected, actual = train(copies), train(parallel)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        x = seeded_randn(8, 2, LENGTH, SIZE)
        with torch.no_grad():
            torch.testing.assert_close(parallel.eval()(x), copies.eval()(x), rtol=1e-4, atol=1e-4)
    check_that_wrong_masks_show(net, expected)
    torch.set_default_device(None)  # torch.compile does not look through its mode
    compiled = torch.compile(parallel_copy(net), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(train(compiled, range(1)), expected[:1], rtol=1e-5, atol=1e-5)


def check_that_wrong_masks_show(net: Model, expected: list[float]) -> None:
    """Ranks that number their shards from zero: the losses differ."""
    from pyfast.distributed import _sharding

    kept = _sharding._with_numbers
    _sharding._with_numbers = lambda seed, numbers: seed
    try:
        losses = train(parallel_copy(net), range(1))
    finally:
        _sharding._with_numbers = kept
    assert abs(losses[0] - expected[0]) > 1e-3


def check_errors(rank: int) -> None:
    for module, error, text in (
        (nn.MultiheadAttention(8, 2), TypeError, "must be a pyfast.nn.MultiheadAttention"),
        (nn.Linear(8, 2), TypeError, "torch.nn.modules.linear.Linear"),
        (pyfast.nn.MultiheadAttention(9, 3), ValueError, "divides the 3 heads"),
    ):
        before = {name: p for name, p in module.named_parameters()}
        with pytest.raises(error, match=text):
            parallelize_module(module, mesh(), HeadwiseParallel())
        assert before == dict(module.named_parameters())
    with pytest.raises(TypeError, match="split_projections"):
        split_projections(nn.Linear(2, 2))


def check_layouts(rank: int) -> None:
    """Inputs and results that are cut, as sequence parallelism has them."""
    torch.manual_seed(4)
    net = pyfast.nn.MultiheadAttention(SIZE, HEADS, dropout=0.5, batch_first=True)
    style = HeadwiseParallel(
        input_layouts=Shard(1), output_layouts=Shard(1), use_local_output=False
    )
    parallel = parallelize_module(copy.deepcopy(net), mesh(), style)
    x = seeded_randn(0, BATCH, 6, SIZE)
    torch.manual_seed(9)
    expected = net(x, x, x, need_weights=False)[0]
    torch.manual_seed(9)
    part = x.chunk(2, 1)[rank]
    actual = parallel(part, part, part, need_weights=False)[0]
    assert isinstance(actual, DTensor) and actual.placements == (Shard(1),)
    torch.testing.assert_close(whole(actual), expected, rtol=1e-4, atol=1e-5)
    plain = parallelize_module(copy.deepcopy(net), mesh(), HeadwiseParallel())
    again = copy.deepcopy(plain)
    torch.manual_seed(9)
    torch.testing.assert_close(
        again(x, x, x, need_weights=False)[0], expected, rtol=1e-4, atol=1e-5
    )
    assert "HeadwiseParallel(input_layouts=(Shard(dim=1)," in repr(style)


def check_with_fsdp(rank: int) -> None:
    """Meshes of two dimensions: as far as two processes go, one of them has one."""
    torch.manual_seed(3)
    net = Model(dropout=0.3)
    expected = train(copy.deepcopy(net), range(2))
    for shape in ((1, 2), (2, 1)):
        where = mesh(*shape)
        parallel = parallel_copy(net, where["tensor"])
        for layer in parallel.encoder.layers:
            fully_shard(layer, mesh=where["data"])
        fully_shard(parallel, mesh=where["data"])
        torch.testing.assert_close(train(parallel, range(2)), expected, rtol=1e-5, atol=1e-5)


def check_saving(rank: int) -> None:
    torch.manual_seed(3)
    net = parallel_copy(Model(dropout=0.3))
    optimizer = optimizer_of(net)
    train(net, range(2), optimizer)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    folder = os.environ["PYFAST_TEST_FOLDER"]
    state = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.save(state, checkpoint_id=f"{folder}/checkpoint")
    losses = train(net, range(2, 4), optimizer)
    if rank == 0:
        torch.save(losses, f"{folder}/losses.pt")


def check_resumed_alone(folder: Path) -> None:
    """One process goes on with what two have saved, cut by heads."""
    net = Model(dropout=0.3).to(DEVICE)
    for layer in net.encoder.layers:
        split_projections(layer.self_attn)
    optimizer = optimizer_of(net)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(state, checkpoint_id=f"{folder}/checkpoint", no_dist=True)
    set_state_dict(
        net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    losses = train(net, range(2, 4), optimizer)
    torch.testing.assert_close(losses, torch.load(folder / "losses.pt"), rtol=1e-5, atol=1e-5)


def check_parallel(rank: int) -> None:
    check_attention(rank)
    check_layouts(rank)
    check_errors(rank)
    check_with_fsdp(rank)
    check_saving(rank)
    check_encoder(rank)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_tensor_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYFAST_TEST_FOLDER", str(tmp_path))
    in_two_processes(check_parallel, tmp_path)
    check_resumed_alone(tmp_path)


def test_projections_are_split() -> None:
    torch.manual_seed(0)
    net = pyfast.nn.MultiheadAttention(8, 2)
    x = torch.randn(3, 2, 8)
    expected = net(x, x, x)[0]
    packed = net.in_proj_weight.detach().clone()
    split_projections(net)
    split_projections(net)
    assert torch.equal(torch.cat([net.q_proj_weight, net.k_proj_weight, net.v_proj_weight]), packed)
    assert "in_proj_weight" not in net.state_dict()
    torch.testing.assert_close(net(x, x, x)[0], expected)
    stock = nn.MultiheadAttention(8, 2)
    split_projections(stock)
    stock.load_state_dict(net.state_dict())
    torch.testing.assert_close(stock(x, x, x)[0], expected)
