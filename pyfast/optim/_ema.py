"""A running average of parameters, apart from any optimizer."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops._optimizer_groups import Group, Missing
from ..ops.optimizer_step import Hyper, Rule, prepare_step


@contextlib.contextmanager
def swapped(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """In the block the first of each pair holds the values of the second; then its own again."""
    kept = [p.detach().clone() for p, _ in pairs]
    try:
        with torch.no_grad():
            for p, average in pairs:
                p.copy_(average)
        yield
    finally:
        with torch.no_grad():
            for (p, _), value in zip(pairs, kept, strict=True):
                p.copy_(value)


def _checked_decay(decay: float) -> float:
    is_number = isinstance(decay, numbers.Real) and not isinstance(decay, bool)
    if not is_number or not 0 <= decay <= 1:
        raise ValueError(f"EMA: decay must be a number in [0, 1], got {decay!r}")
    return decay


class EMA:
    """An exponential moving average: ``average += (1 - decay) (parameter - average)``.

    Does what ``torch.optim.swa_utils.AveragedModel`` does with ``get_ema_multi_avg_fn(decay)``, in
    one pass over memory and without a copy of the module. Differences: averages are float32 for
    half types (float64 for float64), and start at the values that parameters have at construction.

    Args:
        parameters: tensors, one tensor, or a module.
        decay: weight of the old average, in [0, 1]. Default: 0.999

    Attributes:
        averages: a tensor for each parameter.
        decay: may be changed at any time.

    Raises:
        ValueError: for a decay outside of [0, 1].
        TypeError: for what is not a floating-point tensor.
    """

    def __init__(
        self, parameters: Iterable[Tensor] | Tensor | torch.nn.Module, decay: float = 0.999
    ) -> None:
        if isinstance(parameters, torch.nn.Module):
            parameters = parameters.parameters()
        elif isinstance(parameters, Tensor):
            parameters = [parameters]
        self.decay = _checked_decay(decay)
        self._parameters = list(parameters)
        for p in self._parameters:
            if not isinstance(p, Tensor) or not p.is_floating_point():
                got = f"{tuple(p.shape)} {p.dtype}" if isinstance(p, Tensor) else type(p).__name__
                raise TypeError(f"EMA: parameters must be floating-point tensors, got {got}")
        self.averages = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for p in self._parameters
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters' values of now into the averages."""
        params = [p.detach() for p in self._parameters]
        for device in {p.device for p in params}:
            chosen = [i for i, p in enumerate(params) if p.device == device]
            group = Group(
                [params[i] for i in chosen],
                [{"ema": self.averages[i]} for i in chosen],
                (None,) * 7 + ("ema", None, None),
                Hyper(ema_decay=self.decay),
                grads=[params[i] for i in chosen],
            )
            step = prepare_step(Rule.NONE, [group], group.params[0])
            if step is not None:
                assert not isinstance(step, Missing)
                step()
            else:
                for i in chosen:
                    self.averages[i].lerp_(params[i].to(self.averages[i].dtype), 1 - self.decay)

    @contextlib.contextmanager
    def average_parameters(self) -> Iterator[None]:
        """In the block parameters hold their averages; then, whatever happens, their own values."""
        with swapped(list(zip(self._parameters, self.averages, strict=True))):
            yield

    def state_dict(self) -> dict[str, Any]:
        """``decay`` and ``averages``, the tensors themselves."""
        return {"decay": self.decay, "averages": list(self.averages)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: if the averages are not of as many tensors, or not of their shapes, or for
                a decay outside of [0, 1]. Nothing has changed then.
        """
        loaded = state_dict["averages"]
        shapes = [tuple(average.shape) for average in self.averages]
        if [tuple(tensor.shape) for tensor in loaded] != shapes:
            got = [tuple(tensor.shape) for tensor in loaded]
            raise ValueError(f"EMA: averages must have the shapes {shapes}, got {got}")
        self.decay = _checked_decay(state_dict["decay"])
        for average, tensor in zip(self.averages, loaded, strict=True):
            average.copy_(tensor)
