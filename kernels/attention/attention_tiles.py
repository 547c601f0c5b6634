"""Tile sizes of the Triton kernels: a table by pass, head size and chip, chosen so that no register
spills and shared memory suffices. With PYFAST_AUTOTUNE=1 they are where a search starts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..common.chips import has_large_memory

Result = TypeVar("Result")


class Tiles(NamedTuple):
    """``chunk``: how many columns are computed again at a time where NaN or Inf came out."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    chunk: int = 32

    def sizes(self) -> dict[str, int]:
        """Arguments of a kernel."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "CHUNK": self.chunk}

    def options(self) -> dict[str, int]:
        """Of its launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class GradientTiles(NamedTuple):
    """Of a block of queries over keys, and of a block of keys over queries."""

    queries: Tiles
    keys: Tiles


# By the widest head, a power of two. Chips with 164 KB of shared memory and more are large, the
# others have 100 KB.
FORWARD = {
    "hopper": {64: Tiles(128, 128, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 8, 3)},
    "large": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 32, 8, 3), 256: Tiles(64, 32, 8, 2)},
    "small": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 32, 8, 2), 256: Tiles(32, 32, 4, 2)},
    "float32": {64: Tiles(64, 32, 4, 2), 128: Tiles(32, 32, 4, 1), 256: Tiles(16, 32, 4, 1)},
    "interpreter": dict.fromkeys((64, 128, 256), Tiles(128, 128, 4, 1)),
}
BACKWARD = {
    "hopper": {
        64: GradientTiles(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 1)),
        128: GradientTiles(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 1)),
        256: GradientTiles(Tiles(64, 32, 8, 2, 64), Tiles(32, 32, 8, 1)),
    },
    "large": {
        64: GradientTiles(Tiles(128, 32, 8, 2), Tiles(32, 32, 4, 2, 64)),
        128: GradientTiles(Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 1)),
        256: GradientTiles(Tiles(32, 32, 8, 1, 64), Tiles(32, 32, 8, 1)),
    },
    "small": {
        64: GradientTiles(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2)),
        128: GradientTiles(Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 2)),
        256: GradientTiles(Tiles(32, 32, 8, 1, 64), Tiles(32, 32, 8, 1)),
    },
    "float32": {
        64: GradientTiles(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
        128: GradientTiles(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1)),
        256: GradientTiles(Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1)),
    },
    "interpreter": dict.fromkeys(
        (64, 128, 256), GradientTiles(Tiles(128, 128, 4, 1), Tiles(128, 128, 4, 1))
    ),
}


def _width(size: int) -> int:
    return max(64, size)


def forward_tiles(name: str, size: int, has_wide_mask: bool = False) -> Tiles:
    """``name``: of the chip. ``has_wide_mask``: its elements are wider than those of queries, and
    its tiles wait in shared memory too."""
    tiles = FORWARD[name][_width(size)]
    return tiles._replace(num_stages=min(tiles.num_stages, 2)) if has_wide_mask else tiles


def decode_tiles(name: str, size: int, rows: int) -> Tiles:
    """Few rows over many keys: small tiles of queries, many loads in flight."""
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if name == "interpreter":
        return Tiles(block_m, 128, 4, 1)
    if name == "float32":
        return Tiles(block_m if size <= 128 else 16, 32, 4, 2 if size <= 64 else 1)
    if size > 128:
        return Tiles(16 if name == "small" else block_m, 32, 4, 2)
    return Tiles(block_m, 32, 4, 2) if name == "small" else Tiles(block_m, 64, 4, 3)


def gradient_tiles(name: str, size: int) -> GradientTiles:
    return BACKWARD[name][_width(size)]


def can_differentiate(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether the gradients' tiles fit into shared memory."""
    if device.type != "cuda" or dtype != torch.float32 or size <= 128:
        return True
    return has_large_memory(device)


AUTOTUNE = os.environ.get("PYFAST_AUTOTUNE") == "1"
_fastest: dict[tuple[Any, ...], Tiles] = {}


def neighbours(tiles: Tiles) -> list[Tiles]:
    """The tiles, and those a step away from them."""
    changes: list[dict[str, int]] = [
        {},
        *({"block_m": m} for m in (tiles.block_m // 2, tiles.block_m * 2) if 16 <= m <= 128),
        *({"block_n": n} for n in (tiles.block_n // 2, tiles.block_n * 2) if 32 <= n <= 128),
        {"num_warps": 4 if tiles.num_warps == 8 else 8},
        *({"num_stages": n} for n in (tiles.num_stages - 1, tiles.num_stages + 1) if 1 <= n <= 4),
    ]
    return [tiles._replace(**change) for change in changes]


def is_capturing(q: Tensor) -> bool:
    return q.is_cuda and torch.cuda.is_current_stream_capturing()


def _time_ms(launch: Callable[[], Any]) -> float:
    import triton  # the table is read without it, too
    from triton.errors import TritonError

    try:
        return float(triton.testing.do_bench(launch, return_mode="median"))
    except (RuntimeError, TritonError):
        return float("inf")  # does not compile, or does not fit


def launch_fastest(
    launch: Callable[[Tiles], Result], tiles: Tiles, arguments: dict[str, Any], *key: Any
) -> Result:
    """Launches with the given tiles, or, if PYFAST_AUTOTUNE is 1, with the fastest of these and
    their neighbours: timed at the first call of its kind, outside of graph capture. ``launch`` may
    be repeated."""
    q = arguments["q_pointer"]
    if AUTOTUNE and not is_capturing(q):
        lengths = (arguments[name].bit_length() for name in ("num_queries", "num_keys"))
        mask = arguments["mask_pointer"]
        names = ("BLOCK_D", "BLOCK_DV", "HAS_DROPOUT", "MASK_TYPE", "IS_VARLEN")
        key = (
            tiles,
            q.device,
            q.dtype,
            mask.dtype,
            *lengths,
            *(arguments[name] for name in names),
            *key,
        )
        if key not in _fastest:
            candidates = neighbours(tiles)
            times = [_time_ms(functools.partial(launch, one)) for one in candidates]
            _fastest[key] = candidates[times.index(min(times))]
        tiles = _fastest[key]
    return launch(tiles)
