"""Gradients of attention, from the logarithm of each row's denominator: the weights are computed
again, tile by tile. A kernel for keys and values takes a block of keys over the queries that see
it, one for queries a block of queries over the keys it sees; nothing is added by two programs, so
that the result is the same every time. An additive mask as large as the scores gets its gradient
from the kernel for queries, a broadcast one from a kernel of its own that adds up in one program.

Scores lie as the forward pass has them, queries along the rows: the bits of dropout then arise in
the registers that need them. Bound by tensor cores: seven products, against two forward.
Source: Dao 2023 (FlashAttention-2), there with five products and atomic additions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chips import chip, num_multiprocessors
from .attention_key_gradient_triton import key_value_gradient_kernel
from .attention_mask_gradient_triton import mask_gradient_kernel
from .attention_query_gradient_triton import query_gradient_kernel
from .attention_tile_triton import load_rows
from .attention_tiles import Tiles, gradient_tiles, launch_fastest
from .attention_triton import kernel_arguments, strides


@triton.jit
def delta_kernel(
    out_pointer,
    grad_out_pointer,
    grad_lse_pointer,
    delta_pointer,
    out_b_stride,
    out_h_stride,
    out_m_stride,
    grad_out_b_stride,
    grad_out_h_stride,
    grad_out_m_stride,
    heads,
    num_queries,
    num_blocks,
    VALUE_SIZE: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """sum(out * grad_out) - grad_lse of every row."""
    outer = (tl.program_id(0) // num_blocks).to(tl.int64)
    row = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b, head = outer // heads, outer % heads
    base = out_pointer + b * out_b_stride + head * out_h_stride
    out = load_rows(base, row, out_m_stride, num_queries, VALUE_SIZE, BLOCK_DV)
    base = grad_out_pointer + b * grad_out_b_stride + head * grad_out_h_stride
    grad_out = load_rows(base, row, grad_out_m_stride, num_queries, VALUE_SIZE, BLOCK_DV)
    at = outer * num_queries + row
    grad_lse = tl.load(grad_lse_pointer + at, mask=row < num_queries, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1) - grad_lse
    tl.store(delta_pointer + at, delta, mask=row < num_queries)


def attention_backward_triton(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: int | Tensor,
    threshold: int,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    bottom_right: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the mask (float32; empty where none is wanted), and delta.

    All but ``mask`` have a contiguous last dimension; grad_lse and lse are contiguous.
    """
    batch, heads, num_queries, _ = q.shape
    num_keys = k.shape[2]
    grad_q, grad_k, grad_v = (
        t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v)
    )
    delta = torch.empty_like(lse)
    grad_mask = lse.new_empty(0)
    if with_mask and mask is not None:
        grad_mask = lse.new_zeros(mask.shape)
    is_varlen = cu_seqlens_q is not None
    if lse.numel() == 0 or (is_varlen and len(cu_seqlens_q) == 1) or num_keys == 0:  # type: ignore[arg-type]
        for grad in (grad_q, grad_k, grad_v):
            grad.zero_()
        return grad_q, grad_k, grad_v, grad_mask, delta.copy_(-grad_lse)
    rule = (threshold, scale, softcap, left, right, bottom_right)
    operands = q, k, v, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k
    common: dict[str, Any] = kernel_arguments(*operands, seed, *rule)
    block_m = 32
    num_blocks = triton.cdiv(num_queries, block_m)
    delta_kernel[(batch * heads * num_blocks,)](
        out,
        grad_out,
        grad_lse,
        delta,
        *out.stride()[:3],
        *grad_out.stride()[:3],
        heads,
        num_queries,
        num_blocks,
        VALUE_SIZE=v.shape[3],
        BLOCK_DV=common["BLOCK_DV"],
        BLOCK_M=block_m,
    )
    common |= {
        "grad_out_pointer": grad_out,
        "lse_pointer": lse,
        "delta_pointer": delta,
        **strides("grad_out", "bhm", grad_out),
        "grad_scale": scale,
    }
    widest = max(common["BLOCK_D"], common["BLOCK_DV"])
    tiles = gradient_tiles(chip(q.device, q.dtype), widest)
    launch_fastest(
        lambda tiles: _launch_queries(common, tiles, grad_q, grad_mask, batch),
        tiles.queries,
        common,
        "queries",
    )
    launch_fastest(
        lambda tiles: _launch_keys(common, tiles, grad_k, grad_v, batch), tiles.keys, common, "keys"
    )
    if grad_mask.numel() > 0 and not _is_full(grad_mask, common):
        _launch_mask(common, tiles.queries, grad_mask, batch)
    return grad_q, grad_k, grad_v, grad_mask, delta


def _is_full(grad_mask: Tensor, common: dict[str, Any]) -> bool:
    """Whether every score has an element of its own in the mask."""
    q, k = common["q_pointer"], common["k_pointer"]
    return grad_mask.shape == (*q.shape[:3], k.shape[2])


def _launch_queries(
    common: dict[str, Any], tiles: Tiles, grad_q: Tensor, grad_mask: Tensor, batch: int
) -> None:
    num_blocks = triton.cdiv(common["num_queries"], tiles.block_m)
    if common["IS_VARLEN"]:
        num_blocks = common["num_queries"] // tiles.block_m + common["num_sequences"]
    query_gradient_kernel[(batch * common["heads"] * num_blocks,)](
        **common,
        grad_q_pointer=grad_q,
        grad_mask_pointer=grad_mask if grad_mask.numel() else grad_q,
        **strides("grad_q", "bhm", grad_q),
        num_blocks=num_blocks,
        STORE_MASK=_is_full(grad_mask, common),
        **tiles.as_arguments(),
    )


def _launch_keys(
    common: dict[str, Any], tiles: Tiles, grad_k: Tensor, grad_v: Tensor, batch: int
) -> None:
    num_blocks = triton.cdiv(common["num_keys"], tiles.block_n)
    if common["IS_VARLEN"]:
        num_blocks = common["num_keys"] // tiles.block_n + common["num_sequences"]
    heads, group = common["heads"], common["group"]
    # With few key heads each query head has a sum of its own, and these are added afterwards.
    is_split = batch * heads // group * num_blocks < num_multiprocessors(grad_k.device)
    heads_per_program = 1 if is_split else group
    targets = grad_k, grad_v
    if heads_per_program != group:
        targets = tuple(  # type: ignore[assignment]
            torch.empty((batch, heads, *t.shape[2:]), dtype=torch.float32, device=t.device)
            for t in (grad_k, grad_v)
        )
    key_value_gradient_kernel[(batch * heads // heads_per_program * num_blocks,)](
        **common,
        grad_k_pointer=targets[0],
        grad_v_pointer=targets[1],
        **strides("grad_k", "bhn", targets[0]),
        **strides("grad_v", "bhn", targets[1]),
        num_blocks=num_blocks,
        heads_per_program=heads_per_program,
        **tiles.as_arguments(),
    )
    if heads_per_program != group:
        for grad, parts in zip((grad_k, grad_v), targets, strict=True):
            grad.copy_(parts.unflatten(1, (-1, group)).sum(2))


def _launch_mask(common: dict[str, Any], tiles: Tiles, grad_mask: Tensor, batch: int) -> None:
    mask_batch, mask_heads, mask_queries, mask_keys = grad_mask.shape
    tiles_m = 1 if mask_queries == 1 else triton.cdiv(mask_queries, tiles.block_m)
    tiles_n = 1 if mask_keys == 1 else triton.cdiv(mask_keys, tiles.block_n)
    mask_gradient_kernel[(mask_batch * mask_heads * tiles_m * tiles_n,)](
        **common,
        grad_mask_pointer=grad_mask,
        num_blocks=1,
        batch=batch,
        mask_batch=mask_batch,
        mask_heads=mask_heads,
        mask_queries=mask_queries,
        mask_keys=mask_keys,
        **tiles.as_arguments(),
    )
