"""``residual + dropout(x + bias)`` in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import _random
from ..kernels.bias_dropout_add.bias_dropout_add_reference import (
    bias_dropout_add_backward_reference,
    bias_dropout_add_reference,
)
from ._native import (
    column_partials,
    compute_dtype,
    contiguous,
    empty_like,
    get_num_threads,
    native,
)
from ._op import Op, is_eager
from ._rule import check_probability, resolve_seed, scale_of, threshold_of
from .dropout import dropout_op

_STREAM = _random.DROPOUT_STREAM


def _forward_native(
    x: Tensor, bias: Tensor | None, residual: Tensor, seed: int | Tensor, *rule: Any
) -> Tensor:
    x, bias, residual = contiguous(x, bias, residual)
    y = empty_like(x)
    native.bias_dropout_add(x, bias, residual, y, seed, *rule, x.shape[-1], get_num_threads())
    return y


def _backward_native(grad: Tensor, seed: int | Tensor, *rule: Any) -> tuple[Tensor, Tensor]:
    (grad,) = contiguous(grad)
    num_columns = grad.shape[-1]
    grad_x = empty_like(grad)
    make = grad.new_empty if grad.numel() else grad.new_zeros  # nothing is written for empty rows
    grad_bias = make(num_columns, dtype=compute_dtype(grad))
    native.bias_dropout_add_backward(
        grad,
        grad_x,
        column_partials(grad, 1),
        grad_bias,
        seed,
        *rule,
        num_columns,
        get_num_threads(),
    )
    return grad_x, grad_bias


def _forward_triton(*arguments: Any) -> Tensor:
    from ..kernels.bias_dropout_add.bias_dropout_add_triton import bias_dropout_add_triton

    return bias_dropout_add_triton(*arguments)


def _backward_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from ..kernels.bias_dropout_add.bias_dropout_add_triton import bias_dropout_add_backward_triton

    return bias_dropout_add_backward_triton(*arguments)


def _save_seed(ctx: Any, seed: int | Tensor) -> None:
    ctx.seed = seed if isinstance(seed, int) else None
    if not isinstance(seed, int):
        ctx.save_for_backward(seed)


def _saved_seed(ctx: Any) -> int | Tensor:
    return ctx.saved_tensors[0] if ctx.seed is None else ctx.seed  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, _, seed, *rule = inputs
    ctx.has_bias, ctx.rule = bias is not None, tuple(rule)
    _save_seed(ctx, seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    seed = _saved_seed(ctx)
    if ctx.has_bias and ctx.needs_input_grad[1]:
        grad_x, grad_bias = _backward_op(grad, seed, *ctx.rule)
        return grad_x, grad_bias, grad, None, None, None, None
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = dropout_op(grad, seed, *ctx.rule, -0.0, 0.0, grad.dim())
    return grad_x, None, grad, None, None, None, None


_bias_dropout_add = Op(
    "bias_dropout_add(Tensor x, Tensor? bias, Tensor residual, Tensor seed, int threshold,"
    " int stream, float scale) -> Tensor",
    {
        "cpu": _forward_native,
        "cuda": _forward_native,
        "triton": _forward_triton,
        "reference": bias_dropout_add_reference,
    },
    fake=lambda x, *_: x.new_empty(x.shape),
    setup_context=_setup_context,
    backward=_backward,
    differentiable=(0, 1),
)


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, seed, *rule = inputs
    ctx.rule = tuple(rule)
    _save_seed(ctx, seed)


def _double_backward(ctx: Any, grad_x: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    total = grad_x + grad_bias.to(grad_x.dtype)
    total = dropout_op(total, _saved_seed(ctx), *ctx.rule, -0.0, 0.0, total.dim())
    return total, None, None, None, None


_backward_op = Op(
    "bias_dropout_add_backward(Tensor grad, Tensor seed, int threshold, int stream, float scale)"
    " -> (Tensor, Tensor)",
    {
        "cpu": _backward_native,
        "cuda": _backward_native,
        "triton": _backward_triton,
        "reference": bias_dropout_add_backward_reference,
    },
    fake=lambda grad, *_: (
        grad.new_empty(grad.shape),
        grad.new_empty(grad.shape[-1], dtype=compute_dtype(grad)),
    ),
    setup_context=_setup_context_backward,
    backward=_double_backward,
)


def check_matrix(op: str, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and residual in their common dtype; errors for what cannot be rows of numbers."""
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(
            f"{op}: x must be a floating-point tensor of at least one dimension, "
            f"got {tuple(x.shape)} {x.dtype}"
        )
    if residual is None:
        return x, None
    if residual.shape != x.shape or residual.device != x.device or residual.is_complex():
        raise ValueError(
            f"{op}: residual must be {tuple(x.shape)} on {x.device} as x and real, "
            f"got {tuple(residual.shape)} {residual.dtype} on {residual.device}"
        )
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def check_vector(op: str, name: str, vector: Tensor | None, x: Tensor) -> Tensor | None:
    """A vector over the columns of x, in the type that x is computed in."""
    if vector is None:
        return None
    if vector.shape != x.shape[-1:] or vector.device != x.device or not vector.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be ({x.shape[-1]},) floating point on {x.device}, "
            f"got {tuple(vector.shape)} {vector.dtype} on {vector.device}"
        )
    return vector.to(compute_dtype(x))


def bias_dropout_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    generator: Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``residual + dropout(x + bias, p)`` in one pass, forward and backward.

    Replaces ``residual + torch.nn.functional.dropout(x + bias, p, training)``: what follows a
    linear layer in a transformer. Differences: one rounding instead of three for float16 and
    bfloat16, the mask of :func:`pyfast.nn.functional.dropout` for the same seed, only the seed
    saved for backward.

    Args:
        x: (..., n) floating point, any strides (copied when not contiguous).
        bias: (n,) or None; any floating-point dtype.
        residual: the shape of x; dtypes that differ are promoted as torch promotes them.
        p: probability of an element of ``x + bias`` to be zeroed. Default: 0.5
        training: ``False`` adds without dropping. Default: ``True``
        generator: where the seed is drawn from. Default: torch's default CPU generator
        seed: the 64-bit seed itself, an int or a tensor of one int64.

    Returns:
        (..., n) contiguous, the promoted dtype of x and residual.

    Raises:
        ValueError: if ``p`` is outside of [0, 1], or a shape, dtype or device does not match.
    """
    if has_torch_function((x, bias, residual)):
        return handle_torch_function(
            bias_dropout_add,
            (x, bias, residual),
            x,
            bias,
            residual,
            p=p,
            training=training,
            generator=generator,
            seed=seed,
        )
    check_probability(p)
    if residual is None:
        raise TypeError("bias_dropout_add: residual must be a tensor, got None")
    x, checked = check_matrix("bias_dropout_add", x, residual)
    bias = check_vector("bias_dropout_add", "bias", bias, x)
    threshold = threshold_of(p) if training else 0
    eager = is_eager(x)
    if threshold == 0:
        seed = 0
    seed = resolve_seed("bias_dropout_add", x, eager, generator, seed)
    call = _bias_dropout_add.eager if eager else _bias_dropout_add.traced
    return call(x, bias, checked, seed, threshold, _STREAM, scale_of(threshold))  # type: ignore[no-any-return]
