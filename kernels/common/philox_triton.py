"""Philox-4x32 with 7 rounds in Triton: the index maps of philox.h, eight elements a call."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_seed(seed, SEED_IS_POINTER: tl.constexpr):
    """The 64-bit seed, from the argument itself or from where it points to."""
    if SEED_IS_POINTER:
        value = tl.load(seed)
    else:
        value = seed
    return tl.cast(value, tl.int64)


@triton.jit
def block_bits(seed, first, stream, SIZE: tl.constexpr):
    """The 16-bit words of elements first .. first + SIZE - 1; ``first`` is a multiple of 8."""
    group = tl.cast(first, tl.int64) // 8 + tl.arange(0, SIZE // 8)
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero + stream, n_rounds=7)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    words = tl.join(words & 0xFFFF, words >> 16)  # [group, word & 1, word >> 1, half]
    return tl.reshape(tl.permute(words, (0, 2, 1, 3)), (SIZE,))


@triton.jit
def element_bits(seed, index, stream):
    """The 16-bit word of each element of an int64 ``index`` [N]: one call an element."""
    group = index.to(tl.int64) // 8
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero + stream, n_rounds=7)
    e = (index % 8).to(tl.int32)
    word = tl.where(e < 4, tl.where(e < 2, w0, w1), tl.where(e < 6, w2, w3))
    return tl.where(e % 2 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def row_bits(seed, first, stream, SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    """The words of elements first .. first + SIZE - 1, where ALIGNED says that 8 divides first."""
    if ALIGNED:
        out = block_bits(seed, first, stream, SIZE)
    else:
        out = element_bits(seed, first + tl.arange(0, SIZE), stream)
    return out


@triton.jit
def score_bits(seed, m, n0, z, stream, M: tl.constexpr, N: tl.constexpr):
    """Attention: the 16-bit words of rows ``m`` [M], columns n0 .. n0 + N - 1; 32 divides both."""
    g = n0 // 8 + tl.arange(0, N // 8)
    g = tl.broadcast_to(g[None, :], (M, N // 8)).to(tl.uint32)
    row = tl.broadcast_to(m[:, None], (M, N // 8)).to(tl.uint32)
    zero = tl.zeros_like(g)
    w0, w1, w2, w3 = tl.philox(seed, g, row, zero + z, zero + stream, n_rounds=7)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    words = tl.join(words & 0xFFFF, words >> 16)  # [M, N / 8, word & 1, word >> 1, half]
    words = tl.reshape(words, (M, N // 32, 4, 2, 2, 2))
    return tl.reshape(tl.permute(words, (0, 1, 4, 3, 2, 5)), (M, N))


def seed_argument(seed: int | Tensor) -> tuple[Any, bool]:
    """``(argument, SEED_IS_POINTER)``: a seed on the CPU travels by value, as that of a shard."""
    if isinstance(seed, Tensor) and (seed.device.type == "cpu" or seed.numel() > 1):
        return int(seed.flatten()[0]), False
    return seed, isinstance(seed, Tensor)


def shard_argument(seed: int | Tensor) -> list[int]:
    """What goes on in the seed of a shard: its first index, strides of the whole; else ``[0]``."""
    return seed[1:].tolist() if isinstance(seed, Tensor) and seed.numel() > 1 else [0]
