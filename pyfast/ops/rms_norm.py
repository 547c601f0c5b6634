"""``rms_norm``: dropout_add_norm without dropout and residual, for plain eager tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import _backend
from .._backend import KERNEL_DTYPES
from ._native import compute_dtype, empty_like, get_num_threads, native
from ._op import _PLAIN_TYPES, is_eager
from .dropout_add_norm import norm_op, norm_rule

_has_function_mode = torch._C._is_torch_function_mode_enabled
_is_grad_enabled = torch.is_grad_enabled
_forced, _observers = _backend.forced, _backend.observers


def serves(input: Tensor, weight: Tensor | None) -> bool:
    """Whether :func:`rms_norm_rows` takes these; torch or the caller does where it does not."""
    if not is_eager(input) or input.is_nested or _has_function_mode():
        return False
    shape = input.shape
    if not shape or input.dtype not in KERNEL_DTYPES or input.layout is not torch.strided:
        return False
    return weight is None or (
        type(weight) in _PLAIN_TYPES
        and weight.shape == shape[-1:]
        and weight.dtype in KERNEL_DTYPES
        and weight.layout is torch.strided
        and weight.device == input.device
    )


def rms_norm_rows(input: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    """Over the last dimension, in the dtype of ``input``."""
    needs_grad = _is_grad_enabled() and (
        input.requires_grad or (weight is not None and weight.requires_grad)
    )
    dtype = compute_dtype(input)
    if weight is not None and (weight.dtype is not dtype or weight.is_neg()):
        weight = weight.to(dtype).resolve_neg()
    rule = norm_rule(input, 0, eps, rms=True)
    if (
        needs_grad
        or not input.is_cpu
        or native is None
        or _forced() is not None
        or _observers
        or forward_ad._current_level >= 0
    ):
        return norm_op.eager(input, None, weight, None, 0, *rule, needs_grad)[0]  # type: ignore[no-any-return]
    # What the op would do, at half of its cost, which is what a few rows are bound by.
    x = input if input.is_contiguous() else input.contiguous()
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    y = empty_like(x)
    num_columns = x.shape[-1]
    rstd = x.new_empty(x.numel() // max(num_columns, 1), dtype=dtype)
    outputs = y, None, None, rstd, None, None
    native.dropout_add_norm(
        x, None, weight, None, *outputs, 0, *rule, num_columns, get_num_threads()
    )
    return y


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    r"""``x / sqrt(mean(x^2) + eps) * weight``, as :func:`torch.nn.functional.rms_norm`, which it
    replaces (Zhang and Sennrich 2019).

    One pass over x in forward and one in backward, where torch's runs five operations on the CPU:
    :func:`pyfast.nn.functional.dropout_add_norm` without dropout and residual. Differences: results
    are rounded to the dtype of x once; the weight may have another floating-point dtype without a
    warning. Norms over several dimensions, subclasses, and traced, compiled and transformed code
    go to torch's function, and on CUDA, where torch has one pass too, every call that no backend
    was forced for. Errors are torch's.

    Args:
        input: (..., n) floating point, any strides (copied when not contiguous).
        normalized_shape: (n,).
        weight: (n,) or None.
        eps: added to the mean of squares. Default, as torch's: the epsilon of float64 for float64
            and of float32 for every other dtype.

    Returns:
        (..., n), contiguous, the dtype of input.
    """
    usual = (
        isinstance(normalized_shape, (tuple, list))
        and len(normalized_shape) == 1
        and isinstance(normalized_shape[0], int)
        and (eps is None or isinstance(eps, float))
    )
    if usual and serves(input, weight) and normalized_shape[0] == input.shape[-1]:
        # In autocast on CUDA torch's gives float32.
        if not input.is_cuda or (_forced() is not None and not torch.is_autocast_enabled("cuda")):
            return rms_norm_rows(input, weight, eps)
        if _observers:
            reason = "torch has a kernel for it on CUDA"
            _backend.report(norm_op.name, norm_op.kernels, input, "torch", reason, "")
    return F.rms_norm(input, normalized_shape, weight, eps)
