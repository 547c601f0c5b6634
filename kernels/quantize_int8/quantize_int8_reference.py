"""Quantization to int8 in plain torch: the specification of every backend, to the bit.

Everything is computed in float32 (float64 input is rounded to it first), division is true division,
and values are rounded to the nearest integer, halves to even.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quantize_int8_reference(
    x: Tensor, scale: Tensor | None, smooth: Tensor | None, block_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize blocks of ``block_size`` elements of the rows of x; the last of a row may be short.

    Args:
        x: (..., n).
        scale: float32, of one element or of a result's shape; None: from the values.
        smooth: (n,) float32, multiplied to x first, or None.
        block_size: at least 1; n for one scale a row.
        symmetric: -127..127 with ``scale = absmax / 127``; else -128..127 with
            ``scale = (max - min) / 255``, where max is at least 0 and min at most, and
            ``zero_point = -128 - round(min / scale)``, clamped to -128..127.

    Returns:
        ``(values, scale, zero_point)``: int8 of x's shape; float32 and int32 of x's shape with
        ceil(n / block_size) in place of n, ``zero_point`` empty if symmetric. A scale that would be
        zero is 1, and where a block holds NaN or Inf it is NaN, with values of 0.
    """
    n = x.shape[-1]
    num_blocks = -(-n // block_size)
    value = x.to(torch.float32)
    if smooth is not None:
        value = value * smooth
    padded = F.pad(value, (0, num_blocks * block_size - n))
    blocks = padded.reshape(*x.shape[:-1], num_blocks, block_size)
    is_finite = blocks.isfinite().all(-1)
    finite = torch.where(is_finite.unsqueeze(-1), blocks, 0.0)
    low, high = finite.amin(-1).clamp(max=0.0), finite.amax(-1).clamp(min=0.0)
    if scale is not None:
        one = scale.reshape(()).expand(is_finite.shape) if scale.numel() == 1 else None
        new_scale = scale.reshape(is_finite.shape) if one is None else one
    elif symmetric:  # by a tensor: torch multiplies by the reciprocal of a number on CUDA
        new_scale = torch.maximum(-low, high) / low.new_full((), 127.0)
    else:  # halved, so that the difference of the largest floats is finite
        new_scale = (high * 0.5 - low * 0.5) / low.new_full((), 127.5)
    new_scale = torch.where(new_scale == 0.0, 1.0, new_scale)
    quotient = (finite / new_scale.unsqueeze(-1)).round()
    if symmetric:
        zero_point = torch.empty(0, dtype=torch.int32, device=x.device)
        quantized = quotient.clamp(-127.0, 127.0)
    else:
        zero = (-128.0 - (low / new_scale).round()).clamp(-128.0, 127.0)
        zero_point = torch.where(is_finite, zero, 0.0).to(torch.int32)
        quantized = (quotient + zero.unsqueeze(-1)).clamp(-128.0, 127.0)
    quantized = torch.where(is_finite.unsqueeze(-1), quantized, 0.0)
    values = quantized.reshape(padded.shape)[..., :n].to(torch.int8)
    new_scale = torch.where(is_finite, new_scale, float("nan"))
    return values.contiguous(), new_scale.contiguous(), zero_point
