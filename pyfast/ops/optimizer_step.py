"""One step of an optimizer over groups of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.optimizer_step.optimizer_step_reference import (
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
NUM_NAMES = 10  # step, three states, their scales, ema, remainder, master


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
    owners: list[Tensor] | None = None


@dataclass
class Scaling:
    """What gradients are multiplied by: first ``gradient``, then ``clip``. ``write``: the product
    with the first is written back."""

    gradient: float = 1.0
    clip: float = 1.0
    write: bool = False


@dataclass
class Missing:
    """The parameters of each group that lack a state, by position."""

    positions: list[list[int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(self.positions)


def _plan(rule: Rule, groups: Sequence[Group], seed: int, scaling: Scaling) -> Any:
    """The native plan, the states that are missing for it, or None for what it cannot take."""
    seed &= 0xFFFFFFFFFFFFFFFF
    plan = native.OptimizerPlan(int(rule), seed, scaling.gradient, scaling.clip, scaling.write)
    missing = Missing()
    for group in groups:
        hyper = tuple(float(number) for number in group.hyper)
        found = plan.add_group(
            group.params,
            group.grads,
            group.states,
            group.names,
            hyper,
            int(group.flags),
            group.first_index,
            group.indices,
            group.fresh,
            PLAIN_TYPES,
        )
        if found is None:
            return None
        missing.positions.append(found)
    return missing or plan


def _step_native(rule: Rule, groups: Sequence[Group], seed: int, scaling: Scaling) -> Any:
    plan = _plan(rule, groups, seed, scaling)
    if plan is not None and not isinstance(plan, Missing):
        plan.run(get_num_threads())
    return plan


def _items(groups: Sequence[Group]) -> tuple[list[Item], list[Tensor], Missing]:
    """The items of a step, their step counts, and which states are missing."""
    items, steps, missing = [], [], Missing()
    for group in groups:
        positions: list[int] = []
        missing.positions.append(positions)
        for i, p in enumerate(group.params):
            grad = p.grad if group.grads is None else group.grads[i]
            if grad is None:
                continue
            states = group.states
            state = states[i] if isinstance(states, list) else states.get(p, {})
            found = [None if name is None else state.get(name) for name in group.names]
            found[8] = found[8] if p.dtype == torch.bfloat16 else None
            found[9] = found[9] if p.dtype == torch.float16 else None
            wanted = [name is not None for name in group.names]
            wanted[8] = wanted[8] and p.dtype == torch.bfloat16
            wanted[9] = wanted[9] and p.dtype == torch.float16
            if any(w and f is None for w, f in zip(wanted, found, strict=True)):
                positions.append(i)
                continue
            step = found[0]
            if step is not None:
                steps.append(step)
            items.append(
                Item(
                    p,
                    grad,
                    group.hyper,
                    int(group.flags)
                    | (Flag.FIRST_STEP if group.fresh is not None and group.fresh[i] else 0),
                    tuple(found[1:4]),
                    tuple(found[4:7]),
                    found[7],
                    found[8] if found[9] is None else found[9],
                    0 if step is None else int(step) + 1,
                    group.first_index + i if group.indices is None else group.indices[i],
                )
            )
            _check_item(items[-1], group.names)
    return items, steps, missing


def _check_item(item: Item, names: tuple[str | None, ...]) -> None:
    p = item.parameter
    assert p is not None
    for name, tensor in zip(names[1:4], item.states, strict=True):
        if tensor is not None and tensor.shape != p.shape:
            raise ValueError(
                f"optimizer step: {name} of a parameter of {tuple(p.shape)} {p.dtype} does not fit "
                f"to it, got {tuple(tensor.shape)} {tensor.dtype}"
            )


def _step_reference(rule: Rule, groups: Sequence[Group], seed: int, scaling: Scaling) -> Any:
    items, steps, missing = _items(groups)
    if missing:
        return missing
    for step in steps:
        step += 1
    with torch.no_grad():
        optimizer_step_reference(rule, items, seed, scaling.gradient, scaling.clip, scaling.write)
    return True


_optimizer_step = ListOp("optimizer_step", {"cpu": _step_native, "reference": _step_reference})


def optimizer_step(
    rule: Rule,
    groups: Sequence[Group],
    like: Tensor,
    seed: int = 0,
    scaling: Scaling | None = None,
) -> Missing | None:
    """Step the tensors of all groups in place, in one pass.

    Args:
        rule: the update.
        groups: see :class:`Group`.
        like: one of the parameters; its device decides on the backend.
        seed: of stochastic rounding, and of the dither of int8 states.
        scaling: of the gradients.

    Returns:
        Where states are missing, which, and nothing has been done; else an empty ``Missing``. None
        where a kernel cannot take the tensors as they are: subclasses, several devices, other
        dtypes; nothing has been done then.
    """
    kernel = _optimizer_step.kernels[_optimizer_step.backend_of(like)]
    done = kernel(rule, groups, seed, scaling or Scaling())
    if done is None or isinstance(done, Missing):
        return done
    return Missing()


def square_sum(grads: list[Tensor]) -> Tensor:
    """The sum of the squares of all elements, in float64, on the device of the gradients."""
    like = grads[0]
    if _optimizer_step.backend_of(like) == "cpu":
        plan = native.OptimizerPlan(0, 0, 1.0, 1.0, False)
        if plan.add_gradients(grads, PLAIN_TYPES):
            return torch.tensor(plan.square_sum(get_num_threads()), dtype=torch.float64)
    return sum(
        (grad.double().square().sum() for grad in grads),
        torch.zeros((), dtype=torch.float64, device=like.device),
    )


def scale(grads: list[Tensor], factor: float) -> None:
    """Multiply every gradient in place."""
    like = grads[0]
    if _optimizer_step.backend_of(like) == "cpu":
        plan = native.OptimizerPlan(0, 0, factor, 1.0, True)
        if plan.add_gradients(grads, PLAIN_TYPES):
            plan.run(get_num_threads())
            return
    for grad in grads:
        grad.mul_(factor)
