"""RMSNorm of transformers, which is five to eight operations there, in one.

Nearly every model has a class of its own for it, with the code of another model's. Classes are
therefore told by their code: that of ``forward`` and of ``_norm``, where there is one. The class
that replaces one is made when it is asked for; copies and pickles name the one it replaces.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.rms_norm import rms_norm_rows, serves


def _renewed(source: type[nn.Module]) -> nn.Module:
    target: Any = replacement_of(source) or source
    return target.__new__(target)  # type: ignore[no-any-return]


class _Norm(nn.Module):
    """What replaces a class, ``source``: this before it among the bases."""

    source: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _renewed, (self.source,), self.__dict__


class _OfOneDtype(_Norm):
    """``weight * rms_norm(x).to(x.dtype)`` and the like: with the weight in the dtype of x it makes
    no difference where the rounding stands, but that here it is done once."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if weight.dtype is hidden_states.dtype and serves(hidden_states, weight):
            return rms_norm_rows(hidden_states, weight, self.variance_epsilon)
        return super().forward(hidden_states)  # type: ignore[no-any-return]


class _OfOnePlusWeight(_Norm):
    """``(rms_norm(x.float()) * (1 + weight.float())).to(x.dtype)``, of Gemma."""

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.dtype is not torch.float64 and serves(x, weight):
            return rms_norm_rows(x, 1.0 + weight.float(), self.eps)
        return super().forward(x)  # type: ignore[no-any-return]


# A class with the code, by its model.
_KNOWN = (
    ("llama", "LlamaRMSNorm", _OfOneDtype),
    ("olmo2", "Olmo2RMSNorm", _OfOneDtype),
    ("t5", "T5LayerNorm", _OfOneDtype),
    ("gemma", "GemmaRMSNorm", _OfOnePlusWeight),
)


def _code(kind: type) -> tuple[Any, ...]:
    """What two functions that compute the same have in common, but for their documentation."""
    codes = []
    for name in ("forward", "_norm"):
        code = getattr(getattr(kind, name, None), "__code__", None)
        if code is not None:
            constants = tuple(c for c in code.co_consts if not isinstance(c, str))
            codes.append((code.co_code, code.co_names, code.co_varnames, constants))
    return tuple(codes)


@functools.cache
def _known_codes() -> dict[tuple[Any, ...], type[_Norm]]:
    codes: dict[tuple[Any, ...], type[_Norm]] = {}
    for model, name, replacement in _KNOWN:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        codes[_code(getattr(module, name))] = replacement
    return codes


_made: dict[type[nn.Module], type[nn.Module] | None] = {}


def replacement_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class that replaces one of transformers, or of code written like it."""
    if kind not in _made:
        _made[kind] = _make(kind)
    return _made[kind]


def _make(kind: type[nn.Module]) -> type[nn.Module] | None:
    if issubclass(kind, _Norm) or not kind.__name__.endswith("Norm"):
        return None
    if kind.__module__ == "torch.nn.utils.parametrize":  # it is the module's own, and changed later
        return None
    base = _known_codes().get(_code(kind))
    if base is None:
        return None
    members = {"__module__": __name__, "__qualname__": kind.__qualname__, "source": kind}
    return type(kind.__name__, (base, kind), members)


def replacements(kinds: Iterable[type[nn.Module]]) -> dict[type[nn.Module], type[nn.Module]]:
    """For those of the classes that are replaced, or replace one."""
    sources = {kind.source if issubclass(kind, _Norm) else kind for kind in kinds}
    return {kind: target for kind in sources if (target := replacement_of(kind)) is not None}
