"""Whole steps of optimizers against torch's: fused, foreach, for-loop, and with clipping and
averages as calls of their own.

Every row steps the same parameters, whose gradients are there and stay; its states are its own. The
first call, which makes the states, is not timed: ``peak_bytes`` is what they take.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

import pyfast

from .cases import (
    BaseCase,
    Call,
    Prepared,
    difference,
    first_line,
    normal,
    parametrize,
    run_with_pytest,
)

if TYPE_CHECKING:
    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture

Groups = list[dict[str, Any]]

LEARNING_RATE = 1e-3
FORLOOP = {"foreach": False}
FUSED = {"torch": {"fused": True}}
LARGE = (4, 4096, 4096)
SINGLE = (1, 1 << 26)
QUICK = (64, 256, 256)  # the most that --quick measures

CHECK_TENSORS, CHECK_SIZE, CHECK_LENGTH = 100, 71, 4999
CHECK_STEPS = 10
CHECK_LEARNING_RATE = 0.1  # what a step does is then far above the rounding of bfloat16
MAX_INT8_ERROR = 0.1  # of all steps together, against what they should do


@dataclass(frozen=True)
class OptimizerCase(BaseCase):
    """A step of ``shape[0]`` tensors of ``shape[1:]``.

    Attributes:
        optimizer: the name of the class.
        bytes_per_parameter: parameter, states and averages read and written, gradient read; twice
            where the norm comes first.
        rows: torch's, by name: the arguments that choose among its implementations.
        options: arguments of torch's and of pyfast's class.
        extras: arguments of pyfast's class alone. ``max_grad_norm`` and ``ema_decay``, which go
            together, are calls before and after the step in torch's rows.
        num_groups: param groups, each with a learning rate of its own.
        others: further rows, by name: functions of the groups that give an optimizer.
    """

    optimizer: str
    bytes_per_parameter: float
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: FUSED)
    options: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    num_groups: int = 1
    others: Mapping[str, Callable[[Groups], Optimizer]] = field(default_factory=dict)
    optional: ClassVar[tuple[str, ...]] = ("bitsandbytes", "torchao")

    @property
    def num_bytes(self) -> int:
        return round(self.bytes_per_parameter * self.num_elements)

    @property
    def implementations(self) -> tuple[str, ...]:
        return (*self.rows, *self.others, "pyfast")

    def prepare(self, device: torch.device) -> PreparedOptimizer:
        return PreparedOptimizer(self, device)

    def make(self, implementation: str, params: list[Tensor]) -> Optimizer:
        """The optimizer of a row; ``for-loop`` is that of the check."""
        count = self.num_groups
        groups: Groups = [
            {"params": params[i::count], "lr": LEARNING_RATE * (1 + i / count)}
            for i in range(count)
        ]
        if implementation in self.others:
            return self.others[implementation](groups)
        package = pyfast.optim if implementation == "pyfast" else torch.optim
        arguments = {"pyfast": self.extras, "for-loop": FORLOOP, **self.rows}[implementation]
        made: Optimizer = getattr(package, self.optimizer)(groups, **self.options, **arguments)
        return made


class Stepper:
    """What a row does: a step of its optimizer, with torch's calls before and after it."""

    def __init__(self, case: OptimizerCase, implementation: str, params: list[Tensor]) -> None:
        self.params = params
        self.optimizer = case.make(implementation, params)
        self._extras = {} if implementation == "pyfast" else case.extras
        if "ema_decay" in self._extras:
            self._averages = [p.detach().clone() for p in params]

    def step(self) -> None:
        if "ema_decay" not in self._extras:
            self.optimizer.step()
            return
        torch.nn.utils.clip_grad_norm_(self.params, self._extras["max_grad_norm"])
        self.optimizer.step()
        with torch.no_grad():
            weight = 1 - self._extras["ema_decay"]
            torch._foreach_lerp_(self._averages, self.params, weight)

    def results(self) -> dict[str, Tensor]:
        """All parameters, and all averages where there are any, as flat tensors."""
        found = {"parameters": self.params}
        if "ema_decay" in self._extras:
            found["averages"] = self._averages
        elif "ema" in (state := self.optimizer.state)[self.params[0]]:
            found["averages"] = [state[p]["ema"] for p in self.params]
        return {name: torch.cat([t.detach().flatten() for t in found[name]]) for name in found}


class PreparedOptimizer(Prepared):
    def __init__(self, case: OptimizerCase, device: torch.device) -> None:
        super().__init__(case, device)
        self.case = case
        self.params = list(_tensors(case, device, case.dtype, seed=0))
        grads = _tensors(case, device, case.dtype, seed=1)
        for p, grad in zip(self.params, grads, strict=True):
            p.requires_grad_().grad = grad

    def like(self) -> Tensor:
        return self.params[0]

    def call(self, implementation: str) -> Call:
        return Stepper(self.case, implementation, self.params).step

    def check(self, implementation: str = "pyfast") -> str:
        """What is wrong with a row's results after some steps on small tensors, against torch's
        for-loop in float64; empty if nothing."""
        count, *shape = self.case.shape
        most = CHECK_LENGTH if len(shape) == 1 else CHECK_SIZE
        shape = [min(count, CHECK_TENSORS), *(min(size, most) for size in shape)]
        case = replace(self.case, shape=tuple(shape))
        try:
            actual = _trained(case, implementation, self.device, case.dtype)
            exact = _trained(case, "for-loop", self.device, torch.float64)
            if case.extras.get("state_dtype") == "int8":
                start = torch.cat([t.flatten() for t in _tensors(case, self.device, case.dtype, 0)])
                return _int8_difference(actual["parameters"], exact["parameters"], start)
            rounded = _trained(case, "for-loop", self.device, case.dtype)
        except Exception as error:
            return first_line(error)
        differences = (difference(name, actual[name], exact[name], rounded[name]) for name in exact)
        return "; ".join(filter(None, differences))


def _tensors(
    case: OptimizerCase, device: torch.device, dtype: torch.dtype, seed: int
) -> Iterator[Tensor]:
    """Standard normal values of the dtype of the case, in ``dtype``."""
    count, *shape = case.shape
    for i in range(count):
        yield normal(shape, seed * count + i).to(device, case.dtype).to(dtype)


def _trained(
    case: OptimizerCase, implementation: str, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Parameters and averages after some steps, each with gradients of its own. The for-loop in the
    dtype of the case rounds its states to ``state_dtype`` after every step, as the row does."""
    params = [p.requires_grad_() for p in _tensors(case, device, dtype, seed=0)]
    stepper = Stepper(case, implementation, params)
    state_dtype = case.extras.get("state_dtype")
    for group in stepper.optimizer.param_groups:
        group["lr"] *= CHECK_LEARNING_RATE / LEARNING_RATE
    for index in range(CHECK_STEPS):
        grads = _tensors(case, device, dtype, seed=1 + index)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        stepper.step()
        if implementation == "for-loop" and dtype == case.dtype and state_dtype is not None:
            for state in stepper.optimizer.state.values():
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name].copy_(state[name].to(getattr(torch, state_dtype)))
    return stepper.results()


def _int8_difference(actual: Tensor, exact: Tensor, start: Tensor) -> str:
    """Codes of eight bits have no error that rounding bounds: all values are judged together."""
    error = ((actual - exact).norm() / (exact - start).norm()).item()
    if error < MAX_INT8_ERROR:  # NaN is wrong too
        return ""
    return f"parameters: the steps together are wrong by {error:.2g}, allowed {MAX_INT8_ERROR}"


def _adamw_8bit(package: str, groups: Groups) -> Optimizer:
    made: Optimizer = importlib.import_module(f"{package}.optim").AdamW8bit(groups, LEARNING_RATE)
    return made


def _installed_8bit() -> dict[str, Callable[[Groups], Optimizer]]:
    """The 8-bit AdamW of other packages; that of torchao is compiled by its first call."""
    names = [name for name in OptimizerCase.optional if importlib.util.find_spec(name)]
    return {name: functools.partial(_adamw_8bit, name) for name in names}


_case = functools.partial(OptimizerCase, "optimizer_step")
_FLOAT, _BFLOAT = torch.float32, torch.bfloat16
_FOREACH = {"torch": FORLOOP, "torch foreach": {"foreach": True}}
_MOMENTUM = {"momentum": 0.9}
_BFLOAT16_STATES = {"state_dtype": "bfloat16"}
_CLIP_AND_AVERAGE = {"max_grad_norm": 1.0, "ema_decay": 0.999}

CASES = [
    _case("AdamW", QUICK, _FLOAT, "AdamW", 28),
    _case("AdamW", LARGE, _FLOAT, "AdamW", 28, rows={**FUSED, "torch default": {}}),
    _case("AdamW", LARGE, _BFLOAT, "AdamW", 14),
    # torch's row does not have what pyfast's has.
    _case("AdamW, master weights", LARGE, _BFLOAT, "AdamW", 18, extras={"master_weights": True}),
    _case("AdamW, stochastic", LARGE, _BFLOAT, "AdamW", 14, extras={"stochastic_rounding": True}),
    _case("AdamW, bfloat16 states", LARGE, _FLOAT, "AdamW", 20, extras=_BFLOAT16_STATES),
    _case("AdamW", (1000, 256, 256), _FLOAT, "AdamW", 28),
    _case(
        "AdamW, 50 groups",
        (10000, 1000),
        _FLOAT,
        "AdamW",
        28,
        rows={**FUSED, "torch foreach": {"foreach": True}},
        num_groups=50,
    ),
    _case("clip, AdamW, EMA", (40, 1024, 1024), _FLOAT, "AdamW", 40, extras=_CLIP_AND_AVERAGE),
    _case(  # 16 bytes, and two scales for 256 parameters
        "AdamW, int8 states",
        SINGLE,
        _FLOAT,
        "AdamW",
        16 + 2 * 2 * 4 / 256,
        extras={"state_dtype": "int8"},
        others=_installed_8bit(),
    ),
    _case("RMSprop", LARGE, _FLOAT, "RMSprop", 20, rows=_FOREACH),
    _case("Adamax", LARGE, _FLOAT, "Adamax", 28, rows=_FOREACH),
    _case("SGD momentum 0.9", LARGE, _FLOAT, "SGD", 20, options=_MOMENTUM),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, CASES)


def test_optimizer_step(benchmark: BenchmarkFixture, case: BaseCase, implementation: str) -> None:
    run_with_pytest(benchmark, case, implementation)
