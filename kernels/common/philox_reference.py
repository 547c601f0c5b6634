"""Philox-4x32 with 7 rounds in plain torch: the specification that philox.h and philox_triton.py
are tested against.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7


def shard_of(seed: int | Tensor) -> tuple[int | Tensor, Tensor | None]:
    """``(seed, place)``: what a seed tensor of more than one element says of the shard that it is
    for: the index of its first element, and strides of the whole tensor; else None."""
    if isinstance(seed, int) or seed.numel() == 1:
        return seed, None
    return seed[0], seed[1:]


def philox(
    seed: int | Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words per counter.

    Args:
        seed: the 64-bit key; an int, or an int64 tensor that broadcasts against the counters.
        c0, c1, c2, c3: int64 tensors of one broadcast shape, values in [0, 2**32).

    Returns:
        Four int64 tensors, values in [0, 2**32).
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(ROUNDS):
        # A 32 x 32-bit product wraps in int64, but its 64 bits are right: shift, then mask.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def element_bits(seed: int | Tensor, index: Tensor, stream: int) -> Tensor:
    """The 16 random bits of each element: the element-wise map of linear indices, int64."""
    group, e = index // 8, index % 8
    zero = torch.zeros_like(group)
    words = philox(seed, group & _MASK, (group >> 32) & _MASK, zero, zero + stream)
    word = torch.stack(words, -1).gather(-1, (e // 2).unsqueeze(-1)).squeeze(-1)
    return (word >> (16 * (e % 2))) & 0xFFFF


def score_bits(
    seed: int | Tensor, row: Tensor, column: Tensor, batch_head: Tensor, stream: int = 0
) -> Tensor:
    """The 16 random bits of each attention score: the MMA-fragment map of int64 indices."""
    row, column, batch_head = torch.broadcast_tensors(row, column, batch_head)
    words = philox(
        seed,
        (column // 32) * 4 + (column % 8) // 2,
        row,
        batch_head,
        torch.zeros_like(row) + stream,
    )
    word = torch.stack(words, -1).gather(-1, ((column % 32) // 8).unsqueeze(-1)).squeeze(-1)
    return (word >> (16 * (column % 2))) & 0xFFFF
