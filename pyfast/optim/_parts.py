"""Which parameters of an optimizer can be stepped together, and which are torch's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..ops._optimizer_groups import Group, is_plain
from ..ops.optimizer_step import Rule
from . import _extras
from ._distributed import is_dtensor, local

_SPARSE = {
    Rule.ADAM: "Adam does not support sparse gradients, please consider SparseAdam instead",
    Rule.RMSPROP: "RMSprop does not support sparse gradients",
    Rule.ADAMAX: "Adamax does not support sparse gradients",
}


def has_duplicates(params: list[Tensor]) -> bool:
    return len({id(p) for p in params}) != len(params)


def _kind_of(p: Tensor, group: dict[str, Any], rule: Rule) -> Any:
    """What can be stepped together has one kind; "torch" is for torch's own code."""
    grad = p.grad
    assert grad is not None
    if is_dtensor(p) and is_dtensor(grad):
        placed: Any = p
        if grad.placements != placed.placements or grad.device_mesh != placed.device_mesh:  # type: ignore[attr-defined]
            # Sums that are still in parts, for example: what torch's ops would do.
            grad = p.grad = grad.redistribute(placed.device_mesh, placed.placements)  # type: ignore[attr-defined]
        p, grad = local(p), local(grad)
    if grad.is_neg():
        # Memory holds the values with the other sign, as that of z.conj().imag does.
        grad = p.grad = grad.resolve_neg()
    if grad._is_zerotensor():  # has no memory
        grad = p.grad = grad.clone()
    if grad.is_sparse and rule != Rule.SGD:
        raise RuntimeError(_SPARSE[rule])
    if group.get("differentiable") or not (is_plain(p) and is_plain(grad)):
        return "torch"
    return p.device


def _part_of(group: Group, positions: list[int]) -> Group:
    """Some parameters of a group; of DTensors their local shards."""
    owners = [group.params[i] for i in positions]
    assert not isinstance(group.states, list)
    states = [group.states.get(p, {}) for p in owners]
    return replace(
        group,
        params=[local(p) for p in owners],
        states=[
            {name: local(value) for name, value in state.items()} if is_dtensor(p) else state
            for p, state in zip(owners, states, strict=True)
        ],
        grads=[local(p.grad) for p in owners],
        indices=[group.first_index + i for i in positions],
        owners=owners,
    )


def parts_of(
    groups: list[Group], sources: list[dict[str, Any]], rule: Rule, optimizer: str
) -> dict[Any, list[Any]]:
    """Parameters of every kind, those of one kind and device together; under "torch" param_groups
    for torch's own code. ``sources`` are the param_groups of the groups."""
    parts: dict[Any, list[Any]] = {}
    for group, source in zip(groups, sources, strict=True):
        by_kind: dict[Any, list[int]] = {}
        for i, p in enumerate(group.params):
            if p.grad is not None:
                by_kind.setdefault(_kind_of(p, source, rule), []).append(i)
        if has_duplicates(group.params):
            by_kind = {"torch": list(range(len(group.params)))}
        for kind, positions in by_kind.items():
            part: Any = _part_of(group, positions)
            if kind == "torch":
                _extras.refuse(optimizer, source)
                part = {**source, "params": [group.params[i] for i in positions]}
            parts.setdefault(kind, []).append(part)
    return parts
