"""``norm(residual + dropout(x))`` in one pass: what stands between two layers of a transformer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import _random
from ..kernels.dropout_add_norm.dropout_add_norm_reference import (
    dropout_add_norm_backward_reference,
    dropout_add_norm_int8_reference,
    dropout_add_norm_reference,
    norm_gradients,
)
from ._native import (
    column_partials,
    compute_dtype,
    contiguous,
    empty,
    empty_like,
    get_num_threads,
    native,
)
from ._op import Op, is_eager
from ._rule import check_probability, resolve_seed, scale_of, threshold_of
from .bias_dropout_add import check_matrix, check_vector
from .dropout import dropout_op

_STREAM = _random.DROPOUT_STREAM


def _run_native(
    x: Tensor,
    inputs: tuple[Any, ...],
    y: Tensor | None,
    z: Tensor | None,
    quantized: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Write what is not None; ``(mean, rstd)``. x is contiguous; ``inputs``: the op's arguments
    between x and ``keep_z``."""
    residual, weight, bias, seed, threshold, stream, scale, eps, rms = inputs
    residual, weight, bias = contiguous(residual, weight, bias)
    num_columns = x.shape[-1]
    num_rows = x.shape[:-1].numel()
    make = x.new_empty if num_columns else x.new_zeros  # nothing is written for empty rows
    mean = make(0 if rms else num_rows, dtype=compute_dtype(x))
    rstd = make(num_rows, dtype=compute_dtype(x))
    values, value_scale = quantized or (None, None)
    native.dropout_add_norm(
        x,
        residual,
        weight,
        bias,
        y,
        z,
        None if rms else mean,
        rstd,
        values,
        value_scale,
        seed,
        threshold,
        stream,
        scale,
        eps,
        rms,
        num_columns,
        get_num_threads(),
    )
    return mean, rstd


def _forward_native(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, keep_z = arguments[:-1], arguments[-1]
    (x,) = contiguous(x)  # outputs have its strides
    y = empty_like(x)
    z = empty_like(x) if keep_z else x.new_empty(0)
    return y, z, *_run_native(x, inputs, y, z if keep_z else None, None)


def _int8_native(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, keep_z = arguments[:-1], arguments[-1]
    (x,) = contiguous(x)
    values = empty(tuple(x.shape), torch.empty(0, dtype=torch.int8, device=x.device))
    make = x.new_empty if x.shape[-1] else x.new_ones
    value_scale = make(x.shape[:-1], dtype=torch.float32)
    kept = empty_like(x)
    y, z = (None, kept) if keep_z else (kept, None)
    _run_native(x, inputs, y, z, (values, value_scale))
    return values, value_scale, kept


def _backward_native(
    grad_y: Tensor,
    grad_z: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: int | Tensor,
    threshold: int,
    stream: int,
    scale: float,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_y, grad_z, z, weight = contiguous(grad_y, grad_z, z, weight)
    num_columns = z.shape[-1]
    grad_x, grad_residual = empty_like(z), empty_like(z)
    make = z.new_empty if z.numel() else z.new_zeros  # nothing is written for empty rows
    grad_weight, grad_bias = (make(num_columns, dtype=compute_dtype(z)) for _ in "wb")
    native.dropout_add_norm_backward(
        grad_y,
        grad_z,
        z,
        weight,
        None if rms else mean,
        rstd,
        grad_x,
        grad_residual,
        column_partials(z, 2),
        grad_weight,
        grad_bias,
        seed,
        threshold,
        stream,
        scale,
        rms,
        num_columns,
        get_num_threads(),
    )
    return grad_x, grad_residual, grad_weight, grad_bias


def _forward_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.dropout_add_norm.dropout_add_norm_triton import dropout_add_norm_triton

    return dropout_add_norm_triton(*arguments)


def _int8_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.dropout_add_norm.dropout_add_norm_triton import dropout_add_norm_int8_triton

    return dropout_add_norm_int8_triton(*arguments)


def _backward_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.dropout_add_norm.dropout_add_norm_triton import dropout_add_norm_backward_triton

    return dropout_add_norm_backward_triton(*arguments)


_backward_op = Op(
    "dropout_add_norm_backward(Tensor grad_y, Tensor? grad_z, Tensor z, Tensor? weight,"
    " Tensor mean, Tensor rstd, Tensor seed, int threshold, int stream, float scale, float eps,"
    " bool rms) -> (Tensor, Tensor, Tensor, Tensor)",
    {
        "cpu": _backward_native,
        "cuda": _backward_native,
        "triton": _backward_triton,
        "reference": dropout_add_norm_backward_reference,
    },
    fake=lambda grad_y, grad_z, z, *_: (
        z.new_empty(z.shape),
        z.new_empty(z.shape),
        z.new_empty(z.shape[-1], dtype=compute_dtype(z)),
        z.new_empty(z.shape[-1], dtype=compute_dtype(z)),
    ),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, residual, weight, bias, seed, *rule, _ = inputs
    _, z, mean, rstd = output
    ctx.present = (residual is not None, weight is not None, bias is not None)
    ctx.rule = tuple(rule)
    ctx.seed = seed if isinstance(seed, int) else None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, weight, mean, rstd, None if isinstance(seed, int) else seed)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    z, weight, mean, rstd, seed = ctx.saved_tensors
    seed = ctx.seed if seed is None else seed
    threshold, stream, scale, eps, rms = ctx.rule
    if grad_y is None:
        grad_y = torch.zeros_like(z)
    if torch.is_grad_enabled():
        # A second derivative is wanted: the same formulas in plain torch, from z, whose own
        # gradient leads on to x and residual.
        dz, grad_weight, grad_bias = norm_gradients(grad_y, grad_z, z, weight, eps, rms)
        dz = grad_residual = dz.to(z.dtype)
        grad_x = dropout_op(dz, seed, threshold, stream, scale, -0.0, 0.0, dz.dim())
    else:
        grad_x, grad_residual, grad_weight, grad_bias = _backward_op(
            grad_y, grad_z, z, weight, mean, rstd, seed, threshold, stream, scale, eps, rms
        )
    vectors = zip((grad_residual, grad_weight, grad_bias), ctx.present, strict=True)
    return (grad_x, *(grad if present else None for grad, present in vectors)) + (None,) * 7


norm_op = Op(
    "dropout_add_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor seed,"
    " int threshold, int stream, float scale, float eps, bool rms, bool keep_z)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    {
        "cpu": _forward_native,
        "cuda": _forward_native,
        "triton": _forward_triton,
        "reference": dropout_add_norm_reference,
    },
    fake=lambda x, *arguments: (
        x.new_empty(x.shape),
        x.new_empty(x.shape if arguments[-1] else 0),
        x.new_empty(0 if arguments[-2] else math.prod(x.shape[:-1]), dtype=compute_dtype(x)),
        x.new_empty(math.prod(x.shape[:-1]), dtype=compute_dtype(x)),
    ),
    setup_context=_setup_context,
    backward=_backward,
    differentiable=(0, 1, 2),
)


_int8_op = Op(
    "dropout_add_norm_int8(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor seed,"
    " int threshold, int stream, float scale, float eps, bool rms, bool keep_z)"
    " -> (Tensor, Tensor, Tensor)",
    {
        "cpu": _int8_native,
        "cuda": _int8_native,
        "triton": _int8_triton,
        "reference": dropout_add_norm_int8_reference,
    },
    fake=lambda x, *_: (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        x.new_empty(x.shape),
    ),
)


def norm_rule(
    x: Tensor, threshold: int, eps: float | None, *, rms: bool
) -> tuple[int, int, float, float, bool]:
    """The ops' arguments between the seed and ``keep_z``."""
    if eps is None:
        eps = torch.finfo(compute_dtype(x)).eps if rms else 1e-5
    return threshold, _STREAM, scale_of(threshold), eps, rms


def dropout_add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    norm: str = "layer",
    prenorm: bool = False,
    quantize: bool = False,
    eps: float | None = None,
    generator: Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """``norm(residual + dropout(x, p)) * weight + bias`` in one pass, forward and backward.

    Replaces ``F.layer_norm(residual + F.dropout(x, p, training), (n,), weight, bias, eps)``, or the
    same with ``F.rms_norm``. Differences: dropout as :func:`pyfast.nn.functional.dropout`; sums in
    a fixed order, the same for any number of threads; for backward it saves the sum, two numbers a
    row and the seed. LayerNorm of Ba et al. 2016, RMSNorm of Zhang and Sennrich 2019.

    Args:
        x: (..., n) floating point, any strides (copied when not contiguous).
        residual: the shape of x, or None; dtypes that differ are promoted as torch promotes them.
        weight: (n,) or None; any floating-point dtype.
        bias: (n,) or None.
        p: probability of an element of x to be zeroed. Default: 0.5
        training: ``False`` adds without dropping. Default: ``True``
        norm: ``"layer"`` or ``"rms"``.
        prenorm: return ``(y, residual + dropout(x))``: the sum is the residual of the next block.
        quantize: return ``(values, scale, sum)``: y as ``quantize_int8(y)`` gives it, the operands
            of ``int8_linear(values, ..., input_scale=scale)``, and what the next block adds to: y,
            or ``residual + dropout(x)`` with ``prenorm`` (y itself is not written then). Without a
            gradient. Default: ``False``
        eps: added to the variance. Default, as torch's: 1e-5 for ``"layer"``, for ``"rms"`` the
            epsilon of float64 for float64 and of float32 for every other dtype.
        generator: where the seed is drawn from. Default: torch's default CPU generator
        seed: the 64-bit seed itself, an int or a tensor of one int64.

    Returns:
        y (..., n), contiguous, the promoted dtype of x and residual; with ``prenorm`` the pair;
        with ``quantize`` int8 (..., n), float32 (...), and one tensor like y.

    Raises:
        ValueError: if ``p`` is outside of [0, 1], ``norm`` is unknown, or a shape, dtype or device
            does not match.
        RuntimeError: if ``quantize`` is asked for where a gradient is wanted.
    """
    tensors = (x, residual, weight, bias)
    if has_torch_function(tensors):
        return handle_torch_function(
            dropout_add_norm,
            tensors,
            *tensors,
            p=p,
            training=training,
            norm=norm,
            prenorm=prenorm,
            quantize=quantize,
            eps=eps,
            generator=generator,
            seed=seed,
        )
    op = "dropout_add_norm"
    check_probability(p)
    if norm not in ("layer", "rms"):
        raise ValueError(f'{op}: norm must be "layer" or "rms", got {norm!r}')
    x, residual = check_matrix(op, x, residual)
    weight = check_vector(op, "weight", weight, x)
    bias = check_vector(op, "bias", bias, x)
    threshold = threshold_of(p) if training else 0
    eager = is_eager(x)
    if threshold == 0:
        seed = 0
    seed = resolve_seed(op, x, eager, generator, seed)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, residual, weight, bias)
    )
    rule = norm_rule(x, threshold, eps, rms=norm == "rms")
    if quantize:
        if needs_grad:
            raise RuntimeError(
                f"{op}: quantize=True has no gradient, got inputs that require one: call it under "
                "torch.no_grad()"
            )
        quantized = _int8_op.eager if eager else _int8_op.traced
        return quantized(x, residual, weight, bias, seed, *rule, prenorm)  # type: ignore[no-any-return]
    # Inside of a transform, tensors do not tell whether a gradient is wanted outside of it.
    keep_z = prenorm or needs_grad or (torch.is_grad_enabled() and not eager)
    call = norm_op.eager if eager else norm_op.traced
    y, z, _, _ = call(x, residual, weight, bias, seed, *rule, keep_z)
    return (y, z) if prenorm else y
