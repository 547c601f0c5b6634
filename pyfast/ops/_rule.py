"""What every op that drops shares: the rule of the mask, and where its seed comes from."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from .. import _random
from ._op import is_distributed


def threshold_of(p: float) -> int:
    """An element is kept iff its 16 bits are at least this."""
    return round(float(p) * 65536)


def scale_of(threshold: int) -> float:
    """One over the true keep rate, so that the expectation is exact; 0 where nothing is kept."""
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def resolve_seed(
    op: str, like: Tensor, eager: bool, generator: Generator | None, seed: int | Tensor | None
) -> int | Tensor:
    """The seed of one call: the caller's, or one draw from torch's generator."""
    if is_distributed(like):
        # All ranks must draw the same, and kernels read where a shard lies without waiting: CPU.
        like = torch.empty((), device="cpu")
        eager = not torch.compiler.is_dynamo_compiling()
    if seed is None:
        if eager:
            return _random.draw_eager(like, generator)
        return _random.draw_traced(like, generator)
    seed = _random.checked_seed(op, seed)
    return seed if eager else _random.as_seed_tensor(seed, like)


def check_probability(p: float) -> None:
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if p != p:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {p}")
