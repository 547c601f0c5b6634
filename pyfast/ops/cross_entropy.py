"""``cross_entropy``: schema, dispatch, autograd, and torch for what the kernel does not do."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import _backend
from ..kernels.cross_entropy.cross_entropy_reference import (
    cross_entropy_backward_reference,
    cross_entropy_reference,
)
from ._native import contiguous, empty, get_num_threads, native
from ._op import _PLAIN_TYPES, Op, is_eager

_LEAST = 1 << 17  # logits; with fewer the call costs more than what it saves
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_forced, _observers = _backend.forced, _backend.observers


def _native(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    logits, target = contiguous(logits, target)
    loss, lse = torch.empty(len(logits)), torch.empty(2, len(logits))
    native.cross_entropy(
        logits, target, loss, lse, ignore_index, label_smoothing, get_num_threads()
    )
    return loss, lse


def _backward_native(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    grad, logits, target, lse = contiguous(grad, logits, target, lse)
    grad_logits = empty(tuple(logits.shape), logits)
    native.cross_entropy_backward(
        grad, logits, target, lse, grad_logits, ignore_index, label_smoothing, get_num_threads()
    )
    return grad_logits


def _limits(logits: Tensor, *rest: Any) -> str:
    return "" if logits.dtype in _DTYPES else "its kernel computes in float32"


def _backward_limits(grad: Tensor, logits: Tensor, *rest: Any) -> str:
    return _limits(logits)


_backward_op = Op(
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor lse,"
    " int ignore_index, float label_smoothing) -> Tensor",
    {"cpu": _backward_native, "reference": cross_entropy_backward_reference},
    fake=lambda grad, logits, *rest: torch.empty_like(
        logits, memory_format=torch.contiguous_format
    ),
    limits=_backward_limits,
)


def _fake(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = logits.new_empty(logits.shape[0], dtype=dtype)
    return loss, loss.new_empty(2, logits.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, target, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    # A gradient that is differentiated again is torch's.
    function = cross_entropy_backward_reference if torch.is_grad_enabled() else _backward_op
    return function(grad, *ctx.saved_tensors, *ctx.options), None, None, None


cross_entropy_op = Op(
    "cross_entropy(Tensor logits, Tensor target, int ignore_index, float label_smoothing)"
    " -> (Tensor, Tensor)",
    {"cpu": _native, "reference": cross_entropy_reference},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    limits=_limits,
)


def _why_torch(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> str:
    """Why torch serves the call, or nothing."""
    if not is_eager(input) or type(target) not in _PLAIN_TYPES or input.is_nested:
        return "an operand is no plain tensor, or is traced or transformed"
    forced = _forced()
    if forced is None and input.numel() < _LEAST:
        return "torch is as fast with so few logits"
    if not input.is_cpu or native is None or forced not in (None, "cpu"):
        return "no kernel is usable there"
    if input.dtype not in _DTYPES or input.layout is not torch.strided:
        return "no kernel reads the dtype or layout of the input"
    if weight is not None:
        return "classes have weights"
    if input.dim() != 2 or target.shape != input.shape[:1] or target.dtype != torch.int64:
        return "the input is no matrix, or the targets are no classes of its rows"
    if not target.is_cpu or input.shape[1] == 0 or reduction not in ("mean", "sum", "none"):
        return "torch raises an error for it"
    if torch._C._is_torch_function_mode_enabled() or forward_ad._current_level >= 0:
        return "a mode or forward-mode AD is active"
    return ""


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The negative logarithm of the probability of a class, as
    :func:`torch.nn.functional.cross_entropy`, which it replaces.

    On the CPU, logits of large vocabularies are read twice and nothing of their size is kept; the
    backward pass writes the gradient in their dtype. torch converts half precisions in the model
    (``logits.float()``), keeps the logarithms of all probabilities, and writes a matrix of zeros
    and two more for the gradient. Differences: half precisions are computed in float32 and rounded
    once. Everything but (N, C) logits, 131,072 or more, with class indices and no weights is
    torch's: weights, probabilities as targets, more dimensions, float64, GPUs, traced and compiled
    code.

    Args:
        input: (N, C) logits (or torch's other shapes).
        target: (N,) int64 classes.
        weight, size_average, reduce: as torch's.
        ignore_index: rows with this target have a loss and a gradient of 0, and do not count.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1]: this share of the target is even over all classes.
        dtype: of the loss. Default: the input's, or float32 under autocast

    Returns:
        A number, or (N,) without reduction.

    Raises:
        IndexError: for a target that is no class.
        RuntimeError, ValueError: torch's, for other shapes and reductions.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    reason = _why_torch(input, target, weight, reduction)
    if not reason and not 0.0 <= label_smoothing <= 1.0:
        reason = "torch raises an error for it"
    if reason:
        if _observers and not torch.compiler.is_dynamo_compiling() and isinstance(input, Tensor):
            _backend.report("cross_entropy", cross_entropy_op.kernels, input, "torch", reason, "")
        if dtype is not None:
            input = input.to(dtype)
        return F.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    if dtype is None:
        dtype = torch.float32 if torch.is_autocast_enabled("cpu") else input.dtype
    loss, _ = cross_entropy_op.eager(input, target, ignore_index, label_smoothing)
    if reduction == "mean":
        loss = loss.sum() / (target != ignore_index).sum()
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(dtype)  # type: ignore[no-any-return]
