"""int8 matrix products in plain torch: the specification of every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..quantize_int8.quantize_int8_reference import quantize_int8_reference

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def activate(y: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(y)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return F.silu(y) if activation == "silu" else y


def int8_mm_reference(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) int8 times b (K, N) int8: (M, N) int32, exact modulo 2**32.

    Products of chunks of 2**16 columns are exact in float64 (below 2**53).
    """
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int64, device=a.device)
    for begin in range(0, a.shape[1], 1 << 16):
        chunk = slice(begin, begin + (1 << 16))
        total += (a[:, chunk].double() @ b[chunk].double()).long()
    return ((total + 2**31) % 2**32 - 2**31).int()


def int8_linear_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    smooth: Tensor | None,
    weight_only: bool,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """``activation(x @ (weight_scale * weight).T + bias)`` with int8 weights.

    Args:
        x: (..., K), floating point; or int8 with ``input_scale`` of shape (...).
        weight: (N, K) int8.
        weight_scale: (N,) float32.
        bias: (N,) floating point, or None.
        input_scale: of quantized x, see above; of x to be quantized: one float32, or None: a scale
            per row from its values.
        smooth: (K,) float32, multiplied to x first, or None.
        weight_only: compute with x as it is; else quantize its rows, symmetric.
        activation: one of ACTIVATIONS.
        dtype: of the result.

    Returns:
        (..., N). Quantized: the int32 sum as float32, times the row's scale, times the weight's,
        plus bias: each operation rounded, in this order. Weight-only: the sum of ``x * weight`` in
        float32, in any order, times the weight's scale, plus bias.
    """
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if weight_only:
        value = rows.to(torch.float32)
        if smooth is not None:
            value = value * smooth
        y = (value @ weight.to(torch.float32).t()) * weight_scale
    else:
        if x.dtype == torch.int8:
            assert input_scale is not None
            quantized, scale = rows, input_scale.reshape(-1, 1)
        else:
            quantized, scale, _ = quantize_int8_reference(
                rows.detach(), input_scale, smooth, max(1, rows.shape[1]), True
            )
        if rows.shape[1] == 0:
            scale = rows.new_ones(rows.shape[0], 1, dtype=torch.float32)
        y = int8_mm_reference(quantized, weight.t()).to(torch.float32) * scale * weight_scale
        if forward_ad._current_level >= 0 and x.is_floating_point():  # as if x was not rounded
            through = rows.to(torch.float32) * (1.0 if smooth is None else smooth)
            through = (through @ weight.to(torch.float32).t()) * weight_scale
            y = y + (through - through.detach())
    if bias is not None:
        y = y + bias.to(torch.float32)
    return activate(y, activation).to(dtype).reshape(*x.shape[:-1], weight.shape[0])
