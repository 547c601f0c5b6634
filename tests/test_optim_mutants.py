"""Oracles of whole runs, and the mutants that these and ``judge.check_steps`` reject."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import optim_oracle as judge
import pytest
import torch
from optim_oracle import CASES, CONFIGS, FORLOOP, NAMES, Class, check_run, parameters, run, torchs


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """MKL's roots are slow with more where the processor is shared."""
    torch.set_num_threads(1)


def check_groups(cls: Class, name: str, kwargs: Any) -> None:
    """Groups with hyper-parameters of their own, one more after two steps, another lr later."""

    def train(cls: Class, **more: Any) -> Any:
        a, b, c, d, e = parameters()
        groups = [{"params": [a, b], **kwargs}, {"params": [c], "lr": 0.03, "weight_decay": 0.7}]
        optimizer = cls(groups, lr=0.02, **more)
        run(optimizer, range(2))
        optimizer.add_param_group({"params": [d, e], **kwargs, "lr": 0.05})
        optimizer.param_groups[0]["lr"] = 0.3
        run(optimizer, range(2, 5))
        return optimizer

    judge.assert_same_run(train(cls), train(torchs(name), **FORLOOP))


def check_missing_gradients(cls: Class, name: str, kwargs: Any) -> None:
    """A parameter without gradient neither moves nor counts the step."""

    def train(cls: Class, **more: Any) -> Any:
        params = parameters()
        optimizer = cls(params, **{**kwargs, **more})
        for step in range(5):
            judge.set_gradients(params, step)
            params[step].grad = params[1].grad = params[step // 2].grad = None
            optimizer.step()
        return optimizer

    judge.assert_same_run(train(cls), train(torchs(name), **FORLOOP))


def through_file(optimizer: Any, cls: Class, kwargs: Any) -> Any:
    file = io.BytesIO()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed = cls(loaded["params"], **kwargs)
    resumed.load_state_dict(loaded["optimizer"])
    return resumed


RESUME: dict[str, Callable[[Any, Class, Any], Any]] = {
    "file": through_file,
    "deepcopy": lambda optimizer, cls, kwargs: copy.deepcopy(optimizer),
    "pickle": lambda optimizer, cls, kwargs: pickle.loads(pickle.dumps(optimizer)),
}


def check_resume(cls: Class, name: str, kwargs: Any, way: str = "file") -> None:
    """What goes on from a checkpoint is what was never interrupted, to the bit."""
    optimizer = cls(parameters(), **kwargs)
    run(optimizer, range(3))
    resumed = RESUME[way](optimizer, cls, kwargs)
    judge.assert_same_run(resumed, optimizer, ulps=0)
    for each in (optimizer, resumed):
        run(each, range(3, 6))
    judge.assert_same_run(resumed, optimizer, ulps=0)


def check_scaler(cls: Class, name: str, kwargs: Any, unscale: bool = False, bad: int = 2) -> None:
    """One step meets an infinity: it is skipped, and not counted."""
    optimizer = cls(parameters(), **kwargs)
    expected = torchs(name)(parameters(), **kwargs, **FORLOOP)
    params, others = (o.param_groups[0]["params"] for o in (optimizer, expected))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(5):
        for each in (params, others):
            judge.set_gradients(each, step)
        for p in params:
            p.grad = scaler.scale(p.grad)
        if step == bad:
            params[3].grad[1, 2, 3] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 2.0)
            torch.nn.utils.clip_grad_norm_(others, 2.0)
        with judge.unchanged(optimizer) if step == bad else nullcontext():
            scaler.step(optimizer)
        scaler.update()
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
        if step != bad:
            expected.step()
            assert all(torch.equal(p.grad, o.grad) for p, o in zip(params, others, strict=True))
    assert scaler.get_scale() == 2048
    judge.assert_same_run(optimizer, expected)


check_steps, few_leaves = judge.check_steps, judge.few_leaves
ORACLES: dict[str, Callable[..., None]] = {
    "steps": lambda cls, name, kwargs: check_steps(cls, name, kwargs, few_leaves()),
    "double": lambda cls, name, kwargs: check_steps(cls, name, kwargs, few_leaves(torch.float64)),
    "run": check_run,
    "groups": check_groups,
    "missing": check_missing_gradients,
    "resume": check_resume,
    "scaler": check_scaler,
}
VALUES = tuple(key for key in ORACLES if key != "resume")
Change = Callable[[Any], Iterator[None]]  # what is done before and after torch's step


def broken(name: str, change: Change, scales: bool = False) -> Any:
    """torch's for-loop class with a defect. ``scales``: it unscales gradients itself."""

    class Mutant(torchs(name)):  # type: ignore[misc]
        _step_supports_amp_scaling = scales

        def __init__(self, params: Any, **kwargs: Any) -> None:
            super().__init__(params, **{**kwargs, **FORLOOP})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            with contextmanager(change)(self):
                super().step()

    return Mutant


def stepped(optimizer: Any) -> list[tuple[Any, Any]]:
    """Every parameter that has a gradient, with its group."""
    groups = optimizer.param_groups
    return [(p, group) for group in groups for p in group["params"] if p.grad is not None]


def forced(**options: Any) -> Change:
    """Some options are not obeyed."""

    def change(optimizer: Any) -> Iterator[None]:
        before = [dict(group) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group.update({key: value for key, value in options.items() if key in group})
        yield
        for group, old in zip(optimizer.param_groups, before, strict=True):
            group.update(old)

    return change


def no_op(optimizer: Any) -> Iterator[None]:
    before = [(p, p.clone()) for p, _ in stepped(optimizer)]
    yield
    for p, old in before:
        p.copy_(old)


def last_tensor_skipped(optimizer: Any) -> Iterator[None]:
    last = stepped(optimizer)[-1][0]
    grad, last.grad = last.grad, None
    yield
    last.grad = grad


def bias_correction_ahead(optimizer: Any) -> Iterator[None]:
    counted: list[Any] = []

    def init_group(group: Any, *lists: Any) -> Any:
        result = type(optimizer)._init_group(optimizer, group, *lists)
        counted.extend(lists[-1])
        lists[-1][:] = [step + 1 for step in lists[-1]]
        return result

    optimizer._init_group = init_group
    yield
    del optimizer._init_group
    for step in counted:
        step += 1


def other_decay(optimizer: Any) -> Iterator[None]:
    """Coupled for decoupled, and the reverse."""
    before = [dict(group) for group in optimizer.param_groups]
    for p, group in stepped(optimizer):
        if not group.get("decoupled_weight_decay"):
            p.mul_(1 - group["lr"] * group["weight_decay"])
    for group in optimizer.param_groups:
        if group.get("decoupled_weight_decay"):
            group["decoupled_weight_decay"] = False
        else:
            group["weight_decay"] = 0
    yield
    for group, old in zip(optimizer.param_groups, before, strict=True):
        group.update(old)


def eps_inside_the_root(optimizer: Any) -> Iterator[None]:
    before = [(p, p.clone(), group) for p, group in stepped(optimizer)]
    yield
    for p, old, group in before:
        state, lr, decay = optimizer.state[p], group["lr"], group["weight_decay"]
        correction1, correction2 = (1 - beta ** state["step"].item() for beta in group["betas"])
        square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        old *= 1 - lr * decay * group["decoupled_weight_decay"]
        root = (square / correction2 + group["eps"]).sqrt()
        p.copy_(old - lr / correction1 * state["exp_avg"] / root)


def neighbour_written(optimizer: Any) -> Iterator[None]:
    yield
    for p, _ in stepped(optimizer):
        if p.storage_offset():
            judge.storage_of(p)[p.storage_offset() - 1] += 1


def stale_lr(optimizer: Any) -> Iterator[None]:
    first = optimizer.__dict__.setdefault("first", {})
    before = [group["lr"] for group in optimizer.param_groups]
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = first.setdefault(i, group["lr"])
    yield
    for group, lr in zip(optimizer.param_groups, before, strict=True):
        group["lr"] = lr


def hidden_count(optimizer: Any) -> Iterator[None]:
    """What is computed depends on how many steps this object has taken."""
    optimizer.count = getattr(optimizer, "count", 0) + 1
    yield
    for p, _ in stepped(optimizer):
        p.mul_(1 + 1e-4 * optimizer.count)


def unused_amsgrad(optimizer: Any) -> Iterator[None]:
    """The maximum is kept and not used."""
    yield from forced(amsgrad=False)(optimizer)
    for p, _ in stepped(optimizer):
        state = optimizer.state[p]
        largest = state.setdefault("max_exp_avg_sq", torch.zeros_like(p))
        torch.maximum(largest, state["exp_avg_sq"], out=largest)


def unused_mean(optimizer: Any) -> Iterator[None]:
    """RMSprop's mean is kept and not used."""
    decays = [group["weight_decay"] * p for p, group in stepped(optimizer)]
    yield from forced(centered=False)(optimizer)
    for (p, group), decay in zip(stepped(optimizer), decays, strict=True):
        mean = optimizer.state[p].setdefault("grad_avg", torch.zeros_like(p))
        mean.lerp_(p.grad + decay, 1 - group["alpha"])


def dampened_first_step(optimizer: Any) -> Iterator[None]:
    first = [(p, group) for p, group in stepped(optimizer) if not optimizer.state.get(p)]
    yield
    for p, group in first:
        momentum = optimizer.state[p].get("momentum_buffer", torch.zeros_like(p))
        p.add_(momentum, alpha=group["lr"] * group["dampening"])
        momentum.mul_(1 - group["dampening"])


def rounded_states(optimizer: Any) -> Iterator[None]:
    yield
    for p, _ in stepped(optimizer):
        for key, value in optimizer.state[p].items():
            if key != "step":
                value.copy_(value.bfloat16())


def counts_without_gradient(optimizer: Any) -> Iterator[None]:
    yield
    for p, state in optimizer.state.items():
        if p.grad is None:
            state["step"] += 1


def unscaled(optimizer: Any, obeys: bool = True, writes: bool = True) -> Iterator[None]:
    """What GradScaler asks of an optimizer that unscales."""
    scale, optimizer.grad_scale = getattr(optimizer, "grad_scale", None), None
    found_inf, optimizer.found_inf = getattr(optimizer, "found_inf", None), None
    given = [(p, p.grad) for p, _ in stepped(optimizer)]
    for p, grad in given:
        p.grad = None if obeys and found_inf else grad / (scale or 1)
    yield
    for p, grad in given:
        p.grad = grad if p.grad is None or not writes else p.grad


def cases(*names: str, config: str = "") -> list[tuple[str, str]]:
    """The configurations of these classes whose names contain a word."""
    return [(name, c) for name, c in CASES if name in (names or NAMES) and config in c]


class Defect(NamedTuple):
    change: Change
    cases: list[tuple[str, str]]
    oracles: tuple[str, ...] = VALUES


ADAMS = ("Adam", "AdamW")
DEFECTS: dict[str, Defect] = {
    "no-op": Defect(no_op, CASES),
    "last tensor skipped": Defect(last_tensor_skipped, CASES),
    "bias correction ahead": Defect(bias_correction_ahead, cases(*ADAMS, "Adamax")),
    "other decay": Defect(other_decay, cases(*ADAMS, "RMSprop", "Adamax", config="dec")),
    "no decay": Defect(forced(weight_decay=0), cases(config="decay")),
    "other eps": Defect(forced(eps=1e-3), cases("Adam", "AdamW", "RMSprop", config="decay")),
    "eps inside the root": Defect(eps_inside_the_root, cases(*ADAMS, config="dec")),
    "other betas": Defect(forced(betas=(0.8, 0.9)), cases(*ADAMS)),
    "no maximize": Defect(forced(maximize=False), cases(config="maximize")),
    "unused amsgrad": Defect(unused_amsgrad, cases(config="amsgrad")),
    "unused mean": Defect(unused_mean, cases(config="centered")),
    "no nesterov": Defect(forced(nesterov=False), cases(config="nesterov")),
    "no dampening": Defect(forced(dampening=0), cases(config="dampening")),
    "dampened first step": Defect(dampened_first_step, cases(config="dampening")),
    "states of 8 bits": Defect(rounded_states, cases(*ADAMS, "RMSprop", "Adamax")),
    "neighbour written": Defect(neighbour_written, CASES, ("steps", "double")),
    "stale lr": Defect(stale_lr, CASES, ("steps", "double", "groups")),
    "hidden count": Defect(hidden_count, CASES, tuple(ORACLES)),
    "counts without gradient": Defect(
        counts_without_gradient, cases(*ADAMS, "RMSprop", "Adamax"), ("missing",)
    ),
}


def wide(round_: Callable[[Any, Any], Any]) -> Change:
    """A class for half precision, which computes in float64 and rounds by ``round_``."""

    def change(optimizer: Any) -> Iterator[None]:
        taken = max((int(s.get("step", 0)) for s in optimizer.state.values()), default=0)
        exact = judge.exact_optimizer(type(optimizer).__bases__[0].__name__, optimizer, taken)
        exact.step()
        yield
        for p, twin in zip(*(o.param_groups[0]["params"] for o in (optimizer, exact)), strict=True):
            p.copy_(round_(twin, p.dtype))
            for key, value in exact.state[twin].items():
                optimizer.state[p][key].copy_(round_(value, p.dtype) if key != "step" else value)

    return change


def truncated(exact: Any, dtype: torch.dtype) -> Any:
    """Toward zero."""
    nearest = exact.to(dtype)
    away = (nearest.double().abs() > exact.abs()).to(nearest)
    return nearest - away * nearest.sign() * torch.finfo(dtype).eps * nearest.abs() / 2


@pytest.mark.parametrize("name, config", CASES)
@pytest.mark.parametrize("oracle", ORACLES)
def test_honest_classes_pass(oracle: str, name: str, config: str) -> None:
    for cls in (torchs(name), broken(name, lambda optimizer: iter((None,)))):
        ORACLES[oracle](cls, name, CONFIGS[name][config])


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_rejected(defect: str) -> None:
    change, chosen, oracles = DEFECTS[defect]
    for name, config in chosen:
        for oracle in oracles:
            with pytest.raises(AssertionError):
                ORACLES[oracle](broken(name, change), name, CONFIGS[name][config])
                pytest.fail(f"{oracle} accepts {defect} in {name}, {config}")


@pytest.mark.parametrize("name, config", CASES)
@pytest.mark.parametrize("dtype", judge.HALF, ids=str)
def test_half_precision(dtype: torch.dtype, name: str, config: str) -> None:
    """One rounding passes; truncation does not, nor torch's rounding after every operation."""

    def check(cls: Class) -> None:
        judge.check_steps(cls, name, CONFIGS[name][config], judge.few_leaves(dtype))

    check(broken(name, wide(lambda exact, dtype: exact.to(dtype))))
    for change in (wide(truncated), lambda optimizer: iter((None,))):
        with pytest.raises(AssertionError, match="wrong"):
            check(broken(name, change))


@pytest.mark.parametrize("name", NAMES)
def test_scaling(name: str) -> None:
    """Of classes that unscale themselves."""
    check_scaler(broken(name, unscaled, scales=True), name, {})
    for defect in ({"obeys": False}, {"writes": False}):
        with pytest.raises(AssertionError):
            check_scaler(broken(name, partial(unscaled, **defect), scales=True), name, {})
