"""The optimizers are drop-ins: torch's contract, on the default backend."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import optim_oracle as judge
import pytest
import test_optim_mutants as runs
import torch
from optim_oracle import CASES, CONFIGS, FORLOOP, NAMES, assert_same_run, parameters, run, torchs
from torch import Tensor
from torch.optim import optimizer as base

import pyfast

one_thread = runs.one_thread
by_name = pytest.mark.parametrize("name", NAMES)
by_case = pytest.mark.parametrize("name, config", CASES)


def ours(name: str) -> Any:
    return getattr(pyfast.optim, name)


def both(name: str, train: Callable[..., Any], same_strides: bool = True, **kwargs: Any) -> None:
    """The same run with either class; ``train`` returns an optimizer, or one with notes."""
    plain = {key: value for key, value in kwargs.items() if key not in judge.FLAGS}
    results = [train(ours(name), **kwargs), train(torchs(name), **plain, **FORLOOP)]
    if isinstance(results[0], tuple):
        assert results[0][1] == results[1][1]
        results = [result[0] for result in results]
    assert_same_run(*results, same_strides=same_strides)


@pytest.mark.parametrize("name, kwargs", [*judge.torchs_inputs()])
def test_torchs_configurations(name: str, kwargs: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.float64):
        judge.check_run(ours(name), name, kwargs, dtype)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name, entry", [*judge.torchs_error_inputs()])
def test_torchs_errors(name: str, entry: Any) -> None:
    given, texts = entry.optimizer_error_input, []
    for cls in (ours(name), torchs(name)):
        with pytest.raises(entry.error_type, match=entry.error_regex) as error:
            cls(given.params, **given.kwargs)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


@by_name
@pytest.mark.parametrize("mistake", judge.ERRORS)
def test_other_errors(name: str, mistake: str) -> None:
    """torch's texts; what pyfast adds follows."""
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        judge.ERRORS[mistake](torchs(name))
    with pytest.raises(expected.type) as error:
        judge.ERRORS[mistake](ours(name))
    assert str(error.value).startswith(str(expected.value))


@by_name
def test_class(name: str) -> None:
    cls, theirs = ours(name), torchs(name)
    assert issubclass(cls, theirs) and cls.__name__ == name
    given, expected = (list(inspect.signature(c).parameters.values()) for c in (cls, theirs))
    for p, e in zip(given, expected, strict=False):
        assert (p.name, p.kind, p.default) == (e.name, e.kind, e.default)
    a, b = cls(parameters()), theirs(parameters())
    assert a.defaults == b.defaults and list(a.defaults) == list(b.defaults)
    assert list(a.param_groups[0]) == list(b.param_groups[0])
    assert repr(a) == repr(b)
    assert "grad_scaler" not in inspect.signature(a.step).parameters


@by_case
@pytest.mark.parametrize("dtype", judge.DTYPES, ids=str)
def test_states(name: str, config: str, dtype: torch.dtype) -> None:
    """Keys, dtypes, shapes, strides and devices are torch's, and so is all else in state_dict."""
    pair = []
    for cls, more in ((ours(name), {}), (torchs(name), FORLOOP)):
        made = [make(dtype).fill_(0.5).detach() for make in judge.LAYOUTS.values()]
        optimizer = cls([t.requires_grad_() for t in made], **CONFIGS[name][config], **more)
        assert optimizer.state_dict()["state"] == {}
        run(optimizer, range(2))
        pair.append(optimizer)
    assert_same_run(*pair, ulps=None if dtype in judge.HALF else 64)
    dicts = [optimizer.state_dict() for optimizer in pair]
    assert list(dicts[0]) == list(dicts[1])
    dicts[1]["param_groups"][0]["foreach"] = None
    assert dicts[0]["param_groups"] == dicts[1]["param_groups"]


LEAVES: dict[str, Callable[[], list[judge.Leaf]]] = {
    "sizes": judge.leaves_of_sizes,
    **{str(dtype): partial(judge.few_leaves, dtype) for dtype in judge.DTYPES},
    **{layout: partial(judge.leaves_of_layout, layout) for layout in judge.LAYOUTS},
}


@by_case
@pytest.mark.parametrize("leaves", LEAVES)
def test_steps(name: str, config: str, leaves: str) -> None:
    judge.check_steps(ours(name), name, CONFIGS[name][config], LEAVES[leaves]())


@by_case
def test_groups(name: str, config: str) -> None:
    runs.check_groups(ours(name), name, CONFIGS[name][config])
    runs.check_missing_gradients(ours(name), name, CONFIGS[name][config])


@by_case
@pytest.mark.parametrize("way", runs.RESUME)
def test_resume(name: str, config: str, way: str) -> None:
    runs.check_resume(ours(name), name, CONFIGS[name][config], way)


@by_case
@pytest.mark.parametrize("flags", [FORLOOP, {"foreach": True}, {"fused": True}], ids=str)
def test_checkpoints_of_torch(name: str, config: str, flags: dict[str, bool]) -> None:
    """Either class goes on from a checkpoint of the other."""
    if "fused" in flags and name in ("RMSprop", "Adamax"):
        pytest.skip("torch has no fused kernel")
    kwargs = CONFIGS[name][config]
    for first, second in itertools.permutations([(ours(name), {}), (torchs(name), flags)]):
        start = first[0](parameters(), **kwargs, **first[1])
        run(start, range(3))
        params = [p.detach().clone().requires_grad_() for p in start.param_groups[0]["params"]]
        end = second[0](params, **kwargs, **second[1])
        end.load_state_dict(copy.deepcopy(start.state_dict()))
        assert end.param_groups[0]["foreach"] == start.param_groups[0]["foreach"]
        run(end, range(3, 6))
        plain = torchs(name)(parameters(), **kwargs, **FORLOOP)
        run(plain, range(6))
        assert_same_run(end, plain)


@by_case
def test_checkpoint_of_another_layout(name: str, config: str) -> None:
    """States that were contiguous, for a model that is now channels last, and so are they then."""

    def train(cls: Any, **kwargs: Any) -> Any:
        contiguous = torch.arange(210.0).sin().view(2, 5, 3, 7)
        start = torchs(name)([contiguous.requires_grad_()], **CONFIGS[name][config], **FORLOOP)
        run(start, range(2))
        param = contiguous.detach().to(memory_format=torch.channels_last)
        optimizer = cls([param.requires_grad_()], **kwargs)
        optimizer.load_state_dict(start.state_dict())
        run(optimizer, range(2, 5))
        return optimizer

    both(name, train, same_strides=False, **CONFIGS[name][config])


@by_name
def test_old_checkpoints(name: str) -> None:
    """``step`` was a number once, and SGD stored None without momentum."""

    def train(cls: Any, **kwargs: Any) -> Any:
        optimizer = cls(parameters(), **kwargs)
        run(optimizer, range(0 if name == "SGD" else 2))
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state["step"] = int(state["step"])
        saved["state"] = saved["state"] or {0: {"momentum_buffer": None}, 1: {}}
        optimizer.load_state_dict(saved)
        run(optimizer, range(2, 5))
        return optimizer

    both(name, train, **(CONFIGS["SGD"]["dampening"] if name == "SGD" else {}))


@by_name
def test_closure(name: str) -> None:
    def train(cls: Any, **kwargs: Any) -> Any:
        optimizer, notes = cls(parameters(), **kwargs), []

        def closure() -> Tensor:
            notes.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = sum((p * p).sum() for p in optimizer.param_groups[0]["params"])
            loss.backward()
            return loss

        with torch.no_grad():
            notes += [round(optimizer.step(closure).item(), 3) for _ in range(3)]
        return optimizer, (notes, optimizer.step())

    both(name, train)


@by_name
def test_hooks(name: str) -> None:
    """Of steps and of state_dict: each once, in torch's order."""

    def train(cls: Any, **kwargs: Any) -> Any:
        optimizer, notes = cls(parameters(), **kwargs), []
        note = lambda text: lambda *args: notes.append((text, len(args)))  # noqa: E731
        closure = note("closure")
        handles = [
            base.register_optimizer_step_pre_hook(note("global before")),
            base.register_optimizer_step_post_hook(note("global after")),
            optimizer.register_step_pre_hook(lambda o, *_: ((o, closure), {})),
        ]
        whats = ("step", "state_dict", "load_state_dict")
        for hook in [f"register_{w}_{when}_hook" for w in whats for when in ("pre", "post")]:
            handles.append(getattr(optimizer, hook)(note(hook)))
        run(optimizer, range(2))
        optimizer.load_state_dict(optimizer.state_dict())
        for handle in handles:
            handle.remove()
        run(optimizer, range(2, 3))
        return optimizer, notes

    both(name, train)


@by_name
def test_gradients(name: str) -> None:
    """zero_grad both ways; a step leaves gradients as they are, and autograd notices it."""
    optimizer = ours(name)(parameters())
    params = optimizer.param_groups[0]["params"]
    judge.set_gradients(params, 0)
    before = [(p.grad, p.grad.clone()) for p in params]
    loss = (params[0] * params[0]).sum()
    optimizer.step()
    for p, (grad, value) in zip(params, before, strict=True):
        assert p.grad is grad and torch.equal(grad, value)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is old[0] and not old[0].any() for p, old in zip(params, before, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@by_case
def test_extreme_gradients(name: str, config: str) -> None:
    """NaN, Inf, large and subnormal ones."""
    kinds = (float("nan"), float("inf"), -float("inf"), 1e-38, -1e-42, 0.0, -0.0, 1e18, -1e18, 1.0)
    pair = []
    for cls, more in ((ours(name), {}), (torchs(name), FORLOOP)):
        p = torch.linspace(-1, 1, 70).requires_grad_()
        optimizer = cls([p], **CONFIGS[name][config], **more)
        for p.grad in (torch.tensor(kinds * 7), torch.ones(70)):
            optimizer.step()
        pair.append(dict(judge.tensors_of(optimizer)))
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6, equal_nan=True)


@by_name
def test_negated_gradient(name: str) -> None:
    """As ``z.conj().imag`` is: memory holds the values with the other sign."""
    negated = lambda d: torch._neg_view(judge.LAYOUTS["contiguous"](d))  # noqa: E731
    leaves = [judge.leaf(judge.LAYOUTS["gaps"], negated, dtype) for dtype in judge.DTYPES]
    judge.check_steps(ours(name), name, {}, leaves)


@pytest.mark.parametrize("case", judge.TENSORS)
@by_name
def test_tensor_hyperparameters(name: str, case: str) -> None:
    """A change of the tensor counts, and the tensor stays the group's."""
    accepted = inspect.signature(torchs(name)).parameters
    if not set(judge.TENSORS[case]) <= set(accepted) or ("betas" in case and name == "Adamax"):
        pytest.skip("torch has no such argument")

    def train(cls: Any, **kwargs: Any) -> Any:
        optimizer = cls(parameters(), **copy.deepcopy(kwargs))
        lr = optimizer.param_groups[0]["lr"]
        run(optimizer, range(3))
        if isinstance(lr, Tensor):
            lr.mul_(0.25)
        run(optimizer, range(3, 6))
        assert optimizer.param_groups[0]["lr"] is lr
        return optimizer

    both(name, train, **judge.TENSORS[case])


@pytest.mark.filterwarnings("error")  # "lr_scheduler.step() before optimizer.step()"
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("scheduler", judge.SCHEDULERS)
@by_name
def test_schedulers(name: str, scheduler: str, lr: Any) -> None:
    def train(cls: Any, **kwargs: Any) -> Any:
        optimizer = cls(parameters(), lr=copy.deepcopy(lr), **kwargs)
        schedule = judge.SCHEDULERS[scheduler](optimizer)
        metric = (1.0,) if scheduler == "ReduceLROnPlateau" else ()
        run(optimizer, range(8), lambda: schedule.step(*metric))
        assert optimizer.param_groups[0]["lr"] != 0.1
        return optimizer

    both(name, train)


@by_name
def test_named_parameters(name: str) -> None:
    optimizer = ours(name)(zip("abcde", parameters(), strict=True))
    run(optimizer, range(2))
    saved = optimizer.state_dict()
    other = ours(name)(parameters())
    other.load_state_dict(saved)
    for group in (saved["param_groups"][0], other.param_groups[0]):
        assert group["param_names"] == list("abcde")


@by_case
def test_duplicate_parameters(name: str, config: str) -> None:
    """Warned of, and then stepped twice."""

    def train(cls: Any, **kwargs: Any) -> Any:
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = cls(judge.duplicate(), **kwargs)
        run(optimizer, range(3))
        return optimizer

    both(name, train, **CONFIGS[name][config])


@by_case
def test_complex_parameters(name: str, config: str) -> None:
    """Alone, and between real ones."""

    def train(cls: Any, **kwargs: Any) -> Any:
        a, b, *others = parameters()
        params = [a, torch.complex(b.detach(), -b.detach()).requires_grad_(), *others]
        optimizer = cls(params, **kwargs)
        run(optimizer, range(4))
        return optimizer

    both(name, train, **CONFIGS[name][config])


@by_case
def test_differentiable(name: str, config: str) -> None:
    """Gradients of what a step computes, for the parameter and its gradient."""
    results = []
    for cls in (ours(name), torchs(name)):
        p, grad = torch.linspace(1, 2, 24, dtype=torch.float64).view(2, 3, 4).requires_grad_()
        moved = p.clone()
        moved.grad = grad
        cls([moved], differentiable=True, **CONFIGS[name][config]).step()
        loss = (moved * moved).sum()
        results += [(moved, *torch.autograd.grad(loss, (p, grad), materialize_grads=True))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@by_name
@pytest.mark.parametrize("steps", [0, 2])
def test_sparse_gradient(name: str, steps: int) -> None:
    """torch's error, or torch's result; after the error nothing has changed."""

    def train(cls: Any, **kwargs: Any) -> Any:
        params = parameters()
        optimizer = cls([{"params": params[:2]}, {"params": params[2:]}], **kwargs)
        run(optimizer, range(steps))
        judge.set_gradients(params, steps)
        params[3].grad = params[3].grad.to_sparse()
        return optimizer

    actual, expected = train(ours(name)), train(torchs(name), **FORLOOP)
    if name == "SGD":
        actual.step(), expected.step()
        return assert_same_run(actual, expected)
    with pytest.raises(RuntimeError, match="does not support sparse") as expected_error:
        expected.step()
    with judge.unchanged(actual), pytest.raises(RuntimeError, match=f"^{expected_error.value}$"):
        actual.step()


@by_case
@pytest.mark.parametrize("bad_step", [0, 2])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale and clip"])
def test_grad_scaler(name: str, config: str, unscale: bool, bad_step: int) -> None:
    runs.check_scaler(ours(name), name, CONFIGS[name][config], unscale, bad_step)


@by_case
def test_threads(name: str, config: str) -> None:
    """Bit-equal for every number of threads."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params = [torch.linspace(-1, 1, n).requires_grad_() for n in (300_001, 7, 40_000, 16_385)]
        results.append(ours(name)(params, **CONFIGS[name][config]))
        for factor in (37, 38):
            for p in params:
                p.grad = p.detach() * factor
            results[-1].step()
    for other in results[1:]:
        assert_same_run(other, results[0], ulps=0)
