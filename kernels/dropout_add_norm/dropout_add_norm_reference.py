"""``norm(residual + dropout(x)) * weight + bias`` in plain torch: the specification of every
backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dropout.dropout_reference import dropout_reference
from ..quantize_int8.quantize_int8_reference import quantize_int8_reference


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _statistics(z: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """Mean (zero for RMSNorm) and the inverse of the standard deviation, (..., 1)."""
    mean = torch.zeros_like(z[..., :1]) if rms else z.mean(-1, keepdim=True)
    variance = (z - mean).square().mean(-1, keepdim=True)
    return mean, 1 / (variance + eps).sqrt()


def dropout_add_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: int | Tensor,
    threshold: int,
    stream: int,
    scale: float,
    eps: float,
    rms: bool,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, z, mean, rstd)``: y and z (..., n) in x's dtype, mean and rstd (rows,) in the compute
    type. z is rounded before it is normalised. mean is empty for RMSNorm, z unless ``keep_z``."""
    compute = _compute_dtype(x)
    z = dropout_reference(x.to(compute), seed, threshold, stream, scale, -0.0, 0.0, x.dim())
    if residual is not None:
        z = residual.to(compute) + z
    z = z.to(x.dtype)
    wide = z.to(compute)
    mean, rstd = _statistics(wide, eps, rms)
    y = (wide - mean) * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return (
        y.to(x.dtype).contiguous(),
        z.contiguous() if keep_z else z.new_empty(0),
        mean.new_empty(0) if rms else mean.reshape(-1),
        rstd.reshape(-1),
    )


def dropout_add_norm_int8_reference(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``(values, scale, sum)``: y of ``dropout_add_norm_reference`` quantized, int8 (..., n) and
    float32 (...), and z with ``keep_z``, y without."""
    y, z, _, _ = dropout_add_norm_reference(x, *arguments)
    kept = z if arguments[-1] else y
    if x.numel() == 0:
        return y.to(torch.int8), y.new_ones(y.shape[:-1], dtype=torch.float32), kept
    values, scale, _ = quantize_int8_reference(y, None, None, y.shape[-1], True)
    return values, scale.squeeze(-1), kept


def norm_gradients(
    grad_y: Tensor, grad_z: Tensor | None, z: Tensor, weight: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dz, grad_weight, grad_bias)`` in the compute type; differentiable in every argument."""
    compute = _compute_dtype(z)
    grad_y, z = grad_y.to(compute), z.to(compute)
    mean, rstd = _statistics(z, eps, rms)
    x_hat = (z - mean) * rstd
    weighted = grad_y if weight is None else grad_y * weight
    dz = weighted - x_hat * (weighted * x_hat).mean(-1, keepdim=True)
    if not rms:
        dz = dz - weighted.mean(-1, keepdim=True)
    dz = dz * rstd
    if grad_z is not None:
        dz = dz + grad_z.to(compute)
    matrix = (z.shape[:-1].numel(), z.shape[-1])
    return dz, (grad_y * x_hat).reshape(matrix).sum(0), grad_y.reshape(matrix).sum(0)


def dropout_add_norm_backward_reference(
    grad_y: Tensor,
    grad_z: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: int | Tensor,
    threshold: int,
    stream: int,
    scale: float,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(grad_x, grad_residual, grad_weight, grad_bias)``; the last two in the compute type."""
    dz, grad_weight, grad_bias = norm_gradients(grad_y, grad_z, z, weight, eps, rms)
    grad_x = dropout_reference(dz, seed, threshold, stream, scale, -0.0, 0.0, dz.dim())
    return grad_x.to(z.dtype).contiguous(), dz.to(z.dtype).contiguous(), grad_weight, grad_bias
