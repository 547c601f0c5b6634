"""``clip_grad_norm_``."""

from __future__ import annotations

from collections.abc import Iterable
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor

from ..ops._optimizer_groups import is_plain
from ..ops.optimizer_step import scale
from ._distributed import total_norm


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients in place so that their norm, taken over all of them, is at most ``max_norm``.

    Replaces ``torch.nn.utils.clip_grad_norm_``. Differences: squares are summed in float64, so that
    large gradients do not overflow; on the CPU nothing is written where nothing is clipped. Norms
    other than the 2-norm, and gradients that are no plain floating-point tensors, are torch's.

    Args:
        parameters: tensors or one tensor; those without a gradient are skipped.
        max_norm: the largest norm.
        norm_type: which norm. Default: 2.0
        error_if_nonfinite: raise where the norm is NaN or Inf. Default: False
        foreach: accepted; does not choose the kernel. Default: None

    Returns:
        The norm before clipping, a scalar on the device of the first gradient, in the dtype that
        torch gives it.

    Raises:
        RuntimeError: with ``error_if_nonfinite``, with torch's text.
    """
    params: Any = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if isinstance(parameters, GeneratorType) and not params:
        params = (p for p in params)  # torch warns of one that has been used up
    grads = [p.grad for p in params if p.grad is not None]
    if (
        not grads
        or not all(map(is_plain, grads))
        or norm_type != 2.0
        or len({g.device for g in grads}) > 1
    ):
        return torch.nn.utils.clip_grad_norm_(
            params, max_norm, norm_type, error_if_nonfinite, foreach
        )
    with torch.no_grad():
        norm = total_norm(grads)
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from `parameters` is "
                "non-finite, so it cannot be clipped. To disable this error and scale the "
                "gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
            )
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if norm.is_cuda or float(factor) != 1:
            scale(list({id(grad): grad for grad in grads}.values()), factor)
    dtype = grads[0].dtype
    for grad in grads[1:]:
        dtype = torch.promote_types(dtype, grad.dtype)
    return norm.to(dtype)
