"""``import pyfast.optim as optim``: torch.optim; what pyfast does not replace is torch's own."""

from __future__ import annotations

from typing import Any

import torch.optim as _torch

from ._clip import clip_grad_norm_
from ._ema import EMA
from .adam import Adam, AdamW
from .adamax import Adamax
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["EMA", "SGD", "Adam", "AdamW", "Adamax", "RMSprop", "clip_grad_norm_"]


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*dir(_torch), *__all__})
