"""DropConnect as a module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Generator, Tensor

from . import functional as F
from ._fx import leaf


class DropConnect(nn.Linear):
    """A :class:`torch.nn.Linear` whose weights are dropped in training; torch has no such module.

    See :func:`pyfast.nn.functional.dropconnect_linear`. In eval mode it is a Linear. Parameters,
    initialisation and state_dict are those of Linear.

    Args:
        in_features, out_features, bias, device, dtype: as for Linear.
        p: probability of a weight to be zeroed. Default: 0.5
        generator: where seeds are drawn from. Default: torch's default CPU generator
        seed: a fixed seed: every call then has the same mask.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        generator: Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> None:
        if p < 0 or p > 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.p = p
        self.generator = generator
        self.seed = seed

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        options: dict[str, Any] = {"generator": self.generator, "seed": self.seed}
        return F.dropconnect_linear(input, self.weight, self.bias, self.p, self.training, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"
