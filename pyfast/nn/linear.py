"""Linear: torch's, with pyfast's function."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from . import functional as F
from ._fx import leaf


class Linear(nn.Linear):
    """Replaces :class:`torch.nn.Linear`: few rows without a gradient, as in decoding, are
    multiplied at the memory's speed; see :func:`pyfast.nn.functional.linear`.

    Args:
        in_features, out_features, bias, device, dtype: as for torch's.
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)
