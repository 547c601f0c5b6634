"""Checks of the arguments that all attention functions share."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._native import compute_dtype


def check_rule(
    op: str,
    window: tuple[int, int] | None,
    softcap: float,
    causal_alignment: str,
    is_causal: bool,
) -> tuple[float, int, int, bool]:
    """(softcap, left, right, bottom_right); -1 is no bound."""
    left, right = -1, -1
    if window is not None:
        if (
            not isinstance(window, (tuple, list))
            or len(window) != 2
            or not all(isinstance(side, int) and side >= -1 for side in window)
        ):
            raise ValueError(f"{op}: window must be (left, right), two ints >= -1, got {window!r}")
        left, right = window
    if is_causal:
        right = 0
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap must be a finite number >= 0, got {softcap!r}")
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(
            f'{op}: causal_alignment must be "top_left" or "bottom_right", got {causal_alignment!r}'
        )
    return float(softcap), left, right, causal_alignment == "bottom_right"


def check_slopes(op: str, slopes: Tensor | None, batch: int, q: Tensor) -> Tensor | None:
    """ALiBi's slopes as (batch or 1, heads) in the compute type; q is (batch, heads, ...)."""
    if slopes is None:
        return None
    heads = q.shape[1]
    if tuple(slopes.shape) not in ((heads,), (1, heads), (batch, heads)) or (
        not slopes.is_floating_point() or slopes.device != q.device
    ):
        raise ValueError(
            f"{op}: alibi_slopes must be ({heads},) or ({batch}, {heads}) floating point on "
            f"{q.device}, got {tuple(slopes.shape)} {slopes.dtype} on {slopes.device}"
        )
    return slopes.to(compute_dtype(q)).view(-1, heads)


def check_sinks(op: str, sinks: Tensor | None, q: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    if sinks.shape != q.shape[1:2] or not sinks.is_floating_point() or sinks.device != q.device:
        raise ValueError(
            f"{op}: sinks must be ({q.shape[1]},) floating point on {q.device}, "
            f"got {tuple(sinks.shape)} {sinks.dtype} on {sinks.device}"
        )
    return sinks.to(compute_dtype(q))


def check_context(op: str) -> None:
    """RuntimeError inside of torch's context_parallel, which would leave each rank with its part of
    the keys: it knows torch's own attention alone."""
    module = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    if module is not None and F.scaled_dot_product_attention in module._replaced_functions:
        raise RuntimeError(
            f"{op}: torch's context_parallel() distributes torch's own attention alone; give "
            "query, key and value as DTensors that are sharded along the sequence instead"
        )


def is_causal_bias(mask: Tensor | None) -> bool:
    """True for torch.nn.attention.bias.CausalBias, whose module is slow to import."""
    kind = type(mask)
    return kind.__name__ == "CausalBias" and kind.__module__ == "torch.nn.attention.bias"


def autocasted(*tensors: Tensor | None) -> list[Any]:
    """The operands in the dtype of autocast, where it is on: torch's rule for attention."""
    first = tensors[0]
    if first is None or not torch.is_autocast_enabled(first.device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]
