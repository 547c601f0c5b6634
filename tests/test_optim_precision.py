"""How pyfast's optimizers store parameters and states: 8 and 16 bits, master copies, rounding."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from oracle import assert_bits_equal
from test_optim_extras import (
    HALF,
    INFINITY,
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
    set_gradients,
    train,
)
from torch import Tensor

import pyfast


def one_step_apart(kind: str, ours: Any, step: int) -> Any:
    """torch's optimizer in float32, one step on from where ``ours`` is; makes that of ours too."""
    torchs = make_torch(
        kind, [p.detach().to(SINGLE, copy=True).requires_grad_() for p in all_parameters(ours)]
    )
    pairs = list(zip(all_parameters(ours), all_parameters(torchs), strict=True))
    for p, other in pairs:
        state = {k: v.float().clone() for k, v in ours.state.get(p, {}).items() if v is not None}
        torchs.state[other] = state if "step" in state or kind == "SGD" else {}
    train(ours, step), train(torchs, step)
    return torchs


@each_kind
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float16], ids=str)
def test_state_dtype(kind: str, dtype: torch.dtype, state_dtype: str) -> None:
    """One rounding for each value that is stored: of float32 arithmetic."""
    ours = make(kind, parameters(dtype=dtype), state_dtype=state_dtype)
    eps = {d: max(0.501 * torch.finfo(d).eps, 2e-6) for d in (SINGLE, HALF, torch.float16)}
    for step in range(5):
        torchs = one_step_apart(kind, ours, step)
        assert_close(all_parameters(ours), all_parameters(torchs), eps[dtype], atol=2e-7)
        for p, other in zip(all_parameters(ours), all_parameters(torchs), strict=True):
            for name in STATES[kind]:
                state = ours.state[p][name]
                assert state.dtype == getattr(torch, state_dtype)
                exact = torchs.state[other][name]
                atol = 1e-6 + 3e-7 * exact.abs().max().item()
                assert_close([state], [exact], eps[state.dtype], atol)


def test_float64_states_of_float64_parameters() -> None:
    ours = train(make("AdamW", parameters(dtype=torch.float64), state_dtype="float32"), 0)
    assert ours.state[all_parameters(ours)[0]]["exp_avg"].dtype == torch.float64


def dequantized(kind: str, ours: Any) -> list[dict[str, Tensor]]:
    """The states as an optimizer with float32 states loads them."""
    other = make(kind, [p.detach().clone() for p in all_parameters(ours)], state_dtype="float32")
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    states = [other.state[p] for p in all_parameters(other)]
    assert all(state[name].dtype == SINGLE for state in states for name in STATES[kind])
    return states


def noise(step: int, size: int) -> Tensor:
    """Of another scale for each element."""
    scale = torch.randn(size, generator=torch.Generator().manual_seed(99)).exp()
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(step))


@each_kind
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_int8_states(kind: str, dtype: torch.dtype) -> None:
    (p,) = parameters((300, 219), dtype=dtype)
    ours = train(make(kind, [p], state_dtype="int8"), 0)
    state = {name: t for name, t in ours.state[p].items() if name != "step"}
    for name in STATES[kind]:
        assert state[name].dtype == torch.uint8 and state[name].shape == p.shape
        assert state[f"{name}_scale"].dtype == SINGLE
        assert state[f"{name}_scale"].numel() == math.ceil(p.numel() / 256)
    used = sum(t.numel() * t.element_size() for t in state.values())
    assert used <= 1.05 * len(STATES[kind]) * p.numel()


@each_kind
def test_int8_states_stay_close(kind: str) -> None:
    ours, exact = (
        make(kind, parameters((8192,)), state_dtype="int8"),
        make(kind, parameters((8192,))),
    )
    for step in range(20):
        for optimizer in (ours, exact):
            all_parameters(optimizer)[0].grad = noise(step, 8192)
            optimizer.step()
    p, expected, before = all_parameters(ours)[0], all_parameters(exact)[0], parameters((8192,))[0]
    assert (p - expected).norm() < 0.1 * (expected - before).norm()


def test_int8_states_have_no_bias() -> None:
    ours, exact = (
        make("AdamW", parameters((16384,)), state_dtype=x, betas=(0.9, 0.99))
        for x in ("int8", None)
    )
    for step in range(300):
        for optimizer in (ours, exact):
            all_parameters(optimizer)[0].grad = noise(step, 16384)
            optimizer.step()
    second = exact.state[all_parameters(exact)[0]]["exp_avg_sq"]
    ratio = dequantized("AdamW", ours)[0]["exp_avg_sq"] / second
    assert 0.97 < ratio.mean() < 1.03
    large = second > second.median()
    assert 0.97 < ratio[large].mean() < 1.03


@each_kind
def test_int8_states_of_zero_gradients(kind: str) -> None:
    ours = make(kind, parameters((700,)), state_dtype="int8", weight_decay=0.0)
    (p,) = all_parameters(ours)
    for step in range(30):
        p.grad = noise(step, 700)
        p.grad[::3] = 0
        ours.step()
    assert_bits_equal(p[::3], parameters((700,))[0][::3])
    assert (p[1::3] != parameters((700,))[0][1::3]).all()


@each_kind
@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_int8_states_show_nan(kind: str, value: float) -> None:
    ours = make(kind, parameters((700,)), state_dtype="int8")
    set_gradients(ours, 0)
    all_parameters(ours)[0].grad[300] = value
    ours.step()
    assert not all_parameters(ours)[0][300].isfinite()
    train(ours, 1, 2)
    assert not all_parameters(ours)[0][300].isfinite()
    assert all_parameters(ours)[0][:256].isfinite().all()


def joined(p: Tensor, remainder: Tensor) -> Tensor:
    return ((p.detach().view(torch.int16).int() << 16) + remainder.int()).view(SINGLE)


@each_kind
def test_master_weights(kind: str) -> None:
    """The float32 trajectory of the same gradients, to the bit."""
    half, exact = (
        make(kind, parameters(dtype=HALF), master_weights=True, state_dtype="float32"),
        make(kind, [p.detach().float().requires_grad_() for p in parameters(dtype=HALF)]),
    )
    for step in range(6):
        train(half, step), train(exact, step)
        for p, x in zip(all_parameters(half), all_parameters(exact), strict=True):
            state = half.state[p]
            assert state["remainder"].dtype == torch.int16 and "master" not in state
            assert_bits_equal(joined(p, state["remainder"]), x.detach())
            assert (
                (p.double() - x.double()).abs() <= (x.to(HALF).double() - x.double()).abs()
            ).all()
            assert_bits_equal(state[STATES[kind][0]], exact.state[x][STATES[kind][0]])
            assert not {"remainder", "master"} & exact.state[x].keys()


@each_kind
def test_master_weights_of_float16(kind: str) -> None:
    dtype = torch.float16
    half, exact = (
        make(kind, parameters(dtype=dtype), master_weights=True, state_dtype="float32"),
        make(kind, [p.detach().float().requires_grad_() for p in parameters(dtype=dtype)]),
    )
    for step in range(4):
        train(half, step), train(exact, step)
        for p, x in zip(all_parameters(half), all_parameters(exact), strict=True):
            assert_bits_equal(half.state[p]["master"], x.detach())
            assert_bits_equal(p, x.to(dtype))
            if step == 1:
                with torch.no_grad():
                    p.fill_(7.5), x.fill_(7.5)


def test_master_weights_of_wide_parameters() -> None:
    ours = train(make("AdamW", parameters(), master_weights=True), 0)
    assert ours.state[all_parameters(ours)[0]].keys() == {"step", "exp_avg", "exp_avg_sq"}


def rounded_once(seed: int, indices: int = 1, step: int = 1) -> list[Tensor]:
    """1 - 2^-10, a quarter of the way to the next bfloat16, rounded in some step."""
    params = [torch.ones(100_000, dtype=HALF, requires_grad=True) for _ in range(indices)]
    ours = pyfast.optim.SGD(params, lr=1.0, stochastic_rounding=True, seed=seed)
    for _ in range(step):
        for p in params:
            p.data.fill_(1.0)
            p.grad = torch.full_like(p, 2**-10)
        ours.step()
    return [p.detach() for p in params]


def test_stochastic_rounding_has_no_bias() -> None:
    (values,) = rounded_once(3)
    assert set(values.tolist()) == {1.0, 1 - 2**-8}
    share = (values < 1).double().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 1e5)
    first, second = rounded_once(3, indices=2)
    assert torch.equal(first, values)
    others = (
        rounded_once(4)[0],
        second,
        rounded_once(3, step=2)[0],
        values.roll(1),
        values.roll(8),
    )
    for other in others:  # independent of the values
        both = ((values < 1) & (other < 1)).double().mean().item()
        assert abs(both - 1 / 16) < 5 * math.sqrt(15 / 256 / 1e5)


@each_kind
def test_stochastic_rounding_takes_a_neighbour(kind: str) -> None:
    ours = make(kind, parameters(dtype=HALF), stochastic_rounding=True, state_dtype="float32")
    exact = make(kind, [p.detach().float().requires_grad_() for p in parameters(dtype=HALF)])
    train(ours, 0), train(exact, 0)
    ups = []
    for p, x in zip(all_parameters(ours), all_parameters(exact), strict=True):
        cut, bits = (t.detach().view(torch.int32) >> 16 for t in (x, p.float()))
        assert ((bits == cut) | (bits == cut + 1)).all()
        ups.append((bits - cut).double().mean())
    assert 0.1 < ups[0] < 0.9


def test_seed_of_stochastic_rounding() -> None:
    def trained(**extras: Any) -> Any:
        return train(
            make("AdamW", parameters(dtype=HALF), stochastic_rounding=True, **extras), 0, 1
        )

    assert_same(trained(seed=5), trained(seed=5))
    with pytest.raises(AssertionError):
        assert_same(trained(seed=5), trained(seed=6))
    torch.manual_seed(1)
    first, second = trained(), trained()
    torch.manual_seed(1)
    again = trained()
    assert_same(first, again)
    seeds = [x.state_dict()["param_groups"][0]["seed"] for x in (first, second, again)]
    assert seeds[0] == seeds[2] != seeds[1]
    before = torch.get_rng_state()
    trained(seed=5), make("AdamW", parameters(), ema_decay=0.9)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_of_a_group() -> None:
    """Drawn as for all groups."""
    seeds = []
    for start in (1, 1, 2):
        torch.manual_seed(start)
        group = {"params": parameters(dtype=HALF), "stochastic_rounding": True}
        ours = train(make("AdamW", [group]), 0)
        seeds.append(ours.state_dict()["param_groups"][0].get("seed"))
    assert isinstance(seeds[0], int) and seeds[0] == seeds[1] != seeds[2]


THREADED: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "stochastic": (HALF, {"stochastic_rounding": True, "seed": 1}),
    "int8": (SINGLE, {"state_dtype": "int8"}),
    "master": (HALF, {"master_weights": True, "ema_decay": 0.9}),
    "norm": (SINGLE, {"max_grad_norm": 1.0, "l1": 0.1, "l1_mode": "decoupled"}),
}


@pytest.mark.parametrize("extra", THREADED)
def test_threads_make_no_difference(extra: str) -> None:
    dtype, extras = THREADED[extra]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ours = make("AdamW", parameters((150_000,), (333,), (70_001,), dtype=dtype), **extras)
        results.append(everything(train(ours, 0, 1)))
    assert_same(ours, results[0])
