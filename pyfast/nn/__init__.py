"""``import pyfast.nn as nn``: torch.nn with pyfast's modules in place of torch's; what is not here
is torch's own."""

from __future__ import annotations

from typing import Any

import torch.nn as _torch

from . import functional
from .attention import MultiheadAttention
from .dropconnect import DropConnect
from .dropout import AlphaDropout, Dropout, Dropout1d, Dropout2d, Dropout3d, FeatureAlphaDropout
from .fused import BiasDropoutAdd, DropoutAddNorm
from .int8 import Int8Embedding, Int8Linear
from .int8_attention import Int8MultiheadAttention
from .int8_conv import Int8Conv1d, Int8Conv2d
from .linear import Linear
from .loss import CrossEntropyLoss
from .norm import RMSNorm
from .transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "AlphaDropout",
    "BiasDropoutAdd",
    "CrossEntropyLoss",
    "DropConnect",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAddNorm",
    "FeatureAlphaDropout",
    "Int8Conv1d",
    "Int8Conv2d",
    "Int8Embedding",
    "Int8Linear",
    "Int8MultiheadAttention",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "functional",
]


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted(set(dir(_torch)) | set(__all__))
