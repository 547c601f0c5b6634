"""DTensor parameters: each rank steps its own shards; norms are those of the whole."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..ops._optimizer_groups import is_plain
from ..ops.optimizer_step import square_sum


def is_dtensor(tensor: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there are none
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """The shard of this rank; other tensors as they are."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def total_norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients, of DTensors over all ranks: a float64 scalar on the device of
    the first. Squares are summed in float64, so that none overflows."""
    parts: dict[Any, list[Tensor]] = {}
    for grad in grads:
        place = (grad.device_mesh, grad.placements) if is_dtensor(grad) else None  # type: ignore[attr-defined]
        shard = local(grad)
        parts.setdefault((place, shard.device, is_plain(shard)), []).append(shard)
    total = torch.zeros((), dtype=torch.float64, device=local(grads[0]).device if grads else None)
    for (place, _, plain), shards in parts.items():
        squares = square_sum(shards) if plain else _plain_square_sum(shards)
        total += (squares if place is None else _over_ranks(squares, *place)).to(total.device)
    return total.sqrt()


def _plain_square_sum(grads: list[Tensor]) -> Tensor:
    squares = [grad.abs().double().square().sum() for grad in grads]
    return torch.stack(squares).sum()


def _over_ranks(squares: Tensor, mesh: Any, placements: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    summed = [Replicate() if place.is_replicate() else Partial() for place in placements]
    whole: Tensor = DTensor.from_local(squares, mesh, summed, run_check=False).full_tensor()
    return whole
