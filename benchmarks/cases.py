"""What the benchmark files are made of: cases, the check that comes before a speed-up is reported,
and timing in turns.

A case is one computation at one shape and dtype: of a function, or of an optimizer, which has its
kind of case in its own file. torch, torch.compile and pyfast are zero-argument callables over the
same tensors, called in turns, so that a slow moment of the machine meets all.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

import pyfast
from pyfast.ops._op import registered

if TYPE_CHECKING:
    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture

Call = Callable[[], Any]

SEED = 20240229  # of the masks that the check compares; the timed calls draw their own


@dataclass(frozen=True)
class Computation:
    """One computation as torch has it, as pyfast has it, and as a formula.

    Attributes:
        inputs: the arguments for a shape, by name, float32 on the CPU. The first is dropped.
        torch: the best that eager torch offers, called as ``torch(*inputs, p=p)``.
        pyfast: the public function, called as ``pyfast(*inputs, p=p)``; it takes ``seed`` too.
        formula: ``formula(keep, p, *inputs)`` in plain torch, in the dtype of its inputs. ``keep``
            is the mask, bool, with a dimension of one wherever it does not vary.
        mask_ndim: so many leading dimensions index the mask; None for all.
    """

    inputs: Callable[[tuple[int, ...]], dict[str, Tensor]]
    torch: Callable[..., Tensor]
    pyfast: Callable[..., Any]
    formula: Callable[..., Tensor]
    mask_ndim: int | None = None


@dataclass(frozen=True)
class BaseCase:
    """What is timed, by every implementation that it has.

    Attributes:
        op: the name of the op that pyfast serves it with.
        name: tells the cases of an op apart, beside shape and dtype.
        bar: the most that pyfast should take, as a multiple of a copy that moves as many bytes.
        flops: the arithmetic of a call, from the shape; None where bytes alone count.
        floors: how many times as fast as other rows pyfast should be at least, by row.
        optional: rows that are left out where they fail; others fail the run.
    """

    op: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bar: float | None = field(default=None, kw_only=True)
    flops: Callable[[tuple[int, ...]], int] | None = field(default=None, kw_only=True)
    floors: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    optional: ClassVar[tuple[str, ...]] = ("torch.compile",)

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """The bytes that a call must move."""
        raise NotImplementedError

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def implementations(self) -> tuple[str, ...]:
        """``torch``, what the others are compared with; others; ``pyfast``."""
        raise NotImplementedError

    def prepare(self, device: torch.device) -> Prepared:
        raise NotImplementedError

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.op} {self.name} {shape} {self.dtype_name}"


class Prepared:
    """A case with its tensors on a device."""

    def __init__(self, case: BaseCase, device: torch.device) -> None:
        self._base, self.device = case, device

    def like(self) -> Tensor:
        """The tensor that decides about the backend."""
        raise NotImplementedError

    def call(self, implementation: str) -> Call:
        """The callable to time."""
        raise NotImplementedError

    def check(self) -> str:
        """What is wrong with pyfast's results; empty if nothing."""
        raise NotImplementedError

    @property
    def backend(self) -> str:
        """The backend that serves pyfast's call."""
        return registered()[self._base.op].backend_of(self.like())

    def copy_call(self) -> Call:
        """A copy that moves the bytes of the case: half of them read, half of them written."""
        dtype = self._base.dtype
        num_elements = max(1, self._base.num_bytes // (2 * dtype.itemsize))
        source = torch.ones(num_elements, dtype=dtype, device=self.device)
        return functools.partial(torch.zeros_like(source).copy_, source)


@dataclass(frozen=True)
class Case(BaseCase):
    """A computation at one shape and dtype, forward alone or with the backward pass.

    Attributes:
        num_passes: how many tensors of the shape must cross the memory bus, reads plus writes.
        backward: whether ``torch.autograd.grad`` for all inputs is part of a call.
        requires_grad: whether the inputs require a gradient; always with ``backward``.
        check_shape, compiles: of the check, where it differs; whether torch.compile is a row.
        others: further rows, by name; each is a function of the first input that gives a callable.
    """

    computation: Computation
    num_passes: int
    backward: bool = False
    requires_grad: bool = False
    p: float = 0.1
    check_shape: tuple[int, ...] | None = None
    compiles: bool = True
    others: Mapping[str, Callable[[Tensor], Call]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Every tensor once, vectors over the columns aside."""
        return self.num_passes * self.num_elements * self.dtype.itemsize

    @property
    def implementations(self) -> tuple[str, ...]:
        compiled = ("torch.compile",) * self.compiles
        return ("torch", *compiled, *self.others, "pyfast")

    def prepare(self, device: torch.device) -> PreparedCase:
        return PreparedCase(self, device)


class PreparedCase(Prepared):
    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self.case = case
        values = case.computation.inputs(case.shape)
        self.names = tuple(values)
        self.inputs = [value.to(device, case.dtype) for value in values.values()]
        self.grad = normal(case.shape, 99).to(device, case.dtype) if case.backward else None
        for tensor in self.inputs:
            tensor.requires_grad_(case.backward or case.requires_grad)

    def like(self) -> Tensor:
        return self.inputs[0]

    def call(self, implementation: str) -> Call:
        """The callable to time. That of torch.compile compiles in its first call."""
        computation, p = self.case.computation, self.case.p
        if implementation == "torch":
            return self._step(functools.partial(computation.torch, *self.inputs, p=p))
        if implementation == "pyfast":
            return self._step(functools.partial(computation.pyfast, *self.inputs, p=p))
        if implementation == "torch.compile":
            # Without the reset, dynamo would stop compiling after some cases and run eagerly.
            torch.compiler.reset()
            eager = functools.partial(computation.torch, p=p)
            compiled = torch.compile(lambda *inputs: eager(*inputs), fullgraph=True, dynamic=False)
            return self._step(functools.partial(compiled, *self.inputs))
        return self.case.others[implementation](self.inputs[0].detach())

    def _step(self, forward: Call) -> Call:
        if self.grad is None:
            return forward
        inputs, grad = self.inputs, self.grad
        return lambda: torch.autograd.grad(forward(), inputs, grad)

    def check(self) -> str:
        """What is wrong with pyfast's results against the formula in float64; empty if nothing."""
        if self.case.check_shape is not None:
            smaller = replace(self.case, shape=self.case.check_shape, check_shape=None)
            return PreparedCase(smaller, self.device).check()
        function, p = self.case.computation.pyfast, self.case.p
        try:
            forward = functools.partial(function, *self.inputs, p=p, seed=SEED)
            actual = self._results(forward, self.inputs)
            exact = self._formula_results(torch.float64)
            rounded = self._formula_results(self.case.dtype)
        except Exception as error:
            return first_line(error)
        differences = (
            difference(name, actual[name], exact[name], rounded[name]) for name in actual
        )
        return "; ".join(filter(None, differences))

    def _formula_results(self, dtype: torch.dtype) -> dict[str, Tensor]:
        shape, computation = self.case.shape, self.case.computation
        mask_shape = shape[: computation.mask_ndim]
        keep = keep_mask(math.prod(mask_shape), self.case.p, self.device)
        keep = keep.view(mask_shape + (1,) * (len(shape) - len(mask_shape)))
        inputs = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in self.inputs]
        forward = functools.partial(computation.formula, keep, self.case.p, *inputs)
        return self._results(forward, inputs)

    def _results(self, forward: Call, inputs: list[Tensor]) -> dict[str, Tensor]:
        y = forward()
        results = {"output": y.detach()}
        if self.grad is not None:
            grads = torch.autograd.grad(y, inputs, self.grad.to(y.dtype))
            results |= {f"grad of {name}": g for name, g in zip(self.names, grads, strict=True)}
        return results


def difference(name: str, actual: Tensor, exact: Tensor, rounded: Tensor) -> str:
    """What is wrong with ``actual``: ``exact`` is the formula in float64, ``rounded`` the formula
    in the dtype of the case."""
    if actual.shape != rounded.shape or actual.dtype != rounded.dtype:
        return (
            f"{name} is {tuple(actual.shape)} {actual.dtype}, "
            f"not {tuple(rounded.shape)} {rounded.dtype}"
        )
    # Twice the error of the formula in the same dtype, plus one rounding of the largest value.
    allowed = 2 * (rounded.double() - exact).abs().max()
    allowed += torch.finfo(actual.dtype).eps * exact.abs().max()
    error = (actual.double() - exact).abs()
    num_wrong = int((~(error <= allowed)).sum())  # NaN is wrong too
    if num_wrong == 0:
        return ""
    return (
        f"{name}: {num_wrong} of {error.numel()} values are wrong, "
        f"largest error {error.max().item():.2g}, allowed {allowed.item():.2g}"
    )


def first_line(error: Exception) -> str:
    """An error in one line for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def normal(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal values, float32 on the CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


@functools.lru_cache(maxsize=8)
def keep_mask(num_elements: int, p: float, device: torch.device) -> Tensor:
    """The mask of the check, flat; an element's bit depends on its linear index alone."""
    return pyfast.dropout_mask((num_elements,), p, SEED, device=device)


def drop_rate(p: float) -> float:
    """The rate that a p stands for: a multiple of 1 / 65536."""
    return round(p * 65536) / 65536


def drop(keep: Tensor, p: float, x: Tensor) -> Tensor:
    """The formula of dropout."""
    return torch.where(keep, x * (1 / (1 - drop_rate(p))), 0)


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds have a block of calls of everything, each as many at once."""

    rounds: int
    block_s: float
    with_compile: bool
    min_calls: int = 3
    calls_at_once: int = 1


SLOW_S = 0.2  # calls that take longer are timed one at a time
FULL = Effort(rounds=9, block_s=0.02, with_compile=True)
QUICK = Effort(rounds=5, block_s=0.005, with_compile=False)


def measure(
    calls: dict[str, Call], device: torch.device, effort: Effort, after_round: Callable[[], object]
) -> dict[str, tuple[list[float], int]]:
    """Time all callables in turns, in an order that rotates from round to round. Returns the
    seconds of a call in each round, and the number of calls that each is a mean of."""
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        counts = {name: _calls_per_block(call, device, effort) for name, call in calls.items()}
        for round_index in range(effort.rounds):
            first = round_index % len(names)
            for name in names[first:] + names[:first]:
                seconds = time_block(calls[name], counts[name], device, counts[name] > 1)
                samples[name].append(seconds / counts[name] / effort.calls_at_once)
            after_round()
    finally:
        if was_enabled:
            gc.enable()
    return {name: (samples[name], counts[name] * effort.calls_at_once) for name in names}


GRAPH_CALLS = 16


def graphed(call: Call) -> Call:
    """Replays a CUDA graph of ``GRAPH_CALLS`` calls: kernels, without launching them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    return graph.replay


def _calls_per_block(call: Call, device: torch.device, effort: Effort) -> int:
    num_calls = 1
    while (seconds := time_block(call, num_calls, device, True)) < effort.block_s / 4:
        num_calls *= 2
    min_calls = 1 if seconds > SLOW_S else effort.min_calls
    return max(min_calls, round(num_calls * effort.block_s / seconds))


def time_block(call: Call, num_calls: int, device: torch.device, warms_up: bool) -> float:
    """Seconds of ``num_calls`` calls, after an untimed one that brings the caches back; slow calls
    need none."""
    if warms_up:
        call()
    if device.type == "cuda":
        event: Any = functools.partial(torch.cuda.Event, enable_timing=True)
        start, end = event(), event()
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(num_calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    for _ in range(num_calls):
        call()
    return time.perf_counter() - begin


def parametrize(metafunc: pytest.Metafunc, cases: Sequence[BaseCase]) -> None:
    """Every implementation of every case, for ``pytest_generate_tests`` of a benchmark file."""
    pairs = [(case, name) for case in cases for name in case.implementations]
    ids = [f"{case} {name}".replace(" ", "-") for case, name in pairs]
    metafunc.parametrize(("case", "implementation"), pairs, ids=ids)


def run_with_pytest(benchmark: BenchmarkFixture, case: BaseCase, implementation: str) -> None:
    """Time one implementation on the CPU with pytest-benchmark, after the check and a first call.
    ``python -m pyfast bench`` measures in turns, which this cannot, and on GPUs."""
    prepared = case.prepare(torch.device("cpu"))
    if implementation == "pyfast":
        problem = prepared.check()
        assert not problem, problem
    call = prepared.call(implementation)
    try:
        call()
    except Exception as error:
        if implementation not in case.optional:
            raise
        import pytest

        pytest.skip(f"{implementation} failed: {first_line(error)}")
    benchmark.group = str(case)
    benchmark.extra_info["num_bytes"] = case.num_bytes
    benchmark(call)
