"""Optimizers of pyfast saved, loaded and patched; averages of parameters outside of them."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from oracle import assert_bits_equal
from test_optim_extras import (
    HALF,
    KINDS,
    NAN,
    SINGLE,
    STATES,
    all_parameters,
    assert_close,
    assert_same,
    each_kind,
    everything,
    make,
    make_torch,
    parameters,
    train,
)
from torch import Tensor
from torch.optim.lr_scheduler import StepLR

import pyfast

EXTRAS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "none": (HALF, {}),
    "ema": (HALF, {"ema_decay": 0.9}),
    "ema float16": (torch.float16, {"ema_decay": 0.9}),
    "float32 states": (HALF, {"state_dtype": "float32"}),
    "bfloat16 states": (SINGLE, {"state_dtype": "bfloat16"}),
    "int8 states": (SINGLE, {"state_dtype": "int8"}),
    "int8 states bfloat16": (HALF, {"state_dtype": "int8"}),
    "master": (HALF, {"master_weights": True, "state_dtype": "float32"}),
    "master float16": (torch.float16, {"master_weights": True}),
    "stochastic": (HALF, {"stochastic_rounding": True, "state_dtype": "int8"}),
    "numbers": (SINGLE, {"max_grad_norm": 1.0, "l1": 0.1, "l1_mode": "decoupled"}),
    "zero gradients": (HALF, {"zero_grads": True, "l1": 0.1}),
}


def saved(optimizer: Any) -> Any:
    """Its state_dict after torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies(optimizer: Any) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in all_parameters(optimizer)]


@each_kind
@pytest.mark.parametrize("name", EXTRAS)
def test_resume(kind: str, name: str) -> None:
    dtype, extras = EXTRAS[name]
    ours = train(make(kind, parameters(dtype=dtype), **extras), 0, 1, 2)
    group = ours.state_dict()["param_groups"][0]
    assert {key: group[key] for key in extras} == extras
    torch.manual_seed(123)
    resumed = make(kind, copies(ours), **extras)
    resumed.load_state_dict(saved(ours))
    storage = {k: v for k, v in extras.items() if k in ("state_dtype", "master_weights")}
    plain = make(kind, copies(ours), **storage)  # the other extras travel in the state_dict
    plain.load_state_dict(saved(ours))
    copied = copy.deepcopy(ours)
    train(ours, 3, 4)
    for other in (resumed, plain, copied):
        assert_same(train(other, 3, 4), ours)
        assert other.state_dict()["param_groups"] == ours.state_dict()["param_groups"]


@each_kind
def test_pickle(kind: str) -> None:
    ours = train(make(kind, parameters(), ema_decay=0.5, max_grad_norm=2.0), 0)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert_same(train(other, 1), train(ours, 1))


def test_extras_of_groups_are_saved() -> None:
    def groups() -> list[dict[str, Any]]:
        a, b, c = parameters((300,), (9, 9), (5,))
        return [
            {"params": [a], "state_dtype": "int8"},
            {"params": [b], "ema_decay": 0.9, "l1": 0.2},
            {"params": [c]},
        ]

    ours = train(make("AdamW", groups()), 0, 1)
    other = make("AdamW", groups())
    for p, q in zip(all_parameters(other), all_parameters(ours), strict=True):
        p.data.copy_(q)
    other.load_state_dict(saved(ours))
    assert_same(train(other, 2), train(ours, 2))
    states = [ours.state[p] for p in all_parameters(ours)]
    assert ["ema" in s for s in states] == [False, True, False]
    assert [s["exp_avg"].dtype for s in states] == [torch.uint8, SINGLE, SINGLE]


@each_kind
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_loads_torchs_state(kind: str, state_dtype: str, dtype: torch.dtype) -> None:
    """States of torch's optimizer get the dtype that ours was made with."""
    torchs = train(make_torch(kind, parameters(dtype=dtype)), 0, 1, 2)
    ours = make(kind, copies(torchs), state_dtype=state_dtype)
    ours.load_state_dict(saved(torchs))
    expected = {"float32": SINGLE, "bfloat16": HALF, "int8": torch.uint8}[state_dtype]
    rtol = {"float32": 0.0, "bfloat16": 0.51 * 2**-7, "int8": 0.13}[state_dtype]
    wide = make(kind, copies(ours), state_dtype="float32")
    wide.load_state_dict(saved(ours))
    for p, q, r in zip(*map(all_parameters, (ours, torchs, wide)), strict=True):
        for name in STATES[kind]:
            state, exact = ours.state[p][name], torchs.state[q][name]
            assert state.dtype == expected and wide.state[r][name].dtype == SINGLE
            atol = 3e-5 * exact.abs().max().item() if state_dtype == "int8" else 0.0
            assert_close([wide.state[r][name]], [exact], rtol, atol)
    before = copies(ours)
    train(ours, 3), train(torchs, 3)
    if dtype == SINGLE:
        for p, q, old in zip(all_parameters(ours), all_parameters(torchs), before, strict=True):
            assert (p - q).norm() <= 0.15 * (q - old).norm() + 1e-6


@each_kind
@pytest.mark.parametrize("name", ["ema", "bfloat16 states", "numbers", "none"])
def test_torch_loads_ours(kind: str, name: str) -> None:
    ours = train(make(kind, parameters(), **EXTRAS[name][1]), 0, 1)
    torchs = make_torch(kind, copies(ours))
    torchs.load_state_dict(saved(ours))
    for p, q in zip(all_parameters(ours), all_parameters(torchs), strict=True):
        for state in STATES[kind]:
            assert_bits_equal(torchs.state[q][state], ours.state[p][state].float())
    train(torchs, 2)


def test_ema() -> None:
    values = [*parameters(), *parameters((70,), dtype=HALF)]
    ema = pyfast.optim.EMA((p for p in values), decay=0.9)
    expected = [p.detach().float().clone() for p in values]
    optimizer = make("SGD", values)
    for step in range(3):
        train(optimizer, step)
        ema.update()
        for average, p in zip(expected, values, strict=True):
            average.lerp_(p.detach().float(), 1 - 0.9)
    assert isinstance(ema.averages, list) and all(a.dtype == SINGLE for a in ema.averages)
    assert_close(ema.averages, expected)
    before = everything(optimizer)
    with ema.average_parameters():
        for p, average in zip(values, ema.averages, strict=True):
            assert_bits_equal(p, average.to(p.dtype))
    assert_same(optimizer, before)
    with pytest.raises(KeyError), ema.average_parameters():
        raise KeyError
    assert_same(optimizer, before)
    other = pyfast.optim.EMA(values, decay=0.9)
    other.load_state_dict(saved(ema))
    train(optimizer, 3)
    ema.update(), other.update()
    for a, b in zip(ema.averages, other.averages, strict=True):
        assert_bits_equal(a, b)


@pytest.mark.parametrize("decay", [-0.1, 1.1, NAN, "0.9", None])
def test_bad_decay_of_ema(decay: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="decay"):
        pyfast.optim.EMA(parameters(), decay=decay)


def test_bad_parameters_of_ema() -> None:
    for bad in ([1.0], [torch.ones(3, dtype=torch.int64)], None):
        with pytest.raises((TypeError, ValueError)):
            pyfast.optim.EMA(bad)
    small, large = (pyfast.optim.EMA(parameters(*shapes)) for shapes in (((3,),), ((3,), (4,))))
    averages = [a.clone() for a in small.averages]
    with pytest.raises((RuntimeError, ValueError)):
        small.load_state_dict(large.state_dict())
    assert_close(small.averages, averages, rtol=0, atol=0)


@each_kind
@pytest.mark.parametrize("variant", ["foreach", "fused", "for-loop", "without state"])
def test_patch_optimizer(kind: str, variant: str) -> None:
    if variant == "fused" and kind in ("RMSprop", "Adamax"):
        pytest.skip("torch has no fused one")
    switches = {"foreach": variant == "foreach"} | ({"fused": True} if variant == "fused" else {})
    options = {**KINDS[kind], **switches}
    optimizer = getattr(torch.optim, kind)(parameters(dtype=HALF), **options)
    if variant != "without state":
        train(optimizer, 0, 1, 2)
    fresh = getattr(pyfast.optim, kind)(copies(optimizer), **options)
    fresh.load_state_dict(saved(optimizer))
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    schedulers = [StepLR(x, 1, gamma=0.5) for x in (optimizer, fresh)]
    state, groups = optimizer.state, optimizer.param_groups
    assert pyfast.patch_optimizer(optimizer) is optimizer
    assert type(optimizer) is getattr(pyfast.optim, kind)
    assert optimizer.state is state and optimizer.param_groups is groups
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scheduler warns where it sees no step
        for step in (3, 4):
            train(optimizer, step), train(fresh, step)
            for scheduler in schedulers:
                scheduler.step()
    assert_same(optimizer, fresh)
    assert optimizer.param_groups[0]["lr"] == fresh.param_groups[0]["lr"]
    assert calls == ["before", "after"] * 2
    again = make(kind, copies(optimizer))
    again.load_state_dict(saved(optimizer))
    assert_same(train(again, 5), train(optimizer, 5))


def test_patch_optimizer_then_extras() -> None:
    """Group keys turn extras on."""
    optimizer = pyfast.patch_optimizer(train(make_torch("AdamW", parameters()), 0))
    optimizer.add_param_group({"params": parameters((5,)), "ema_decay": 0.9, "zero_grads": True})
    train(optimizer, 1)
    assert not all_parameters(optimizer)[-1].grad.any() and all_parameters(optimizer)[0].grad.any()
    assert "ema" in optimizer.state[all_parameters(optimizer)[-1]]


class Subclass(torch.optim.AdamW):
    pass


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.LBFGS, Subclass])
def test_patch_optimizer_of_other_classes(kind: Any) -> None:
    optimizer = kind(parameters())
    with pytest.raises(TypeError, match=kind.__name__):
        pyfast.patch_optimizer(optimizer)
    assert type(optimizer) is kind


@pytest.mark.parametrize("value", [None, torch.nn.Linear(2, 2), torch.optim.AdamW])
def test_patch_optimizer_of_no_optimizer(value: Any) -> None:
    with pytest.raises(TypeError, match="patch_optimizer"):
        pyfast.patch_optimizer(value)
