"""Tile sizes of the Triton kernels: a table by chip and rows of x, chosen so that no register
spills and shared memory suffices; times decide once a GPU is at hand."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..common.chips import chip, num_multiprocessors


class Tiles(NamedTuple):
    """``block_m`` rows of x, ``block_n`` features, ``block_k`` of the sum at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def sizes(self) -> dict[str, int]:
        """Arguments of a kernel."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    def options(self) -> dict[str, int]:
        """Of its launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# By chip and what x is; the first that holds all rows is taken, or else the last. Tiles of "ampere"
# fit into the 99 KB of the smaller chips.
TABLE: dict[str, dict[str, tuple[Tiles, ...]]] = {
    "hopper": {
        "int8": (
            Tiles(16, 32, 256, 4, 5),
            Tiles(32, 64, 128, 4, 4),
            Tiles(64, 64, 128, 4, 4),
            Tiles(128, 128, 128, 8, 4),
        ),
        "half": (
            Tiles(16, 32, 256, 4, 5),
            Tiles(32, 64, 128, 4, 4),
            Tiles(64, 64, 128, 4, 3),
            Tiles(128, 128, 64, 8, 4),
        ),
    },
    "ampere": {
        "int8": (
            Tiles(16, 32, 256, 4, 4),
            Tiles(32, 64, 128, 8, 4),
            Tiles(64, 64, 128, 4, 4),
            Tiles(128, 128, 64, 8, 4),
        ),
        "half": (
            Tiles(16, 32, 256, 4, 4),
            Tiles(32, 64, 128, 4, 3),
            Tiles(64, 64, 128, 4, 3),
            Tiles(128, 128, 64, 8, 3),
        ),
    },
    "float32": {
        "float32": (
            Tiles(16, 32, 64, 4, 4),
            Tiles(32, 64, 32, 4, 3),
            Tiles(64, 64, 32, 8, 3),
        ),
    },
    "interpreter": dict.fromkeys(
        ("int8", "half", "float32"), (Tiles(16, 32, 64, 4, 1), Tiles(128, 64, 64, 4, 1))
    ),
}
MAX_SPLITS = 16


def product_tiles(name: str, kind: str, m: int, n: int, multiprocessors: int) -> Tiles:
    """Of a row of the table; its largest only where every multiprocessor gets one."""
    *small, largest = TABLE[name][kind]
    for tiles in small:
        if m <= tiles.block_m:
            return tiles
    has_many = num_tiles(largest, m, n) >= multiprocessors
    return largest if has_many or len(small) == 1 else small[-1]


def num_tiles(tiles: Tiles, m: int, n: int) -> int:
    return -(-m // tiles.block_m) * -(-n // tiles.block_n)


def split_size(tiles: Tiles, m: int, n: int, k: int, multiprocessors: int) -> int:
    """How much of k a program sums: all of it, or at least four blocks where most multiprocessors
    would have nothing to do."""
    splits = min(multiprocessors // num_tiles(tiles, m, n), k // (4 * tiles.block_k), MAX_SPLITS)
    if splits < 2:
        return max(1, k)
    return -(-k // (splits * tiles.block_k)) * tiles.block_k


def choose(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> tuple[Tiles, int]:
    """Tiles and the size of a split for x of this dtype."""
    name = chip(device, dtype)
    kind = {torch.int8: "int8", torch.float32: "float32"}.get(dtype, "half")
    if name in ("large", "small"):
        name = "ampere"
    multiprocessors = num_multiprocessors(device)
    tiles = product_tiles(name, kind, m, n, multiprocessors)
    return tiles, split_size(tiles, m, n, k, multiprocessors)
