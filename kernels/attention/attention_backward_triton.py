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
from ..common.launch_triton import Launch, Plans, launch
from ..common.philox_triton import seed_argument
from .attention_key_gradient_triton import key_value_gradient_kernel
from .attention_mask_gradient_triton import mask_gradient_kernel
from .attention_query_gradient_triton import query_gradient_kernel
from .attention_tile_triton import load_rows
from .attention_tiles import Tiles, gradient_tiles, launch_fastest
from .attention_triton import as_bytes, keep_plan, kernel_arguments, plan_key, strides

_plans = Plans()


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
    batch, heads = q.shape[:2]
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
    widest = max(triton.next_power_of_2(q.shape[3]), triton.next_power_of_2(v.shape[3]))
    tiles = gradient_tiles(chip(q.device, q.dtype), widest)
    group = heads // k.shape[1]
    num_blocks = triton.cdiv(num_keys, tiles.keys.block_n)
    # With few key heads each query head has a sum of its own, and these are added afterwards.
    is_split = group > 1 and batch * k.shape[1] * num_blocks < num_multiprocessors(q.device)
    key_grads = grad_k, grad_v
    if is_split:
        key_grads = tuple(  # type: ignore[assignment]
            torch.empty((batch, heads, *t.shape[2:]), dtype=torch.float32, device=t.device)
            for t in (grad_k, grad_v)
        )
    operands = q, k, v, as_bytes(mask), alibi_slopes, cu_seqlens_q, cu_seqlens_k
    tensors = *operands, out, grad_out, lse, grad_lse, grad_q, *key_grads, grad_mask, delta
    key = plan_key(tensors, seed, rule)
    if not _plans.run(key, tensors, seed_argument(seed)[0]):
        common: dict[str, Any] = kernel_arguments(*operands, seed, *rule)
        launches = [_launch_delta(out, grad_out, grad_lse, delta)]
        common |= {
            "grad_out_pointer": grad_out,
            "lse_pointer": lse,
            "delta_pointer": delta,
            **strides("grad_out", "bhm", grad_out),
            "grad_scale": scale,
        }
        launches.append(
            launch_fastest(
                lambda tiles: _launch_queries(common, tiles, grad_q, grad_mask, batch),
                tiles.queries,
                common,
                "queries",
            )
        )
        launches.append(
            launch_fastest(
                lambda tiles: _launch_keys(common, tiles, *key_grads, batch),
                tiles.keys,
                common,
                "keys",
            )
        )
        if grad_mask.numel() > 0 and not _is_full(grad_mask, common):
            launches.append(_launch_mask(common, tiles.queries, grad_mask, batch))
        keep_plan(_plans, key, tensors, launches, [])
    if is_split:
        for grad, parts in zip((grad_k, grad_v), key_grads, strict=True):
            grad.copy_(parts.unflatten(1, (-1, group)).sum(2))
    return grad_q, grad_k, grad_v, grad_mask, delta


def _launch_delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor, delta: Tensor) -> Launch:
    batch, heads, num_queries, value_size = out.shape
    block_m = 32
    num_blocks = triton.cdiv(num_queries, block_m)
    arguments = {
        "out_pointer": out,
        "grad_out_pointer": grad_out,
        "grad_lse_pointer": grad_lse,
        "delta_pointer": delta,
        **strides("out", "bhm", out),
        **strides("grad_out", "bhm", grad_out),
        "heads": heads,
        "num_queries": num_queries,
        "num_blocks": num_blocks,
        "VALUE_SIZE": value_size,
        "BLOCK_DV": max(16, triton.next_power_of_2(value_size)),
        "BLOCK_M": block_m,
    }
    return launch(delta_kernel, (batch * heads * num_blocks,), arguments)


def _is_full(grad_mask: Tensor, common: dict[str, Any]) -> bool:
    """Whether every score has an element of its own in the mask."""
    q, k = common["q_pointer"], common["k_pointer"]
    return grad_mask.shape == (*q.shape[:3], k.shape[2])


def _launch_queries(
    common: dict[str, Any], tiles: Tiles, grad_q: Tensor, grad_mask: Tensor, batch: int
) -> Launch:
    num_blocks = triton.cdiv(common["num_queries"], tiles.block_m)
    if common["IS_VARLEN"]:
        num_blocks = common["num_queries"] // tiles.block_m + common["num_sequences"]
    arguments = {
        **common,
        "grad_q_pointer": grad_q,
        "grad_mask_pointer": grad_mask if grad_mask.numel() else grad_q,
        **strides("grad_q", "bhm", grad_q),
        "num_blocks": num_blocks,
        "STORE_MASK": _is_full(grad_mask, common),
        **tiles.sizes(),
    }
    grid = (batch * common["heads"] * num_blocks,)
    return launch(query_gradient_kernel, grid, arguments, **tiles.options())


def _launch_keys(
    common: dict[str, Any], tiles: Tiles, grad_k: Tensor, grad_v: Tensor, batch: int
) -> Launch:
    """``grad_k`` and ``grad_v``: of each key head, or of each query head."""
    num_blocks = triton.cdiv(common["num_keys"], tiles.block_n)
    if common["IS_VARLEN"]:
        num_blocks = common["num_keys"] // tiles.block_n + common["num_sequences"]
    num_heads = grad_k.shape[1]
    arguments = {
        **common,
        "grad_k_pointer": grad_k,
        "grad_v_pointer": grad_v,
        **strides("grad_k", "bhn", grad_k),
        **strides("grad_v", "bhn", grad_v),
        "num_blocks": num_blocks,
        "heads_per_program": common["heads"] // num_heads,
        **tiles.sizes(),
    }
    grid = (batch * num_heads * num_blocks,)
    return launch(key_value_gradient_kernel, grid, arguments, **tiles.options())


def _launch_mask(common: dict[str, Any], tiles: Tiles, grad_mask: Tensor, batch: int) -> Launch:
    mask_batch, mask_heads, mask_queries, mask_keys = grad_mask.shape
    tiles_m = 1 if mask_queries == 1 else triton.cdiv(mask_queries, tiles.block_m)
    tiles_n = 1 if mask_keys == 1 else triton.cdiv(mask_keys, tiles.block_n)
    arguments = {
        **common,
        "grad_mask_pointer": grad_mask,
        "num_blocks": 1,
        "batch": batch,
        "mask_batch": mask_batch,
        "mask_heads": mask_heads,
        "mask_queries": mask_queries,
        "mask_keys": mask_keys,
        **tiles.sizes(),
    }
    grid = (mask_batch * mask_heads * tiles_m * tiles_n,)
    return launch(mask_gradient_kernel, grid, arguments, **tiles.options())
