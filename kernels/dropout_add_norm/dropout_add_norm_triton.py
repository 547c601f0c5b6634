"""Forward: a program takes one row, held in registers. Backward: a program takes 32 rows one after
another and adds up the weight and bias gradients; torch adds the chunks. Bound by bytes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.philox_triton import load_seed, row_bits, seed_argument, shard_argument
from ..quantize_int8.quantize_int8_triton import quantized, step_of

CHUNK_ROWS = 32


@triton.jit(do_not_specialize=["seed"])
def forward_kernel(
    x_pointer,
    residual_pointer,
    weight_pointer,
    bias_pointer,
    y_pointer,
    z_pointer,
    mean_pointer,
    rstd_pointer,
    values_pointer,
    value_scale_pointer,
    seed,
    first_index,
    num_columns,
    threshold,
    stream,
    scale,
    eps,
    RMS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_Y: tl.constexpr,
    KEEP_Z: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < num_columns
    offset = row * num_columns + column
    first = first_index + row * num_columns
    bits = row_bits(load_seed(seed, SEED_IS_POINTER), first, stream, COLUMNS, ALIGNED)
    x = tl.load(x_pointer + offset, mask=inside, other=0.0).to(tl.float32)
    z = tl.where(bits.to(tl.int32) >= threshold, x * scale, 0.0)
    if HAS_RESIDUAL:
        z = tl.load(residual_pointer + offset, mask=inside, other=0.0).to(tl.float32) + z
    element_type = y_pointer.dtype.element_ty
    stored = z.to(element_type)
    if KEEP_Z:
        tl.store(z_pointer + offset, stored, mask=inside)
    z = tl.where(inside, stored.to(tl.float32), 0.0)
    if RMS:
        centered = z
    else:
        mean = tl.sum(z, axis=0) / num_columns
        tl.store(mean_pointer + row, mean)
        centered = tl.where(inside, z - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=0) / num_columns + eps)
    tl.store(rstd_pointer + row, rstd)
    y = centered * rstd
    if HAS_WEIGHT:
        y = y * tl.load(weight_pointer + column, mask=inside, other=0.0)
    if HAS_BIAS:
        y = y + tl.load(bias_pointer + column, mask=inside, other=0.0)
    rounded = y.to(element_type)
    if KEEP_Y:
        tl.store(y_pointer + offset, rounded, mask=inside)
    if QUANTIZE:
        value = tl.where(inside, rounded.to(tl.float32), 0.0)
        largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
        value_scale, zero, is_finite = step_of(
            value_scale_pointer, 0, largest, largest, None, 0, True
        )
        tl.store(value_scale_pointer + row, tl.where(is_finite, value_scale, float("nan")))
        tl.store(
            values_pointer + offset, quantized(value, value_scale, zero, is_finite, True), inside
        )


@triton.jit(do_not_specialize=["seed"])
def backward_kernel(
    grad_y_pointer,
    grad_z_pointer,
    z_pointer,
    weight_pointer,
    mean_pointer,
    rstd_pointer,
    grad_x_pointer,
    grad_residual_pointer,
    partial_pointer,
    seed,
    first_index,
    num_rows,
    num_columns,
    num_chunks,
    threshold,
    stream,
    scale,
    RMS: tl.constexpr,
    HAS_GRAD_Z: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < num_columns
    key = load_seed(seed, SEED_IS_POINTER)
    if HAS_WEIGHT:
        weight = tl.load(weight_pointer + column, mask=inside, other=0.0)
    weight_sum = tl.zeros((COLUMNS,), dtype=tl.float32)
    bias_sum = tl.zeros((COLUMNS,), dtype=tl.float32)
    row_end = tl.minimum((chunk + 1) * CHUNK_ROWS, num_rows)
    for row_index in range(chunk * CHUNK_ROWS, row_end):
        row = tl.cast(row_index, tl.int64)
        offset = row * num_columns + column
        z = tl.load(z_pointer + offset, mask=inside, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_pointer + offset, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_pointer + row)
        if RMS:
            x_hat = z * rstd
        else:
            x_hat = tl.where(inside, (z - tl.load(mean_pointer + row)) * rstd, 0.0)
        weight_sum += grad_y * x_hat
        bias_sum += grad_y
        weighted = grad_y
        if HAS_WEIGHT:
            weighted = grad_y * weight
        grad = weighted - x_hat * (tl.sum(weighted * x_hat, axis=0) / num_columns)
        if not RMS:
            grad = grad - tl.sum(weighted, axis=0) / num_columns
        grad = grad * rstd
        if HAS_GRAD_Z:
            grad += tl.load(grad_z_pointer + offset, mask=inside, other=0.0).to(tl.float32)
        element_type = grad_x_pointer.dtype.element_ty
        tl.store(grad_residual_pointer + offset, grad.to(element_type), mask=inside)
        bits = row_bits(key, first_index + row * num_columns, stream, COLUMNS, ALIGNED)
        grad = tl.where(bits.to(tl.int32) >= threshold, grad * scale, 0.0)
        tl.store(grad_x_pointer + offset, grad.to(element_type), mask=inside)
    part = partial_pointer + chunk * num_columns + column
    tl.store(part, weight_sum, mask=inside)
    tl.store(part + num_chunks * num_columns, bias_sum, mask=inside)


def _columns(num_columns: int) -> int:
    return max(16, triton.next_power_of_2(num_columns))


def _num_warps(columns: int) -> int:
    return min(16, max(1, columns // 256))


def _forward(
    x: Tensor,
    inputs: tuple[Any, ...],
    y: Tensor | None,
    z: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    quantized: tuple[Tensor, Tensor] | None,
) -> None:
    """Write what is not None. ``inputs``: the op's arguments between x and ``keep_z``."""
    if x.numel() == 0:
        return
    residual, weight, bias, seed, threshold, stream, scale, eps, rms = inputs
    num_columns = x.shape[-1]
    argument, is_pointer = seed_argument(seed)
    first_index = shard_argument(seed)[0]
    columns = _columns(num_columns)
    values, value_scale = (x, rstd) if quantized is None else quantized
    forward_kernel[(x.shape[:-1].numel(),)](
        x,
        x if residual is None else residual.contiguous(),
        rstd if weight is None else weight.contiguous(),
        rstd if bias is None else bias.contiguous(),
        x if y is None else y,
        x if z is None else z,
        rstd if rms else mean,
        rstd,
        values,
        value_scale,
        argument,
        first_index,
        num_columns,
        threshold,
        stream,
        scale,
        eps,
        RMS=rms,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        KEEP_Y=y is not None,
        KEEP_Z=z is not None,
        QUANTIZE=quantized is not None,
        ALIGNED=num_columns % 8 == 0 and first_index % 8 == 0,
        SEED_IS_POINTER=is_pointer,
        COLUMNS=columns,
        num_warps=_num_warps(columns),
    )


def _statistics(x: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    """mean and rstd, to be written; nothing is for empty rows."""
    num_rows = x.shape[:-1].numel()
    make = x.new_empty if x.shape[-1] else x.new_zeros
    return make(0 if rms else num_rows, dtype=torch.float32), make(num_rows, dtype=torch.float32)


def dropout_add_norm_triton(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``dropout_add_norm_reference``."""
    rms, keep_z = arguments[-2:]
    x = x.contiguous()
    y = torch.empty_like(x)
    z = torch.empty_like(x) if keep_z else x.new_empty(0)
    mean, rstd = _statistics(x, rms)
    _forward(x, arguments[:-1], y, z if keep_z else None, mean, rstd, None)
    return y, z, mean, rstd


def dropout_add_norm_int8_triton(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See ``dropout_add_norm_int8_reference``."""
    rms, keep_z = arguments[-2:]
    x = x.contiguous()
    values = torch.empty_like(x, dtype=torch.int8)
    value_scale = torch.ones(x.shape[:-1], dtype=torch.float32, device=x.device)
    kept = torch.empty_like(x)
    y, z = (None, kept) if keep_z else (kept, None)
    _forward(x, arguments[:-1], y, z, *_statistics(x, rms), (values, value_scale))
    return values, value_scale, kept


def dropout_add_norm_backward_triton(
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
    """See ``dropout_add_norm_backward_reference``."""
    z = z.contiguous()
    num_columns = z.shape[-1]
    num_rows = z.shape[:-1].numel()
    grad_x, grad_residual = torch.empty_like(z), torch.empty_like(z)
    chunks = triton.cdiv(num_rows, CHUNK_ROWS)
    partial = torch.empty((2, chunks, num_columns), dtype=torch.float32, device=z.device)
    argument, is_pointer = seed_argument(seed)
    first_index = shard_argument(seed)[0]
    columns = _columns(num_columns)
    if z.numel() > 0:
        backward_kernel[(chunks,)](
            grad_y.contiguous(),
            z if grad_z is None else grad_z.contiguous(),
            z,
            rstd if weight is None else weight.contiguous(),
            rstd if rms else mean,
            rstd,
            grad_x,
            grad_residual,
            partial,
            argument,
            first_index,
            num_rows,
            num_columns,
            chunks,
            threshold,
            stream,
            scale,
            RMS=rms,
            HAS_GRAD_Z=grad_z is not None,
            HAS_WEIGHT=weight is not None,
            ALIGNED=num_columns % 8 == 0 and first_index % 8 == 0,
            SEED_IS_POINTER=is_pointer,
            CHUNK_ROWS=CHUNK_ROWS,
            COLUMNS=columns,
            num_warps=_num_warps(columns),
        )
    return grad_x, grad_residual, partial[0].sum(0), partial[1].sum(0)
