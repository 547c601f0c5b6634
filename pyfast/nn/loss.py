"""Losses: torch's, with pyfast's functions."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from . import functional as F
from ._fx import leaf


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Replaces :class:`torch.nn.CrossEntropyLoss`; see
    :func:`pyfast.nn.functional.cross_entropy`.

    Args:
        weight, ignore_index, reduction, label_smoothing: as torch's.
    """

    @leaf
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
