"""The tensors of a step: groups as optimizers give them, items as Triton and the reference take
them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._backend import KERNEL_DTYPES
from ..kernels.optimizer_step.optimizer_step_reference import BLOCK_SIZE, Flag, Hyper, Item

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
        options: the param_group that they are of.
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
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Missing:
    """The parameters of each group that lack a state, by position."""

    positions: list[list[int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(self.positions)


def items_of(
    groups: Sequence[Group], writes: bool
) -> tuple[list[Item], list[Tensor], Missing] | None:
    """The items of a step, their step counts, and which states are missing; None for what no kernel
    takes."""
    items: list[Item] = []
    counted: list[tuple[Item, Tensor]] = []
    missing = Missing()
    written: set[int] = set()
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
                0,
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
                if grad.data_ptr() in written and grad.numel():
                    raise RuntimeError(
                        "optimizer step: a gradient that is written (unscaled or zeroed) must "
                        "belong to one parameter, got the same one for two"
                    )
                written.add(grad.data_ptr())
            _check_item(item, names, found)
            items.append(item)
            if step is not None:
                counted.append((item, step))
    if not missing:
        _read_steps(counted)
    return items, [step for _, step in counted], missing


def _read_steps(counted: list[tuple[Item, Tensor]]) -> None:
    """Says which step it is for each item; one wait for all counts of a device."""
    kinds: dict[Any, list[tuple[Item, Tensor]]] = {}
    for item, step in counted:
        kinds.setdefault((step.device, step.dtype), []).append((item, step))
    for pairs in kinds.values():
        counts = torch.stack([step for _, step in pairs]).tolist()
        for (item, _), count in zip(pairs, counts, strict=True):
            item.step = int(count) + 1


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
