"""Activations of transformers that are chains of small operations there, and one in torch."""

from __future__ import annotations

import importlib
from typing import Any

import torch.nn.functional as F
from torch import Tensor

_activations: Any = importlib.import_module("transformers.activations")


class NewGELUActivation(_activations.NewGELUActivation):  # type: ignore[misc]
    """Replaces transformers' "gelu_new", eight operations and as many tensors that are saved, by
    torch's tanh approximation of GELU, the same formula; bfloat16 and float16 are rounded once."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")


class FastGELUActivation(_activations.FastGELUActivation):  # type: ignore[misc]
    """Replaces transformers' "gelu_fast", which is the same formula as "gelu_new"."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")


REPLACEMENTS: dict[Any, Any] = {
    _activations.NewGELUActivation: NewGELUActivation,
    _activations.FastGELUActivation: FastGELUActivation,
}
