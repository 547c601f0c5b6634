"""``pyfast.patch_optimizer``: make an existing optimizer pyfast's, in place."""

from __future__ import annotations

import functools
import weakref
from typing import Any, TypeVar

import torch

from . import optim

_REPLACEMENTS: dict[type[torch.optim.Optimizer], type[torch.optim.Optimizer]] = {
    torch.optim.AdamW: optim.AdamW,
    torch.optim.Adam: optim.Adam,
    torch.optim.SGD: optim.SGD,
    torch.optim.RMSprop: optim.RMSprop,
    torch.optim.Adamax: optim.Adamax,
}

T = TypeVar("T", bound=torch.optim.Optimizer)


def patch_optimizer(optimizer: T) -> T:
    """Make an optimizer of torch pyfast's, in place: the object stays, and with it its groups, its
    state, its hooks, and every scheduler, scaler and trainer that holds it.

    Args:
        optimizer: an instance of ``torch.optim.AdamW``, ``Adam``, ``SGD``, ``RMSprop`` or
            ``Adamax``; of pyfast's classes it is left as it is.

    Returns:
        ``optimizer``.

    Raises:
        TypeError: for every other class, subclasses of these too: their step may differ.
        ValueError: if ``step`` is overridden on the instance by anything but a scheduler.
    """
    kind = type(optimizer)
    if kind in _REPLACEMENTS.values():
        return optimizer
    if kind not in _REPLACEMENTS:
        names = ", ".join(f"torch.optim.{known.__name__}" for known in _REPLACEMENTS)
        raise TypeError(
            f"patch_optimizer: optimizer must be an instance of {names}, "
            f"got {kind.__module__}.{kind.__qualname__}"
        )
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        raise ValueError(
            "patch_optimizer: optimizer must have the step of its class, "
            f"got one that is overridden on the instance: {step!r}"
        )
    optimizer.__class__ = _REPLACEMENTS[kind]  # type: ignore[assignment]
    optimizer._patch_step_function()
    if step is not None:
        optimizer.step = _scheduled_step(optimizer)  # type: ignore[method-assign]
    return optimizer


def _scheduled_step(optimizer: torch.optim.Optimizer) -> Any:
    """What LRScheduler puts in place of ``step`` to see that it is called, for the new class."""
    reference = weakref.ref(optimizer)
    inner: Any = type(optimizer).step

    @functools.wraps(inner)
    def step(*args: Any, **kwargs: Any) -> Any:
        owner: Any = reference()
        owner._opt_called = True
        return inner(owner, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return step
