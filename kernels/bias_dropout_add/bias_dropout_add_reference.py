"""``residual + dropout(x + bias)`` in plain torch: the specification of every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dropout.dropout_reference import dropout_reference


def bias_dropout_add_reference(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    seed: int | Tensor,
    threshold: int,
    stream: int,
    scale: float,
) -> Tensor:
    """x and residual (..., n), bias (n,) in the compute type: rounded once, at the end."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    value = x.to(compute) if bias is None else x.to(compute) + bias
    dropped = dropout_reference(value, seed, threshold, stream, scale, -0.0, 0.0, x.dim())
    return (residual.to(compute) + dropped).to(x.dtype).contiguous()


def bias_dropout_add_backward_reference(
    grad: Tensor, seed: int | Tensor, threshold: int, stream: int, scale: float
) -> tuple[Tensor, Tensor]:
    """``(grad_x, grad_bias)``, the latter in the compute type."""
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    value = dropout_reference(
        grad.to(compute), seed, threshold, stream, scale, -0.0, 0.0, grad.dim()
    )
    grad_bias = value.reshape(grad.shape[:-1].numel(), grad.shape[-1]).sum(0)
    return value.to(grad.dtype).contiguous(), grad_bias
