"""Attention in Triton: what its kernels are called with, and the forward pass.

float32 products are three passes of TF32 (about 22 bits), or one where torch allows TF32
(``torch.backends.cuda.matmul.fp32_precision`` or ``allow_tf32``).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.chips import chip, num_multiprocessors
from ..common.launch_triton import Launch, Plans, kind_of, kind_of_seed, launch
from ..common.philox_triton import seed_argument, shard_argument
from . import attention_tiles
from .attention_forward_triton import combine_kernel, forward_kernel
from .attention_tile_triton import LOG2E
from .attention_tiles import (
    Tiles,
    decode_tiles,
    forward_tiles,
    is_capturing,
    launch_fastest,
)

FAR = 1 << 30  # no bound
_plans, _cache_plans = Plans(), Plans()
MAX_PACKED_ROWS = 64
MAX_SPLITS = 64


def kernel_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: int | Tensor,
    threshold: int,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    bottom_right: bool,
) -> dict[str, Any]:
    """What the kernels of the forward and of the backward pass are called with. A mask of bytes is
    a boolean one."""
    seed_or_pointer, is_pointer = seed_argument(seed)
    place = shard_argument(seed)
    mask_type = 0 if mask is None else 1 if mask.dtype == torch.uint8 else 2
    if mask is None:
        mask_strides = [0] * 4
    else:
        mask_strides = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
    head_size, value_size = q.shape[3], v.shape[3]
    unused = q  # what a kernel does not read
    return {
        "q_pointer": q,
        "k_pointer": k,
        "v_pointer": v,
        "mask_pointer": unused if mask is None else mask,
        "slopes_pointer": unused if alibi_slopes is None else alibi_slopes,
        "cu_q_pointer": unused if cu_seqlens_q is None else cu_seqlens_q,
        "cu_k_pointer": unused if cu_seqlens_k is None else cu_seqlens_k,
        "seed": seed_or_pointer,
        "first_head": place[0],
        "head_step": place[1] if len(place) > 1 else q.shape[1],
        **strides("q", "bhm", q),
        **strides("k", "bhn", k),
        **strides("v", "bhn", v),
        **{f"mask_{d}_stride": s for d, s in zip("bhmn", mask_strides, strict=True)},
        "slopes_b_stride": q.shape[1] if alibi_slopes is not None and len(alibi_slopes) > 1 else 0,
        "heads": q.shape[1],
        "group": q.shape[1] // k.shape[1],
        "num_queries": q.shape[2],
        "num_keys": k.shape[2],
        "num_sequences": 1 if cu_seqlens_q is None else len(cu_seqlens_q) - 1,
        "threshold": threshold,
        "keep_scale": 65536 / (65536 - threshold) if threshold < 65536 else 0.0,
        "scale": scale / softcap if softcap > 0 else scale * LOG2E.value,
        "softcap": softcap * LOG2E.value,
        "left": FAR if left < 0 else min(left, FAR),
        "right": FAR if right < 0 else min(right, FAR),
        "BOTTOM_RIGHT": bottom_right,
        "HAS_SOFTCAP": softcap > 0,
        "HAS_ALIBI": alibi_slopes is not None,
        "HAS_DROPOUT": threshold > 0,
        "MASK_TYPE": mask_type,
        "IS_VARLEN": cu_seqlens_q is not None,
        "SEED_IS_POINTER": is_pointer,
        "PRECISION": _precision(q),
        "HEAD_SIZE": head_size,
        "VALUE_SIZE": value_size,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "BLOCK_DV": max(16, triton.next_power_of_2(value_size)),
    }


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """Triton loads no booleans."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def plan_key(tensors: Sequence[Tensor | None], seed: int | Tensor, rule: Sequence[Any]) -> Hashable:
    """What decides about the launches for ``tensors``, of which the first is q."""
    argument, _ = seed_argument(seed)
    kinds = [kind_of(t) for t in tensors]
    precision = _precision(tensors[0])  # type: ignore[arg-type]
    place = shard_argument(seed)
    return (*kinds, kind_of_seed(argument), *place, *rule, precision, attention_tiles.AUTOTUNE)


def strides(name: str, letters: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{d}_stride": s for d, s in zip(letters, x.stride(), strict=False)}


def _precision(q: Tensor) -> str:
    if q.dtype != torch.float32:
        return "ieee"
    # Reading allow_tf32 raises once one of the newer switches has been set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def forward(
    arguments: dict[str, Any],
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    lengths: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[list[Launch], list[Tensor]]:
    """Fills out (B, heads, L, Ev) and lse (B, heads, L). Returns what it launched, and the
    temporaries of that."""
    q, k = arguments["q_pointer"], arguments["k_pointer"]
    batch, heads, num_queries = lse.shape
    is_varlen, group = arguments["IS_VARLEN"], arguments["group"]
    rows = group * num_queries
    packs = rows <= MAX_PACKED_ROWS and not (
        is_varlen or arguments["HAS_DROPOUT"] or arguments["MASK_TYPE"]
    )
    widest = max(arguments["BLOCK_D"], arguments["BLOCK_DV"])
    name = chip(q.device, q.dtype)
    if packs:
        tiles = decode_tiles(name, widest, rows)
        num_programs = batch * (heads // group)
    else:
        mask = arguments["mask_pointer"]
        has_wide_mask = arguments["MASK_TYPE"] == 2 and mask.element_size() > q.element_size()
        tiles = forward_tiles(name, widest, has_wide_mask)
        rows, num_programs = num_queries, heads if is_varlen else batch * heads
    unused = q
    is_int8 = k_scale is not None

    def launch_all(tiles: Tiles) -> tuple[list[Launch], list[Tensor]]:
        num_blocks = triton.cdiv(rows, tiles.block_m)
        if is_varlen:
            num_blocks = num_queries // tiles.block_m + arguments["num_sequences"]
        num_splits = 1
        if packs:
            wanted = triton.cdiv(2 * num_multiprocessors(q.device), num_programs * num_blocks)
            num_splits = max(1, min(wanted, triton.cdiv(k.shape[2], tiles.block_n), MAX_SPLITS))
        parts, part_lse = out, lse
        if num_splits > 1:
            shape = (num_splits * batch, heads, num_queries)
            parts = torch.empty((*shape, out.shape[3]), dtype=torch.float32, device=q.device)
            part_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        launches = [
            launch(
                forward_kernel,
                (num_programs * num_blocks, num_splits),
                {
                    **arguments,
                    "out_pointer": parts,
                    "lse_pointer": part_lse,
                    "sinks_pointer": unused if sinks is None else sinks,
                    "lengths_pointer": unused if lengths is None else lengths,
                    "k_scale_pointer": unused if k_scale is None else k_scale,
                    "v_scale_pointer": unused if v_scale is None else v_scale,
                    **strides("out", "bhm", parts),
                    **strides("k_scale", "bhn", q if k_scale is None else k_scale),
                    **strides("v_scale", "bhn", q if v_scale is None else v_scale),
                    "batch": batch,
                    "num_blocks": num_blocks,
                    "num_splits": num_splits,
                    "HAS_SINKS": sinks is not None,
                    "HAS_LENGTHS": lengths is not None,
                    "IS_INT8": is_int8,
                    "IS_PACKED": packs,
                    **tiles.sizes(),
                },
                **tiles.options(),
            )
        ]
        if num_splits == 1:
            return launches, []
        num_rows = batch * heads * num_queries
        combined = launch(
            combine_kernel,
            (num_rows,),
            {
                "parts_pointer": parts,
                "part_lse_pointer": part_lse,
                "out_pointer": out,
                "lse_pointer": lse,
                **strides("out", "bhm", out),
                "heads": heads,
                "num_queries": num_queries,
                "num_rows": num_rows,
                "num_splits": num_splits,
                "VALUE_SIZE": out.shape[3],
                "BLOCK_DV": arguments["BLOCK_DV"],
                "BLOCK_SPLITS": triton.next_power_of_2(num_splits),
            },
        )
        return [*launches, combined], [parts, part_lse]

    return launch_fastest(launch_all, tiles, arguments, packs, is_int8)


def keep_plan(
    plans: Plans,
    key: Hashable,
    tensors: Sequence[Tensor | None],
    launches: list[Launch],
    temporaries: list[Tensor],
) -> None:
    """Unless tiles were to be timed and could not."""
    if not (attention_tiles.AUTOTUNE and is_capturing(tensors[0])):  # type: ignore[arg-type]
        plans.keep(key, tensors, launches, temporaries)


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: int | Tensor,
    *rule: Any,
) -> tuple[Tensor, Tensor]:
    """See ``attention_reference``. q, k, v: any strides but in the last dimension."""
    batch, heads, length, _ = q.shape
    out = q.new_empty((batch, length, heads, v.shape[3])).transpose(1, 2)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    if lse.numel() > 0 and not (cu_seqlens_q is not None and len(cu_seqlens_q) == 1):
        operands = q, k, v, as_bytes(mask), alibi_slopes, cu_seqlens_q, cu_seqlens_k
        tensors = *operands, sinks, out, lse
        key = plan_key(tensors, seed, rule)
        if not _plans.run(key, tensors, seed_argument(seed)[0]):
            made = forward(kernel_arguments(*operands, seed, *rule), out, lse, sinks)
            keep_plan(_plans, key, tensors, *made)
    return out, lse


def attention_with_kv_cache_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    lengths: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: int | Tensor,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    """Attention to the first ``lengths`` (B,) int64 keys of a cache, int8 if there are scales."""
    batch, heads, length, _ = q.shape
    out = q.new_empty((batch, length, heads, v.shape[3])).transpose(1, 2)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    if lse.numel() > 0:
        rule = (0, scale, softcap, left, right, True)
        tensors = q, k, v, alibi_slopes, sinks, lengths, k_scale, v_scale, out, lse
        key = plan_key(tensors, 0, rule)
        if not _cache_plans.run(key, tensors, 0):
            arguments = kernel_arguments(q, k, v, None, alibi_slopes, None, None, 0, *rule)
            made = forward(arguments, out, lse, sinks, lengths, k_scale, v_scale)
            keep_plan(_cache_plans, key, tensors, *made)
    return out, lse
