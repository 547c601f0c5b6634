"""Triton launches that are prepared once.

Triton looks at every argument of a launch to find the compiled kernel, tens of microseconds for
kernels with dozens of arguments, which is more than a small call takes on a GPU. Here the first
call of a kind keeps what was found: compiled kernels, grids and arguments. Later ones fill in their
tensors and the seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_PLANS = 4096  # of an op; then all are forgotten


class Launch(NamedTuple):
    """A launch that was made. ``compiled``: None in Triton's interpreter."""

    compiled: Any
    grid: tuple[int, int, int]
    names: list[str]
    arguments: dict[str, Any]


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: Any) -> Launch:
    """``kernel[grid](**arguments, **options)``; ``arguments`` are the kernel's own, all of them."""
    compiled = kernel[grid](**arguments, **options)
    x, y, z = (*grid, 1, 1)[:3]
    return Launch(compiled, (x, y, z), kernel.arg_names, arguments)


def kind_of(tensor: Tensor | None) -> Hashable:
    """What decides about compiled kernels and their arguments, but the address."""
    if tensor is None:
        return None
    is_aligned = tensor.data_ptr() % 16 == 0
    return tensor.shape, tensor.stride(), tensor.dtype, is_aligned, tensor.get_device()


def kind_of_seed(seed: Any) -> Hashable:
    """The same of a seed: Triton gives integers the type that holds them."""
    if isinstance(seed, Tensor):
        return kind_of(seed)
    return -(1 << 31) <= seed < 1 << 31, seed < 1 << 63


class _Step(NamedTuple):
    """``runner`` takes ``arguments``, in which ``tensors`` (position, index) are filled in."""

    runner: Any
    arguments: list[Any]
    tensors: list[tuple[int, int]]
    seed: int


class _Plan:
    def __init__(
        self,
        launches: Sequence[Launch],
        tensors: Sequence[Tensor | None],
        temporaries: Sequence[Tensor],
    ) -> None:
        known = {id(t): i for i, t in enumerate((*tensors, *temporaries)) if t is not None}
        self.temporaries = [(t.shape, t.dtype, t.device) for t in temporaries]
        self.steps = []
        for made in launches:
            arguments = [made.arguments[name] for name in made.names]
            seed = made.names.index("seed") if "seed" in made.names else -1
            filled = []
            for position, argument in enumerate(arguments):
                if isinstance(argument, Tensor):
                    if position != seed:
                        filled.append((position, known[id(argument)]))
                    arguments[position] = None
            self.steps.append(_Step(made.compiled[made.grid], arguments, filled, seed))

    def run(self, tensors: Sequence[Tensor | None], seed: Any) -> None:
        if self.temporaries:
            made = [torch.empty(s, dtype=dtype, device=d) for s, dtype, d in self.temporaries]
            tensors = (*tensors, *made)
        for runner, prepared, filled, seed_position in self.steps:
            arguments = prepared.copy()
            for position, index in filled:
                arguments[position] = tensors[index]
            if seed_position >= 0:
                arguments[seed_position] = seed
            runner(*arguments)


class Plans:
    """The plans of an op, by a key that decides about everything but addresses and the seed: the
    kinds of its tensors, and every other argument."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, _Plan] = {}

    def run(self, key: Hashable, tensors: Sequence[Tensor | None], seed: Any = None) -> bool:
        """Make the launches of the plan; False if there is none."""
        plan = self._plans.get(key)
        if plan is None:
            return False
        plan.run(tensors, seed)
        return True

    def keep(
        self,
        key: Hashable,
        tensors: Sequence[Tensor | None],
        launches: Sequence[Launch],
        temporaries: Sequence[Tensor] = (),
    ) -> None:
        """Keep a plan of launches that were made, of these tensors and of temporaries, contiguous
        and not initialised, which it will allocate. No plan is made in Triton's interpreter, and
        none where one tensor is several of them: another call has several."""
        given = [id(t) for t in tensors if t is not None]
        if any(made.compiled is None for made in launches) or len(set(given)) < len(given):
            return
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        self._plans[key] = _Plan(launches, tensors, temporaries)
