"""``cross_entropy`` of rows in plain torch: the specification of every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _compute(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy_reference(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """The loss of each row; and, (2, N), its largest logit with the logarithm of the sum of the
    powers of the differences to that; 0 for ignored rows."""
    x = _compute(logits)
    loss = F.cross_entropy(
        x, target, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    largest = x.amax(1)
    lse = torch.stack([largest, (x - largest[:, None]).logsumexp(1)])
    return loss, lse.masked_fill(target == ignore_index, 0.0)


def cross_entropy_backward_reference(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The gradient of the logits; torch can differentiate it again, but for ``lse``."""
    x = _compute(logits)
    is_used = target != ignore_index
    wanted = torch.full_like(x, label_smoothing / x.shape[1])
    index = target.where(is_used, 0)[:, None]
    wanted = wanted.scatter_add(
        1, index, torch.full_like(index, 1.0 - label_smoothing, dtype=x.dtype)
    )
    grad_x = (x.softmax(1) - wanted) * grad[:, None]
    return grad_x.where(is_used[:, None], 0.0).to(logits.dtype)
