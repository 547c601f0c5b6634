"""The mask that a seed stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _random
from ..kernels.dropout.dropout_reference import attention_mask_reference, keep_mask_reference
from ._rule import check_probability, threshold_of


def dropout_mask(
    shape: torch.Size | tuple[int, ...],
    p: float,
    seed: int | Tensor,
    *,
    stream: int = _random.DROPOUT_STREAM,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask that a seed stands for, as a bool tensor: True where an element is kept.

    Every backend drops exactly these elements: ``dropout(x, p, seed=seed)`` keeps where
    ``dropout_mask(x.shape, p, seed)`` is True; for ``dropout2d`` and its like ``shape`` is (N, C).

    Args:
        shape: of the tensor; for ``stream=0`` (attention) (..., num_heads, L, S), whose leading
            dimensions flatten to the index batch * num_heads + head.
        p: the probability to drop, in [0, 1].
        seed: the 64-bit seed, an int or a tensor of one int64.
        stream: which use of the seed: 0 attention, 1 dropout (default), 2 DropConnect.
        device: where the mask is made. Default: the CPU.

    Raises:
        ValueError: if ``p``, ``stream`` or ``shape`` is out of range.
    """
    check_probability(p)
    seed = _random.checked_seed("dropout_mask", seed)
    if stream not in (_random.ATTENTION_STREAM, _random.DROPOUT_STREAM, _random.DROPCONNECT_STREAM):
        raise ValueError(
            "dropout_mask: stream must be 0 (attention), 1 (dropout) or 2 (DropConnect), "
            f"got {stream}"
        )
    where = torch.device(device if device is not None else "cpu")
    threshold = threshold_of(p)
    if stream == _random.ATTENTION_STREAM:
        if len(shape) < 2:
            raise ValueError(
                f"dropout_mask: an attention mask needs a shape (..., L, S), got {tuple(shape)}"
            )
        return attention_mask_reference(shape, seed, threshold, where)
    return keep_mask_reference(torch.Size(shape), seed, threshold, stream, where)
