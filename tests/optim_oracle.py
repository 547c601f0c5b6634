"""What an optimizer must compute: oracles that take its class, an honest one or a mutant."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

NAMES = ("Adam", "AdamW", "SGD", "RMSprop", "Adamax")
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)
FORLOOP = {"foreach": False}
FLAGS = ("foreach", "fused", "capturable", "differentiable")
Class = Callable[..., torch.optim.Optimizer]
Make = Callable[[torch.dtype], Tensor]

# eps and lr are large: what depends on them is then far above rounding.
ADAM = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 0.1, "weight_decay": 0.3}
RMS = {"lr": 0.1, "alpha": 0.9, "eps": 0.1, "weight_decay": 0.3}
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "Adam": {
        "defaults": {},
        "decay": ADAM,
        "amsgrad, maximize": {**ADAM, "amsgrad": True, "maximize": True},
        "decoupled": {**ADAM, "decoupled_weight_decay": True},
    },
    "AdamW": {
        "defaults": {},
        "decay": ADAM,
        "amsgrad, maximize": {**ADAM, "amsgrad": True, "maximize": True},
    },
    "SGD": {
        "defaults": {},
        "decay": {"lr": 0.1, "weight_decay": 0.3},
        "dampening": {"lr": 0.1, "momentum": 0.8, "dampening": 0.4, "weight_decay": 0.3},
        "nesterov": {"lr": 0.1, "momentum": 0.8, "nesterov": True, "maximize": True},
    },
    "RMSprop": {
        "defaults": {},
        "decay": RMS,
        "momentum": {**RMS, "momentum": 0.8, "maximize": True},
        "centered": {**RMS, "centered": True},
        "centered, momentum": {**RMS, "centered": True, "momentum": 0.8},
    },
    "Adamax": {
        "defaults": {},
        "decay": {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.3},
        "maximize": {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.1, "maximize": True},
    },
}
CASES = [(name, config) for name in NAMES for config in CONFIGS[name]]


def torchs(name: str) -> Any:
    return getattr(torch.optim, name)


LAYOUTS: dict[str, Make] = {  # all of one shape
    "contiguous": lambda d: torch.empty(3, 5, 6, 7, dtype=d),
    "misaligned": lambda d: torch.empty(3 * 5 * 6 * 7 + 1, dtype=d)[1:].view(3, 5, 6, 7),
    "transposed": lambda d: torch.empty(7, 6, 5, 3, dtype=d).permute(3, 2, 1, 0),
    "channels last": lambda d: torch.empty(3, 6, 7, 5, dtype=d).permute(0, 3, 1, 2),
    "gaps": lambda d: torch.empty(4, 11, 9, 17, dtype=d)[1:, :10:2, 2:8, 2:16:2],
    "rows with gaps": lambda d: torch.empty(3, 5, 6, 12, dtype=d)[..., 3:10],
}
EXPANDED: dict[str, Make] = {  # gradients only
    "expanded number": lambda d: torch.empty(1, dtype=d).expand(3, 5, 6, 7),
    "expanded rows": lambda d: torch.empty(3, 5, 1, 7, dtype=d).expand(3, 5, 6, 7),
    "expanded columns": lambda d: torch.empty(1, 5, 6, 1, dtype=d).expand(3, 5, 6, 7),
}


class Leaf(NamedTuple):
    """A parameter, what makes memory for a gradient of it, and a name for messages."""

    param: Tensor
    make_grad: Callable[[], Tensor]
    label: str


def storage_of(t: Tensor) -> Tensor:
    """All the memory that ``t`` is a view of."""
    return torch.empty(0, dtype=t.dtype).set_(t.detach().untyped_storage())


def filled(t: Tensor, seed: int) -> Tensor:
    """``t`` and the memory around it with normal values, a few zeros among them."""
    memory = storage_of(t)
    values = torch.randn(memory.shape, generator=torch.Generator().manual_seed(seed))
    values[5::29] = 0
    memory.copy_(values)
    return t


def leaf(make_param: Make, make_grad: Make, dtype: torch.dtype, label: str = "") -> Leaf:
    param = filled(make_param(dtype), 7).detach().requires_grad_()
    return Leaf(param, lambda: make_grad(dtype), f"{label} {dtype}")


def leaves_of_layout(layout: str) -> list[Leaf]:
    """In every dtype, with gradients of every layout."""
    grads = {**LAYOUTS, **EXPANDED}
    return [
        leaf(LAYOUTS[layout], make, dtype, f"{layout} with gradient {name}")
        for name, make in grads.items()
        for dtype in DTYPES
    ]


def leaves_of_sizes() -> list[Leaf]:
    def vector(n: int) -> Make:
        return lambda d: torch.empty(n, dtype=d)

    sizes = [leaf(vector(n), vector(n), DTYPES[n % 4], f"[{n}]") for n in range(66)]
    scalar: Make = lambda d: torch.empty((), dtype=d)  # noqa: E731
    empty: Make = lambda d: torch.empty(3, 0, dtype=d)  # noqa: E731
    sizes += [leaf(scalar, scalar, dtype, "scalar") for dtype in DTYPES]
    return [*sizes, *(leaf(empty, empty, dtype, "empty") for dtype in DTYPES)]


def few_leaves(dtype: torch.dtype = torch.float32) -> list[Leaf]:
    """Small; the last parameter is one with memory of others between its elements."""
    chosen = [("contiguous", "contiguous"), ("misaligned", "transposed"), ("gaps", "channels last")]
    return [leaf(LAYOUTS[p], LAYOUTS[g], dtype, f"{p} with gradient {g}") for p, g in chosen]


def doubled(value: Any) -> Any:
    return value.detach().double().clone() if isinstance(value, Tensor) else value


def exact_optimizer(name: str, optimizer: torch.optim.Optimizer, taken: int) -> Any:
    """torch's for-loop in float64 at the point where ``optimizer`` is, ``taken`` steps done."""
    twins = {p: p.detach().double().clone() for g in optimizer.param_groups for p in g["params"]}
    groups = []
    for group in optimizer.param_groups:
        params = [twins[p] for p in group["params"]]
        groups.append({**group, "params": params, "foreach": False, "fused": None})
    exact = torchs(name)(groups)
    for p, twin in twins.items():
        twin.grad = p.grad.double()
        if optimizer.state.get(p):
            exact.state[twin] = {k: doubled(v) for k, v in optimizer.state[p].items()}
            if "step" in exact.state[twin]:
                exact.state[twin]["step"] = torch.tensor(float(taken))
    return exact


def assert_rounded(actual: Tensor, exact: Tensor, before: Tensor, message: str) -> None:
    """``actual`` is ``exact`` rounded once to its dtype, after some noise of the arithmetic.

    The noise is 8 units of float32, for float64 1e-12, of what the value was, became, and of the
    largest change in the tensor: a difference of large numbers is as inexact as they are.
    """
    assert actual.shape == exact.shape, f"{message}: shape {actual.shape} is wrong"
    if not actual.numel():
        return
    finfo = torch.finfo(actual.dtype)
    valid = ~exact.isnan()  # the root of a variance that was rounded below zero
    assert valid.double().mean() > 0.9, f"{message}: the oracle itself computes NaN"
    sizes = exact.abs() + before.abs() + (exact - before)[valid].abs().max()
    noise = (1e-12 if actual.dtype == torch.float64 else 8 * 2.0**-23) * sizes
    ulp = finfo.eps * 2.0 ** (torch.frexp(exact).exponent.double() - 1)
    rounding = ulp.clamp_min(finfo.tiny * finfo.eps) / 2 if actual.dtype in HALF else 0.0
    wrong = valid & ~((actual.detach().double() - exact).abs() <= noise + rounding)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        text = f"{actual[at].item()!r} for {exact[at].item()!r} at {at}"
        raise AssertionError(f"{message}: {int(wrong.sum())} of {wrong.numel()} wrong, {text}")


def assert_states(optimizer: Any, exact: Any, before: Any, taken: int, leaves: list[Leaf]) -> None:
    """The states are torch's, by key, dtype, shape and strides, and exact; also the parameters."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    twins = [p for g in exact.param_groups for p in g["params"]]
    for p, twin, (old, old_state), entry in zip(params, twins, before, leaves, strict=True):
        message = f"{entry.label}, step {taken}"
        assert_rounded(p, twin, old, message)
        state, exact_state = optimizer.state.get(p, {}), exact.state.get(twin, {})
        assert list(state) == list(exact_state), f"{message}: wrong states {list(state)}"
        for key, value in state.items():
            if key == "step":
                assert value.item() == taken, f"{message}: wrong step {value}"
                continue
            assert value.dtype == p.dtype, f"{message}: wrong dtype of {key}, {value.dtype}"
            was = old_state.get(key, torch.zeros(()))
            assert_rounded(value, exact_state[key], was.expand(p.shape), f"{message}, {key}")


class Memory:
    """The memory around parameters and of gradients, which a step leaves as it is."""

    def __init__(self, written: list[Tensor], read: list[Tensor]) -> None:
        self.tensors = {t.untyped_storage().data_ptr(): storage_of(t) for t in (*written, *read)}
        self.before = {key: t.clone() for key, t in self.tensors.items()}
        self.written = written

    def assert_unchanged(self) -> None:
        after = {key: t.clone() for key, t in self.tensors.items()}
        for memory in (after, self.before):
            for p in self.written:
                whole = memory[p.untyped_storage().data_ptr()]
                whole.as_strided(p.shape, p.stride(), p.storage_offset()).zero_()
        for key, whole in after.items():
            assert torch.equal(whole, self.before[key]), "memory of neighbours was overwritten"


def check_steps(cls: Class, name: str, kwargs: Any, leaves: list[Leaf], steps: int = 4) -> None:
    """Every step by itself against one in float64 from the same point, with an lr of its own."""
    optimizer = cls([entry.param for entry in leaves], **kwargs)
    lr = optimizer.param_groups[0]["lr"]
    for taken in range(steps):
        optimizer.param_groups[0]["lr"] = lr / (1 + taken % 3)
        for i, entry in enumerate(leaves):
            entry.param.grad = filled(entry.make_grad(), 1000 * taken + i)
        params = [entry.param for entry in leaves]
        states = [optimizer.state.get(p, {}) for p in params]
        before = [
            (doubled(p), {k: doubled(v) for k, v in s.items()})
            for p, s in zip(params, states, strict=True)
        ]
        exact = exact_optimizer(name, optimizer, taken)
        exact.step()
        memory = Memory([p for p in params if p.numel()], [p.grad for p in params if p.numel()])
        optimizer.step()
        memory.assert_unchanged()
        assert_states(optimizer, exact, before, taken + 1, leaves)


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((3, 5), (7,), (), (2, 3, 4), (40,))
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def set_gradients(params: list[Tensor], step: int) -> None:
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + i)
        real = torch.randn(p.shape, generator=generator)
        imaginary = torch.randn(p.shape, generator=generator)
        values = torch.complex(real, imaginary) if p.is_complex() else real
        p.grad = torch.empty_like(p, requires_grad=False).copy_(values)


def run(optimizer: Any, steps: range, between: Callable[[], Any] = lambda: None) -> None:
    """Steps with gradients that depend on nothing but the step; ``between`` after each."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
        between()


def tensors_of(optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and states, in the order of the parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        yield f"parameter {i}", p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            yield f"parameter {i}, {key}", value


def assert_same_run(
    actual: Any, expected: Any, ulps: float | None = 64, same_strides: bool = True
) -> None:
    """Parameters and states within ``ulps`` units, 0: bit-equal, None: whatever the values."""
    pairs = list(tensors_of(actual)), list(tensors_of(expected))
    assert [k for k, _ in pairs[0]] == [k for k, _ in pairs[1]], "other states"
    for (key, a), (_, e) in zip(*pairs, strict=True):
        facts = [(t.dtype, t.shape, t.device, same_strides and t.stride()) for t in (a, e)]
        assert facts[0] == facts[1], f"{key}: {facts[0]} instead of {facts[1]}"
        if ulps is None or not a.numel():
            continue
        allowed = ulps * torch.finfo(a.dtype).eps * max(1e-6, float(e.abs().max()))
        error = float((a - e).abs().max())
        assert error <= allowed, f"{key}: off by {error:.3g}, allowed {allowed:.3g}"


def check_run(cls: Class, name: str, kwargs: Any, dtype: torch.dtype = torch.float32) -> None:
    """Six steps as torch's for-loop in the same dtype."""
    ours = cls(parameters(dtype), **copy.deepcopy(kwargs))
    plain = {key: value for key, value in kwargs.items() if key not in FLAGS}
    if kwargs.get("differentiable"):  # computes in float32 what the others do in double
        plain["differentiable"] = True
    expected = torchs(name)(parameters(dtype), **plain, **FORLOOP)
    for optimizer in (ours, expected):
        for p in optimizer.param_groups[0]["params"] if "differentiable" in plain else ():
            p.requires_grad_(False)
        run(optimizer, range(6))
    assert_same_run(ours, expected)


def duplicate() -> list[Tensor]:
    return parameters()[:1] * 2


ERRORS: dict[str, Callable[[Any], Any]] = {
    "no parameters": lambda cls: cls([]),
    "one tensor": lambda cls: cls(torch.zeros(3)),
    "a number": lambda cls: cls([3]),
    "a set": lambda cls: cls([{"params": set(parameters())}]),
    "not a leaf": lambda cls: cls([parameters()[0] * 2]),
    "unknown argument": lambda cls: cls(parameters(), lrr=1),
    "negative lr": lambda cls: cls(parameters(), lr=-1.0),
    "lr of two": lambda cls: cls(parameters(), lr=torch.ones(2)),
    "negative eps": lambda cls: cls(parameters(), eps=-1.0),
    "negative decay": lambda cls: cls(parameters(), weight_decay=-1.0),
    "large beta": lambda cls: cls(parameters(), betas=(0.5, 1.5)),
    "negative momentum": lambda cls: cls(parameters(), momentum=-1.0),
    "nesterov alone": lambda cls: cls(parameters(), nesterov=True),
    "two ways": lambda cls: cls(parameters(), fused=True, foreach=True),
    "fused, differentiable": lambda cls: cls(parameters(), fused=True, differentiable=True),
    "group not a dict": lambda cls: cls(parameters()).add_param_group(parameters()),
    "parameter twice": lambda cls: cls([{"params": p} for p in duplicate()]),
    "state of other groups": lambda cls: cls(parameters()).load_state_dict(
        cls([{"params": p} for p in parameters()]).state_dict()
    ),
    "state of fewer": lambda cls: cls(parameters()).load_state_dict(
        cls(parameters()[1:]).state_dict()
    ),
    "integers": lambda cls: step_of(cls([torch.ones(2, dtype=torch.int32)])),
    "fused integers": lambda cls: step_of(cls([torch.ones(2, dtype=torch.int32)], fused=True)),
}


def step_of(optimizer: Any) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()


@contextmanager
def unchanged(optimizer: Any) -> Iterator[None]:
    before = [(key, t.clone()) for key, t in tensors_of(optimizer)]
    yield
    after = list(tensors_of(optimizer))
    assert [key for key, _ in after] == [key for key, _ in before]
    for (key, a), (_, b) in zip(after, before, strict=True):
        assert torch.equal(a, b), f"{key} has changed"


def torchs_info(name: str) -> Any:
    """What torch tests its class with."""
    flag = "__allow_nonbracketed_mutation_flag"
    before = getattr(torch.backends, flag)
    from torch.testing._internal import common_optimizers

    setattr(torch.backends, flag, before)  # the import freezes torch.backends
    info = next(i for i in common_optimizers.optim_db if i.optim_cls is torchs(name))
    info.with_flags = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs
    return info


def torchs_inputs() -> Iterator[Any]:
    """Names, arguments and ids: with each flag, without any, and with foreach."""
    for name in NAMES:
        info = torchs_info(name)
        for entry in info.with_flags("cpu", None, info):
            yield pytest.param(name, entry.kwargs, id=f"{name}: {entry.desc}, flags given")
        for entry in info.optim_inputs_func(device="cpu"):
            yield pytest.param(name, entry.kwargs, id=f"{name}: {entry.desc}")
            if not isinstance(entry.kwargs.get("lr"), Tensor):
                kwargs = {**entry.kwargs, "foreach": True}
                yield pytest.param(name, kwargs, id=f"{name}: {entry.desc}, foreach")


def torchs_error_inputs() -> Iterator[Any]:
    for name in NAMES:
        for entry in torchs_info(name).optim_error_inputs_func("cpu", torch.float32):
            yield pytest.param(name, entry, id=f"{name}: {entry.optimizer_error_input.desc}")


TENSORS: dict[str, dict[str, Any]] = {
    "lr": {"lr": torch.tensor(0.01)},
    "lr of one dimension": {"lr": torch.tensor([0.01])},
    "lr, foreach=False": {"lr": torch.tensor(0.01), "foreach": False},
    "lr, fused": {"lr": torch.tensor(0.01), "fused": True},
    "lr, fused, capturable": {"lr": torch.tensor(0.01), "fused": True, "capturable": True},
    "betas": {"betas": (torch.tensor(0.875), torch.tensor([[0.9375]]))},
    "betas, lr": {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.875), torch.tensor(0.9375))},
}


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
}
