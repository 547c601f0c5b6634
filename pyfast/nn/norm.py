"""Norms: torch's, with pyfast's functions."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from . import functional as F
from ._fx import leaf


class RMSNorm(nn.RMSNorm):
    """Replaces :class:`torch.nn.RMSNorm`; see :func:`pyfast.nn.functional.rms_norm`.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as for torch's.
    """

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
