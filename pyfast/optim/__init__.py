"""``import pyfast.optim as optim``: torch.optim; what pyfast does not replace is torch's own."""

from __future__ import annotations

from typing import Any

import torch.optim as _torch


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return dir(_torch)
