"""Forward: a program takes BLOCK consecutive elements of the matrix. Backward: a program takes 32
rows of COLUMNS columns and adds them up; torch adds the chunks. Bound by bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.philox_triton import load_seed, row_bits, seed_argument, shard_argument

BLOCK = 2048
COLUMNS = 512
CHUNK_ROWS = 32


@triton.jit(do_not_specialize=["seed"])
def forward_kernel(
    x_pointer,
    bias_pointer,
    residual_pointer,
    y_pointer,
    seed,
    first_index,
    num_elements,
    num_columns,
    threshold,
    stream,
    scale,
    HAS_BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    inside = index < num_elements
    bits = row_bits(load_seed(seed, SEED_IS_POINTER), first_index + first, stream, BLOCK, ALIGNED)
    value = tl.load(x_pointer + index, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias_pointer + index % num_columns, mask=inside, other=0.0)
    residual = tl.load(residual_pointer + index, mask=inside, other=0.0).to(tl.float32)
    y = residual + tl.where(bits.to(tl.int32) >= threshold, value * scale, 0.0)
    tl.store(y_pointer + index, y.to(y_pointer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def backward_kernel(
    grad_pointer,
    grad_x_pointer,
    partial_pointer,
    seed,
    first_index,
    num_rows,
    num_columns,
    threshold,
    stream,
    scale,
    ALIGNED: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1).to(tl.int64) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    inside = column < num_columns
    key = load_seed(seed, SEED_IS_POINTER)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    row_end = tl.minimum((chunk + 1) * CHUNK_ROWS, num_rows)
    for row_index in range(chunk * CHUNK_ROWS, row_end):
        row = tl.cast(row_index, tl.int64)
        first = first_index + row * num_columns + first_column
        bits = row_bits(key, first, stream, COLUMNS, ALIGNED)
        offset = row * num_columns + column
        grad = tl.load(grad_pointer + offset, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(bits.to(tl.int32) >= threshold, grad * scale, 0.0)
        tl.store(grad_x_pointer + offset, value.to(grad_x_pointer.dtype.element_ty), mask=inside)
        total += value
    tl.store(partial_pointer + chunk * num_columns + column, total, mask=inside)


def bias_dropout_add_triton(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    seed: int | Tensor,
    threshold: int,
    stream: int,
    scale: float,
) -> Tensor:
    """See ``bias_dropout_add_reference``."""
    x, residual = x.contiguous(), residual.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    argument, is_pointer = seed_argument(seed)
    first_index = shard_argument(seed)[0]
    forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        x,
        x if bias is None else bias.contiguous(),
        residual,
        y,
        argument,
        first_index,
        x.numel(),
        x.shape[-1],
        threshold,
        stream,
        scale,
        HAS_BIAS=bias is not None,
        ALIGNED=first_index % 8 == 0,
        SEED_IS_POINTER=is_pointer,
        BLOCK=BLOCK,
    )
    return y


def bias_dropout_add_backward_triton(
    grad: Tensor, seed: int | Tensor, threshold: int, stream: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``bias_dropout_add_backward_reference``."""
    grad = grad.contiguous()
    grad_x = torch.empty_like(grad)
    num_columns = grad.shape[-1]
    num_rows = grad.shape[:-1].numel()
    chunks = triton.cdiv(num_rows, CHUNK_ROWS)
    partial = torch.empty((chunks, num_columns), dtype=torch.float32, device=grad.device)
    argument, is_pointer = seed_argument(seed)
    first_index = shard_argument(seed)[0]
    if grad.numel() > 0:
        backward_kernel[(chunks, triton.cdiv(num_columns, COLUMNS))](
            grad,
            grad_x,
            partial,
            argument,
            first_index,
            num_rows,
            num_columns,
            threshold,
            stream,
            scale,
            ALIGNED=num_columns % 8 == 0 and first_index % 8 == 0,
            SEED_IS_POINTER=is_pointer,
            CHUNK_ROWS=CHUNK_ROWS,
            COLUMNS=COLUMNS,
        )
    return grad_x, partial.sum(0)
