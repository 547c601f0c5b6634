"""One step of an optimizer over groups of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.optimizer_step.optimizer_step_reference import (
    Flag,
    Hyper,
    Rule,
    optimizer_step_reference,
)
from ._native import get_num_threads, native
from ._op import ListOp
from ._optimizer_groups import PLAIN_TYPES, Group, Missing, items_of

__all__ = ["Flag", "Group", "Hyper", "Rule", "Scaling", "prepare_step", "square_sum"]


def is_capturing(like: Tensor) -> bool:
    """Whether the work on the device of a tensor goes into a CUDA graph."""
    if not like.is_cuda:
        return False
    with torch.cuda.device_of(like):
        return torch.cuda.is_current_stream_capturing()


# The step, of what has been checked; or what it lacks; or None: no kernel takes it.
Prepared = Callable[[], None] | Missing | None


@dataclass
class Scaling:
    """What gradients are multiplied by. Tensors are scalars on the device of the parameters.

    Attributes:
        unscale: gradients are divided by it, float32, and written back so.
        clip: then they are multiplied by it, float64.
        found_inf: the step is left out where it is not zero, float32.
    """

    unscale: Tensor | None = None
    clip: Tensor | None = None
    found_inf: Tensor | None = None

    def on(self, device: torch.device) -> Scaling:
        """The same, with its tensors on another device."""
        tensors = (self.unscale, self.clip, self.found_inf)
        return Scaling(*(None if tensor is None else tensor.to(device) for tensor in tensors))

    def skips(self) -> bool:
        """Whether the step is left out; waits for the device."""
        return self.found_inf is not None and bool(self.found_inf.item())

    def numbers(self) -> tuple[float, float, bool]:
        """The factors, and whether gradients are written."""
        gradient = 1.0 if self.unscale is None else 1.0 / float(self.unscale)
        clip = 1.0 if self.clip is None else float(self.clip)
        return gradient, clip, self.unscale is not None


class Workspace:
    """What is kept from one step to the next: memory of the host, and memory on the device for the
    tables of steps."""

    def __init__(self) -> None:
        self.host_memory = None if native is None else native.OptimizerMemory()
        self._table: Any = None
        self._memory: Tensor | None = None
        self._stream: Any = None
        self._captured: list[Tensor] = []

    def __reduce__(self) -> Any:
        return Workspace, ()  # copies begin anew

    def get(self, size: int, like: Tensor) -> tuple[Any, Tensor]:
        """The native table, and its memory on the device of ``like``. A step that is captured into
        a graph has its own, which later steps do not touch; and so has one on another stream, where
        the last may still be read."""
        stream = torch.cuda.current_stream(like.device) if like.is_cuda else None
        if is_capturing(like):
            memory = torch.empty(size, dtype=torch.uint8, device=like.device)
            self._captured.append(memory)
            return native.OptimizerTable(), memory
        memory_now = self._memory
        if memory_now is None or memory_now.numel() < size or self._stream != stream:
            memory_now = torch.empty(size + size // 4, dtype=torch.uint8, device=like.device)
            self._table, self._memory, self._stream = native.OptimizerTable(), memory_now, stream
        return self._table, memory_now


def _on_device(number: float | Tensor, like: Tensor | None) -> float | Tensor:
    """A number of a group; a tensor of it stays one where the kernel runs on its device."""
    if like is None or not isinstance(number, Tensor):
        return float(number)
    return number.to(like.device)


def _plan(
    rule: Rule,
    groups: Sequence[Group],
    numbers: tuple[float, float, bool],
    workspace: Workspace,
    on_cpu: bool = True,
) -> Any:
    """The native plan, the states that are missing for it, or None for what it cannot take."""
    plan = native.OptimizerPlan(int(rule), *numbers, workspace.host_memory)
    missing = Missing()
    for group in groups:
        found = plan.add_group(
            group.params,
            group.grads,
            group.states,
            group.names,
            tuple(_on_device(n, None if on_cpu else group.params[0]) for n in group.hyper),
            int(group.flags),
            group.seed & 0xFFFFFFFFFFFFFFFF,
            group.first_index,
            group.indices,
            group.fresh,
            PLAIN_TYPES,
        )
        if found is None:
            return None
        missing.positions.append(found)
    if not plan.make_rows(get_num_threads()):
        return None
    return missing or plan


def _prepare_cpu(
    rule: Rule, groups: Sequence[Group], scaling: Scaling, workspace: Workspace
) -> Prepared:
    if scaling.skips():
        return _nothing
    plan = _plan(rule, groups, scaling.numbers(), workspace)
    if plan is None or isinstance(plan, Missing):
        return plan

    def run() -> None:
        plan.bump_versions()  # first: it may refuse, as torch does for inference tensors
        plan.run(get_num_threads())

    return run


def _prepare_cuda(
    rule: Rule, groups: Sequence[Group], scaling: Scaling, workspace: Workspace
) -> Prepared:
    plan = _plan(rule, groups, (1.0, 1.0, scaling.unscale is not None), workspace, False)
    if plan is None or isinstance(plan, Missing):
        return plan
    like = groups[0].params[0]
    if is_capturing(like) and plan.counts_on_host():
        raise RuntimeError(
            "optimizer step: step counts are on the CPU, where the replay of a captured graph "
            "does not count; make them with fused=True or capturable=True"
        )

    def run() -> None:
        plan.bump_versions()
        table, memory = workspace.get(plan.table_size(), like)
        plan.run_cuda(table, memory, scaling.unscale, scaling.clip, scaling.found_inf)

    return run


def _prepare_reference(
    rule: Rule, groups: Sequence[Group], scaling: Scaling, _: Workspace
) -> Prepared:
    if scaling.skips():
        return _nothing
    found = items_of(groups, scaling.unscale is not None)
    if found is None:
        return None
    items, steps, missing = found
    if missing:
        return missing

    def run() -> None:
        optimizer_step_reference(rule, items, *scaling.numbers())
        _count(steps)

    return run


def _prepare_triton(
    rule: Rule, groups: Sequence[Group], scaling: Scaling, _: Workspace
) -> Prepared:
    from ..kernels.optimizer_step.optimizer_step_triton import optimizer_step_triton

    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "optimizer step: Triton counts steps on the host; capturing a graph needs the native "
            "CUDA kernels (an install with nvcc)"
        )
    found = items_of(groups, scaling.unscale is not None)
    if found is None:
        return None
    items, steps, missing = found
    if missing:
        return missing
    if not items:
        return _nothing

    def run() -> None:
        is_skipped = scaling.skips()
        writes = scaling.unscale is not None
        changed = [item.parameter for item in items if item.parameter is not None]
        changed += [item.gradient for item in items if writes or item.flags & Flag.ZERO_GRADIENT]
        torch._C._increment_version(changed)
        with torch.cuda.device_of(items[0].gradient):
            optimizer_step_triton(rule, items, scaling.unscale, scaling.clip, scaling.found_inf)
        if not is_skipped:
            _count(steps)

    return run


def _count(steps: list[Tensor]) -> None:
    if steps:
        torch._foreach_add_(steps, 1)


def _nothing() -> None:
    pass


KERNELS = {
    "cpu": _prepare_cpu,
    "cuda": _prepare_cuda,
    "triton": _prepare_triton,
    "reference": _prepare_reference,
}
_optimizer_step = ListOp("optimizer_step", KERNELS)


def prepare_step(
    rule: Rule,
    groups: Sequence[Group],
    like: Tensor,
    scaling: Scaling | None = None,
    workspace: Workspace | None = None,
) -> Prepared:
    """Check the tensors of all groups for a step of all in one pass, which changes them in place.

    Args:
        rule: the update.
        groups: see :class:`Group`.
        like: one of the parameters; its device decides on the backend.
        scaling: of the gradients.
        workspace: of an optimizer, to be used again.

    Returns:
        What makes the step. Where states are missing, which; None where a kernel cannot take the
        tensors as they are: subclasses, several devices, other dtypes.

    Raises:
        ValueError, RuntimeError: for tensors that do not fit. Nothing has been done then.
    """
    kernel = _optimizer_step.kernels[_optimizer_step.backend_of(like)]
    scaling = Scaling() if scaling is None else scaling.on(like.device)
    prepared: Prepared = kernel(rule, groups, scaling, workspace or Workspace())
    return prepared


def square_sum(grads: list[Tensor]) -> Tensor:
    """The sum of the squares of all elements, in float64, on the device of the gradients."""
    like = grads[0]
    backend = _optimizer_step.backend_of(like)
    if backend in ("cpu", "cuda"):
        plan = native.OptimizerPlan(int(Rule.NONE), 1.0, 1.0, False, None)
        if plan.add_gradients(grads, PLAIN_TYPES):
            if backend == "cpu":
                return torch.tensor(plan.square_sum(get_num_threads()), dtype=torch.float64)
            table, memory = Workspace().get(plan.table_size(), like)
            sums = torch.zeros(plan.num_items() + 1, dtype=torch.float64, device=like.device)
            plan.square_sum_on_cuda(table, memory, sums)
            return sums[-1]
    return torch.stack([grad.double().square().sum() for grad in grads]).sum()


def scale(grads: list[Tensor], factor: Tensor) -> None:
    """Multiply every gradient in place by a float64 scalar on its device."""
    like = grads[0]
    backend = _optimizer_step.backend_of(like)
    is_double = any(grad.dtype == torch.float64 for grad in grads)
    if backend == "cpu" or (backend == "cuda" and not is_double):
        number = float(factor) if backend == "cpu" else 1.0
        plan = native.OptimizerPlan(int(Rule.NONE), number, 1.0, True, None)
        if plan.add_gradients(grads, PLAIN_TYPES):
            plan.bump_versions()
            if backend == "cpu":
                plan.run(get_num_threads())
            else:
                table, memory = Workspace().get(plan.table_size(), like)
                plan.run_cuda(table, memory, (1 / factor).float(), None, None)
            return
    for grad in grads:
        grad.mul_(factor)
