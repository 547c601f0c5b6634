"""The extras of pyfast's optimizers, each against a formula in plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import assert_bits_equal
from torch import Tensor

import pyfast

KINDS: dict[str, dict[str, Any]] = {  # with every state that a class has
    "AdamW": {"weight_decay": 0.1},
    "Adam": {"weight_decay": 0.1, "amsgrad": True},
    "SGD": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
    "RMSprop": {"momentum": 0.9, "weight_decay": 0.1},
    "Adamax": {"weight_decay": 0.1},
}
STATES = {
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "Adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "SGD": ("momentum_buffer",),
    "RMSprop": ("square_avg", "momentum_buffer"),
    "Adamax": ("exp_avg", "exp_inf"),
}
SHAPES = ((19, 37), (5,), (), (300,))
HALF, SINGLE = torch.bfloat16, torch.float32
NAN, INFINITY = float("nan"), float("inf")
each_kind = pytest.mark.parametrize("kind", KINDS)


def parameters(*shapes: Any, dtype: torch.dtype = SINGLE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    values = [torch.randn(shape, generator=generator) for shape in shapes or SHAPES]
    return [value.to(dtype).requires_grad_() for value in values]


def make(kind: str, params: Any, **extras: Any) -> Any:
    return getattr(pyfast.optim, kind)(params, **{**KINDS[kind], **extras})


def make_torch(kind: str, params: Any, **options: Any) -> Any:
    return getattr(torch.optim, kind)(params, **{"foreach": False, **KINDS[kind], **options})


def all_parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizer: Any, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in all_parameters(optimizer):
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(HALF).to(p.dtype)


def train(optimizer: Any, *steps: int) -> Any:
    for step in steps:
        set_gradients(optimizer, step)
        optimizer.step()
    return optimizer


def everything(optimizer: Any) -> dict[str, Any]:
    """A copy of all that a step changes, and the gradients."""
    values: dict[str, Any] = {}
    for i, p in enumerate(all_parameters(optimizer)):
        grad = p.grad.to_dense() if p.grad is not None else None
        values |= {f"parameter {i}": p.detach(), f"gradient {i}": grad}
        values |= {f"{name} {i}": value for name, value in optimizer.state.get(p, {}).items()}
    return {name: copy.deepcopy(value) for name, value in values.items() if value is not None}


def assert_same(actual: Any, expected: Any) -> None:
    """To the bit."""
    actual, expected = (
        everything(actual),
        expected if type(expected) is dict else everything(expected),
    )
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            a.detach().double(), e.detach().double(), rtol=rtol, atol=atol, equal_nan=True
        )


@each_kind
def test_off_by_default(kind: str) -> None:
    ours, torchs = make(kind, parameters()), make_torch(kind, parameters(), foreach=None)
    assert type(ours) is not type(torchs) and isinstance(ours, type(torchs))
    assert ours.defaults == torchs.defaults
    assert ours.param_groups[0].keys() == torchs.param_groups[0].keys()
    assert train(ours, 0).state_dict()["param_groups"] == torchs.state_dict()["param_groups"]


@each_kind
@pytest.mark.parametrize("maximize", [False, True])
def test_max_grad_norm(kind: str, maximize: bool) -> None:
    def groups() -> list[dict[str, Any]]:
        first, *rest = parameters()
        return [{"params": [first], "lr": 0.02}, {"params": rest}]

    ours = make(kind, groups(), max_grad_norm=20.0, maximize=maximize)
    torchs = make_torch(kind, groups(), maximize=maximize)
    assert ours.grad_norm is None
    for step, scale in enumerate((0.3, 1.0, 3.0)):  # the first is below the limit
        for optimizer in (ours, torchs):
            set_gradients(optimizer, step, scale)
        grads = [p.grad.clone() for p in all_parameters(ours)]
        norm = torch.nn.utils.clip_grad_norm_(all_parameters(torchs), 20.0)
        ours.step(), torchs.step()
        assert_close(all_parameters(ours), all_parameters(torchs))
        assert ours.grad_norm.dtype == SINGLE and ours.grad_norm.shape == ()
        assert_close([ours.grad_norm], [norm])
        for p, grad in zip(all_parameters(ours), grads, strict=True):
            assert_bits_equal(p.grad, grad)


def test_max_grad_norm_of_groups_and_dtypes() -> None:
    """The norm is that of all gradients."""
    dtypes = (HALF, SINGLE, torch.float64, torch.float16)
    params = [parameters((40, 9), dtype=dtype)[0] for dtype in dtypes]
    before = [p.detach().to(torch.float64, copy=True) for p in params]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.5, 1.0, 2.0, 1.0), strict=True)]
    ours = pyfast.optim.SGD(groups, max_grad_norm=5.0)
    train(ours, 0)
    grads = [p.grad.double() for p in params]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    assert_close([ours.grad_norm], [norm])
    for p, old, grad, group in zip(params, before, grads, groups, strict=True):
        expected = old - group["lr"] * 5.0 / (norm.item() + 1e-6) * grad
        atol = 1e-14 if p.dtype == torch.float64 else 3e-7
        assert_close([p], [expected], rtol=0.51 * torch.finfo(p.dtype).eps, atol=atol)


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_squares_beyond_the_range(size: float) -> None:
    """torch's norm of these is Inf and zero."""
    (p,) = parameters((700,))
    p.grad = (p.detach() * size).clone()
    expected = p.grad.double() / p.grad.double().norm()
    before, norm = p.detach().double(), p.grad.double().norm()
    optimizer = pyfast.optim.SGD([p], lr=1.0, max_grad_norm=1.0)
    optimizer.step()
    assert_close([p], [before - expected if size > 1 else before])
    assert_close([optimizer.grad_norm], [norm], atol=0.0)


@each_kind
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_gradients_that_are_not_finite(kind: str, value: float) -> None:
    """As in torch: NaN anywhere makes all NaN; Inf makes its own element NaN, others get zero."""
    ours = make(kind, parameters(), max_grad_norm=1.0)
    torchs = make_torch(kind, parameters())
    for optimizer in (ours, torchs):
        set_gradients(optimizer, 0)
        all_parameters(optimizer)[1].grad[2] = value
    norm = torch.nn.utils.clip_grad_norm_(all_parameters(torchs), 1.0)
    ours.step(), torchs.step()
    assert_close(all_parameters(ours), all_parameters(torchs))
    assert_close([ours.grad_norm], [norm])


@each_kind
@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float16, torch.float64], ids=str)
def test_ema(kind: str, dtype: torch.dtype) -> None:
    ours, plain = (
        make(kind, parameters(dtype=dtype), ema_decay=0.9),
        make(kind, parameters(dtype=dtype)),
    )
    wide = torch.promote_types(dtype, SINGLE)
    averages = [p.detach().to(wide).clone() for p in all_parameters(ours)]
    for step in range(4):
        train(ours, step), train(plain, step)
        for average, p in zip(averages, all_parameters(ours), strict=True):
            average.lerp_(p.detach().to(wide), 1 - 0.9)
        for p, other in zip(all_parameters(ours), all_parameters(plain), strict=True):
            assert_bits_equal(p, other)
    emas = [ours.state[p]["ema"] for p in all_parameters(ours)]
    assert all(ema.dtype == wide for ema in emas)
    assert_close(emas, averages, rtol=4 * torch.finfo(wide).eps, atol=1e-7)


def test_ema_parameters() -> None:
    ours = make("AdamW", parameters(dtype=HALF), ema_decay=0.5)
    untouched = make("AdamW", parameters(dtype=HALF), ema_decay=0.5)
    with ours.ema_parameters():  # before the first step: the average is the parameter
        assert_close(all_parameters(ours), parameters(dtype=HALF), rtol=0, atol=0)
    train(ours, 0, 1), train(untouched, 0, 1)
    before = everything(ours)
    with ours.ema_parameters():
        for p, other in zip(all_parameters(ours), all_parameters(untouched), strict=True):
            assert_bits_equal(p, untouched.state[other]["ema"].to(HALF))
    assert_same(ours, before)
    with pytest.raises(KeyError, match="inside"), ours.ema_parameters():
        raise KeyError("inside")
    assert_same(ours, before)
    assert_same(train(ours, 2, 3), train(untouched, 2, 3))


@each_kind
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_l1(kind: str, mode: str, maximize: bool) -> None:
    ours = make(kind, parameters(), l1=0.3, l1_mode=mode, maximize=maximize)
    torchs = make_torch(kind, parameters(), maximize=maximize)
    for step in range(3):
        train(ours, step), set_gradients(torchs, step)
        for p in all_parameters(torchs):
            if mode == "coupled":  # not negated by maximize
                p.grad += (-0.3 if maximize else 0.3) * p.detach().sign()
        torchs.step()
        for p in all_parameters(torchs):
            if mode == "decoupled":
                left = (p.detach().abs() - torchs.param_groups[0]["lr"] * 0.3).clamp(min=0)
                p.data.copy_(p.detach().sign() * left)
        assert_close(all_parameters(ours), all_parameters(torchs))


@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float64], ids=str)
def test_decoupled_l1_makes_zeros(dtype: torch.dtype) -> None:
    (p,) = parameters((1000,), dtype=dtype)
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    pyfast.optim.SGD([p], lr=0.5, l1=1.0, l1_mode="decoupled").step()
    assert torch.equal(p == 0, before.abs() <= 0.5)
    assert torch.equal(p.sign(), torch.where(before.abs() <= 0.5, 0, before.sign()))


@each_kind
def test_zero_grads(kind: str) -> None:
    plain = make(kind, parameters(), max_grad_norm=3.0)
    ours = make(kind, parameters(), max_grad_norm=3.0, zero_grads=True)
    for step in range(3):
        train(plain, step), set_gradients(ours, step)
        pair = torch.stack([all_parameters(ours)[3].grad, torch.ones(300)], -1)
        all_parameters(ours)[3].grad = pair[:, 0]
        grads = [p.grad for p in all_parameters(ours)]
        ours.step()
        for p, other, grad in zip(all_parameters(ours), all_parameters(plain), grads, strict=True):
            assert p.grad is grad and not grad.any()
            assert_bits_equal(p, other)
        assert pair[:, 1].all()


def test_zero_grads_of_a_skipped_step() -> None:
    """Else Inf stays in the gradient for ever, as nothing else zeroes it."""
    ours, scaler = make("SGD", parameters(), zero_grads=True), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    set_gradients(ours, 0)
    all_parameters(ours)[0].grad[2, 3] = INFINITY
    scaler.step(ours)
    assert all_parameters(ours)[0].grad is not None
    assert not any(p.grad.any() for p in all_parameters(ours))
    assert_close(all_parameters(ours), parameters(), rtol=0, atol=0)


def test_combination() -> None:
    """Two groups with all sorts of extras are what two optimizers are."""
    firsts: dict[str, Any] = {
        "lr": 0.02,
        "state_dtype": "int8",
        "stochastic_rounding": True,
        "seed": 4,
        "ema_decay": 0.5,
        "l1": 0.1,
    }
    seconds: dict[str, Any] = {
        "state_dtype": "bfloat16",
        "zero_grads": True,
        "l1": 0.2,
        "l1_mode": "decoupled",
        "ema_decay": 0.9,
        "master_weights": True,
    }

    def params() -> tuple[list[Tensor], list[Tensor]]:
        a, b, c = parameters((600,), (33, 7), (), dtype=HALF)
        return [a], [b, c.detach().float().requires_grad_()]

    (a, b), (c, d) = params(), params()
    together = make("AdamW", [{"params": a, **firsts}, {"params": b, **seconds}])
    apart = [make("AdamW", c, **firsts), make("AdamW", d, **seconds)]
    for step in range(4):
        set_gradients(together, step)
        for p, other in zip(a + b, c + d, strict=True):
            other.grad = p.grad.clone()
        together.step()
        for optimizer in apart:
            optimizer.step()
    expected: dict[str, Tensor] = {}
    for i, (optimizer, p) in enumerate(zip((apart[0], apart[1], apart[1]), c + d, strict=True)):
        expected |= {f"parameter {i}": p.detach(), f"gradient {i}": p.grad}
        expected |= {f"{name} {i}": value for name, value in optimizer.state[p].items()}
    assert_same(together, expected)
    assert not b[0].grad.any() and a[0].grad.any() and "remainder 1" in expected


@each_kind
@pytest.mark.parametrize("patched", [False, True], ids=["ours", "patched"])
@pytest.mark.parametrize("unscaled_before", [False, True])
def test_grad_scaler(kind: str, patched: bool, unscaled_before: bool) -> None:
    limit = {} if patched else {"max_grad_norm": 2.0}
    ours = (make_torch if patched else make)(kind, parameters(), **limit)
    torchs = make_torch(kind, parameters())
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    if patched:
        pyfast.patch_optimizer(ours)
    for step in range(5):
        for optimizer, scaler in zip((ours, torchs), scalers, strict=True):
            scaler.scale(torch.ones(()))  # as a backward pass would
            set_gradients(optimizer, step, scaler.get_scale())
            if step == 2:
                all_parameters(optimizer)[0].grad[3, 5] = INFINITY
            if optimizer is torchs or unscaled_before:
                scaler.unscale_(optimizer)
        unscaled = [p.grad.clone() for p in all_parameters(torchs)]
        if not patched:
            norm = torch.nn.utils.clip_grad_norm_(all_parameters(torchs), 2.0)
        before = everything(ours)
        for optimizer, scaler in zip((ours, torchs), scalers, strict=True):
            scaler.step(optimizer), scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_close(all_parameters(ours), all_parameters(torchs))
        if step == 2:
            after = everything(ours)
            assert all(torch.equal(after[k], v) for k, v in before.items() if "gradient" not in k)
            continue
        assert_close([p.grad for p in all_parameters(ours)], unscaled)
        if not patched:
            assert_close([ours.grad_norm], [norm])


@pytest.mark.parametrize("norm_type", [2, 2.0, INFINITY, "inf", 1.0, 3.0, 0.5])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_clip_grad_norm(norm_type: Any, foreach: bool | None) -> None:
    for max_norm in (0.25, 1e9):
        ours, torchs = make("SGD", parameters()), make_torch("SGD", parameters())
        set_gradients(ours, 0), set_gradients(torchs, 0)
        all_parameters(ours)[1].grad = all_parameters(torchs)[1].grad = None
        arguments = (max_norm, norm_type, False, foreach)
        norm = pyfast.optim.clip_grad_norm_(iter(all_parameters(ours)), *arguments)
        expected = torch.nn.utils.clip_grad_norm_(all_parameters(torchs), *arguments)
        assert norm.dtype == expected.dtype and norm.shape == ()
        assert_close([norm], [expected])
        for p, other in zip(all_parameters(ours), all_parameters(torchs), strict=True):
            assert (p.grad is None) == (other.grad is None)
            if p.grad is not None:
                assert_close([p.grad], [other.grad])


def test_clip_grad_norm_of_other_arguments() -> None:
    clip = pyfast.optim.clip_grad_norm_
    (p,) = parameters((50,))
    assert clip(p, 1.0).item() == 0 and clip([], 1.0).item() == 0 and p.grad is None
    with pytest.warns(UserWarning, match="generator"):
        assert clip((q for q in []), 1.0).item() == 0
    p.grad = p.detach().clone()
    norm = clip(p, 0.5)
    assert isinstance(norm, Tensor) and not norm.requires_grad
    assert_close([norm, p.grad.norm()], [p.detach().norm(), torch.tensor(0.5)])
    mixed = [parameters((90,), dtype=d)[0] for d in (HALF, torch.float16, SINGLE, torch.float64)]
    for q in mixed:
        q.grad = q.detach().clone()
    norm = clip((q for q in mixed), 1.0)
    assert_close([norm], [torch.cat([q.detach().double() for q in mixed]).norm()], rtol=1e-3)
    for q in mixed:
        assert q.grad is not None and q.grad.dtype == q.dtype
        eps = torch.finfo(q.dtype).eps
        assert_close([q.grad], [q.double() / norm.double()], rtol=max(eps, 1e-5), atol=1e-6)


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("norm_type", [2.0, INFINITY, 1.0])
def test_clip_grad_norm_that_is_not_finite(value: float, norm_type: float) -> None:
    ours, torchs = make("SGD", parameters()), make_torch("SGD", parameters())
    for optimizer in (ours, torchs):
        set_gradients(optimizer, 0)
        all_parameters(optimizer)[1].grad[2] = value
    before = everything(ours)
    with pytest.raises(RuntimeError, match="non-finite"):
        pyfast.optim.clip_grad_norm_(all_parameters(ours), 1.0, norm_type, error_if_nonfinite=True)
    after = everything(ours)
    for name, tensor in before.items():
        assert_bits_equal(after[name], tensor)
    pyfast.optim.clip_grad_norm_(all_parameters(ours), 1.0, norm_type)
    torch.nn.utils.clip_grad_norm_(all_parameters(torchs), 1.0, norm_type)
    assert_close(*([p.grad for p in all_parameters(x)] for x in (ours, torchs)))
