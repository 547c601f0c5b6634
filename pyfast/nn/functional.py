"""``torch.nn.functional`` with pyfast's functions in place of torch's; what is not here is torch's
own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as _torch

from ..ops.attention_with_kv_cache import attention_with_kv_cache
from ..ops.bias_dropout_add import bias_dropout_add
from ..ops.channel_dropout import dropout1d, dropout2d, dropout3d, feature_alpha_dropout
from ..ops.cross_entropy import cross_entropy
from ..ops.dropconnect import dropconnect_linear
from ..ops.dropout import alpha_dropout, dropout
from ..ops.dropout_add_norm import dropout_add_norm
from ..ops.int8_linear import int8_linear, int8_mm
from ..ops.linear import linear
from ..ops.multi_head_attention import multi_head_attention_forward
from ..ops.quantize_int8 import dequantize_int8, fake_quantize, quantize_int8
from ..ops.rms_norm import rms_norm
from ..ops.scaled_dot_product_attention import scaled_dot_product_attention
from ..ops.varlen_attention import varlen_attention

__all__ = [
    "alpha_dropout",
    "attention_with_kv_cache",
    "bias_dropout_add",
    "cross_entropy",
    "dequantize_int8",
    "dropconnect_linear",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add_norm",
    "fake_quantize",
    "feature_alpha_dropout",
    "int8_linear",
    "int8_mm",
    "linear",
    "multi_head_attention_forward",
    "quantize_int8",
    "rms_norm",
    "scaled_dot_product_attention",
    "varlen_attention",
]


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted(set(dir(_torch)) | set(__all__))
