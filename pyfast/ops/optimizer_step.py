"""One step of an optimizer over groups of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._backend import KERNEL_DTYPES
from ..kernels.optimizer_step.optimizer_step_reference import (
    BLOCK_SIZE,
    Flag,
    Hyper,
    Item,
    Rule,
    optimizer_step_reference,
)
from ._native import get_num_threads, native
from ._op import ListOp

__all__ = ["Flag", "Group", "Hyper", "Rule", "Scaling", "optimizer_step", "square_sum"]

PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one that the kernels take: no subclass, dense, floating-point."""
    return (
        type(tensor) in PLAIN_TYPES
        and tensor.dtype in KERNEL_DTYPES
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_neg()
    )


@dataclass
class Group:
    """Parameters that share their numbers. Those without a gradient are left alone.

    Attributes:
        params: dense floating-point tensors, all of a step on one device.
        states: by parameter, or a list: the dict of each.
        names: the keys that the step needs: ``(step, state 0, 1, 2, scale 0, 1, 2, ema, remainder,
            master)``, None for what it does not. ``remainder`` is of bfloat16 parameters alone,
            ``master`` of float16 ones.
        grads: in place of the ``.grad`` of each.
        indices: of the parameters in their optimizer. Default: from ``first_index`` on.
        fresh: whose momentum buffer takes the gradient as it is.
        seed: of stochastic rounding, and of the dither of int8 states.
        owners: the optimizer's own parameters, where ``params`` are their local shards.
    """

    params: list[Tensor]
    states: Mapping[Any, dict[str, Any]] | list[dict[str, Any]]
    names: tuple[str | None, ...]
    hyper: Hyper
    flags: int = 0
    first_index: int = 0
    grads: list[Tensor | None] | None = None
    indices: list[int] | None = None
    fresh: list[bool] | None = None
    seed: int = 0
    owners: list[Tensor] | None = None


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
    """Memory on the device for the tables of steps, kept from one step to the next."""

    def __init__(self) -> None:
        self._table: Any = None
        self._memory: Tensor | None = None
        self._captured: list[Tensor] = []

    def get(self, size: int, like: Tensor) -> tuple[Any, Tensor]:
        """The native table, and its memory on the device of ``like``. A step that is captured into
        a graph has its own, which later steps do not touch."""
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            memory = torch.empty(size, dtype=torch.uint8, device=like.device)
            self._captured.append(memory)
            return native.OptimizerTable(), memory
        memory_now = self._memory
        if memory_now is None or memory_now.numel() < size or memory_now.device != like.device:
            memory_now = torch.empty(size + size // 4, dtype=torch.uint8, device=like.device)
            self._table, self._memory = native.OptimizerTable(), memory_now
        return self._table, memory_now


@dataclass
class Missing:
    """The parameters of each group that lack a state, by position."""

    positions: list[list[int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(self.positions)


def _on_device(number: float | Tensor, like: Tensor | None) -> float | Tensor:
    """A number of a group; a tensor of it stays one where the kernel runs on its device."""
    if like is None or not isinstance(number, Tensor):
        return float(number)
    return number.to(like.device)


def _plan(
    rule: Rule, groups: Sequence[Group], numbers: tuple[float, float, bool], on_cpu: bool = True
) -> Any:
    """The native plan, the states that are missing for it, or None for what it cannot take."""
    plan = native.OptimizerPlan(int(rule), *numbers)
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
    return missing or plan


def _step_cpu(rule: Rule, groups: Sequence[Group], scaling: Scaling, _: Workspace) -> Any:
    if scaling.skips():
        return Missing()
    plan = _plan(rule, groups, scaling.numbers())
    if plan is not None and not isinstance(plan, Missing):
        plan.run(get_num_threads())
        # Autograd must see that they have changed.
        torch._C._increment_version(plan.changed())
    return plan


def _step_cuda(rule: Rule, groups: Sequence[Group], scaling: Scaling, workspace: Workspace) -> Any:
    plan = _plan(rule, groups, (1.0, 1.0, scaling.unscale is not None), False)
    if plan is not None and not isinstance(plan, Missing):
        table, memory = workspace.get(plan.table_size(), groups[0].params[0])
        plan.run_cuda(table, memory, scaling.unscale, scaling.clip, scaling.found_inf)
        torch._C._increment_version(plan.changed())
    return plan


def _items(
    groups: Sequence[Group], writes: bool
) -> tuple[list[Item], list[Tensor], Missing] | None:
    """The items of a step, their step counts, and which states are missing; None for what no kernel
    takes."""
    items: list[Item] = []
    steps, missing = [], Missing()
    for group in groups:
        positions: list[int] = []
        missing.positions.append(positions)
        for i, p in enumerate(group.params):
            grad = p.grad if group.grads is None else group.grads[i]
            if grad is None:
                continue
            device = items[0].gradient.device if items else p.device
            if not (is_plain(p) and is_plain(grad) and p.device == device):
                return None
            states = group.states
            state = states[i] if isinstance(states, list) else states.get(p, {})
            names = _names_for(p, group.names)
            found = [None if name is None else state.get(name) for name in names]
            if any(n is not None and f is None for n, f in zip(names, found, strict=True)):
                positions.append(i)
                continue
            step, *tensors, ema, remainder, master = found
            flags = int(group.flags)
            if group.fresh is not None and group.fresh[i]:
                flags |= Flag.FIRST_STEP
            item = Item(
                p,
                grad,
                group.hyper,
                flags,
                tuple(tensors[:3]),
                tuple(tensors[3:]),
                ema,
                remainder if master is None else master,
                0 if step is None else int(step) + 1,
                group.first_index + i if group.indices is None else group.indices[i],
                group.seed,
            )
            if grad.shape != p.shape:
                raise ValueError(
                    f"optimizer step: the gradient of a parameter of {tuple(p.shape)} does not fit "
                    f"to it, got {tuple(grad.shape)}"
                )
            if writes or item.flags & Flag.ZERO_GRADIENT:
                _require_apart(grad)
            _check_item(item, names, found)
            items.append(item)
            steps += [] if step is None else [step]
    return items, steps, missing


def _require_apart(grad: Tensor) -> None:
    if any(
        stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)
    ):
        raise RuntimeError(
            f"optimizer step: elements of a gradient that is written, {tuple(grad.shape)}, share "
            "memory: more than one element of the written-to tensor refers to a single memory "
            "location. Please clone() the tensor"
        )


def _names_for(p: Tensor, names: tuple[str | None, ...]) -> tuple[str | None, ...]:
    remainder = names[8] if p.dtype == torch.bfloat16 else None
    return (*names[:8], remainder, names[9] if p.dtype == torch.float16 else None)


def _check_item(item: Item, names: tuple[str | None, ...], found: list[Any]) -> None:
    """ValueError for a state that is not what the step needs."""
    p = item.parameter
    assert p is not None
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    scale_shape = (-(-p.numel() // BLOCK_SIZE),)
    for kind, (name, tensor) in enumerate(zip(names, found, strict=True)):
        if name is None:
            continue
        shape: Any = p.shape
        dtypes: tuple[torch.dtype, ...] = (wide,)
        if kind == 0:
            shape, dtypes = (), (torch.float32, torch.float64)
        elif kind < 4:
            dtypes = tuple(KERNEL_DTYPES) if names[kind + 3] is None else (torch.uint8,)
        elif kind < 7:
            shape, dtypes = scale_shape, (torch.float32,)
        elif kind == 8:
            dtypes = (torch.int16,)
        fits = isinstance(tensor, Tensor) and tensor.shape == shape and tensor.dtype in dtypes
        if not fits or (kind != 0 and tensor.device != p.device):
            got = (
                f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                if isinstance(tensor, Tensor)
                else type(tensor).__name__
            )
            raise ValueError(
                f"optimizer step: {name} of a parameter of {tuple(p.shape)} {p.dtype} on "
                f"{p.device} does not fit to it, got {got}"
            )


def _step_reference(rule: Rule, groups: Sequence[Group], scaling: Scaling, _: Workspace) -> Any:
    if scaling.skips():
        return Missing()
    found = _items(groups, scaling.unscale is not None)
    if found is None:
        return None
    items, steps, missing = found
    if missing:
        return missing
    for step in steps:
        step += 1
    optimizer_step_reference(rule, items, *scaling.numbers())
    return True


def _step_triton(rule: Rule, groups: Sequence[Group], scaling: Scaling, _: Workspace) -> Any:
    from ..kernels.optimizer_step.optimizer_step_triton import optimizer_step_triton

    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "optimizer step: Triton counts steps on the host; capturing a graph needs the native "
            "CUDA kernels (an install with nvcc)"
        )
    found = _items(groups, scaling.unscale is not None)
    if found is None:
        return None
    items, steps, missing = found
    if missing:
        return missing
    if not items:
        return True
    for step in () if scaling.skips() else steps:
        step += 1
    with torch.cuda.device_of(items[0].gradient):
        optimizer_step_triton(rule, items, scaling.unscale, scaling.clip, scaling.found_inf)
    changed = [tensor for item in items for tensor in (item.parameter,) if tensor is not None]
    changed += [item.gradient for item in items if scaling.unscale is not None]
    torch._C._increment_version(changed)
    return True


KERNELS = {
    "cpu": _step_cpu,
    "cuda": _step_cuda,
    "triton": _step_triton,
    "reference": _step_reference,
}
_optimizer_step = ListOp("optimizer_step", KERNELS)


def optimizer_step(
    rule: Rule,
    groups: Sequence[Group],
    like: Tensor,
    scaling: Scaling | None = None,
    workspace: Workspace | None = None,
) -> Missing | None:
    """Step the tensors of all groups in place, in one pass.

    Args:
        rule: the update.
        groups: see :class:`Group`.
        like: one of the parameters; its device decides on the backend.
        scaling: of the gradients.
        workspace: of an optimizer, to be used again.

    Returns:
        Where states are missing, which, and nothing has been done; else an empty ``Missing``. None
        where a kernel cannot take the tensors as they are: subclasses, several devices, other
        dtypes; nothing has been done then.
    """
    kernel = _optimizer_step.kernels[_optimizer_step.backend_of(like)]
    scaling = Scaling() if scaling is None else scaling.on(like.device)
    done = kernel(rule, groups, scaling, workspace or Workspace())
    if done is None or isinstance(done, Missing):
        return done
    return Missing()


def square_sum(grads: list[Tensor]) -> Tensor:
    """The sum of the squares of all elements, in float64, on the device of the gradients."""
    like = grads[0]
    backend = _optimizer_step.backend_of(like)
    if backend in ("cpu", "cuda"):
        plan = native.OptimizerPlan(int(Rule.NONE), 1.0, 1.0, False)
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
        plan = native.OptimizerPlan(int(Rule.NONE), number, 1.0, True)
        if plan.add_gradients(grads, PLAIN_TYPES):
            if backend == "cpu":
                plan.run(get_num_threads())
            else:
                table, memory = Workspace().get(plan.table_size(), like)
                plan.run_cuda(table, memory, (1 / factor).float(), None, None)
            torch._C._increment_version(plan.changed())
            return
    for grad in grads:
        grad.mul_(factor)
