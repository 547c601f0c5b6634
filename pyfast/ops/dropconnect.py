"""DropConnect: a linear layer whose weights are dropped. Built of the dropout op and matrix
products."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import _random
from .._backend import NAMES
from ._op import Op, is_eager
from ._rule import check_probability, resolve_seed, scale_of, threshold_of
from .dropout import dropout_op


def _drop(x: Tensor, seed: int | Tensor, threshold: int) -> Tensor:
    scale = scale_of(threshold)
    stream = _random.DROPCONNECT_STREAM
    return dropout_op(x, seed, threshold, stream, scale, -0.0, 0.0, 2)  # type: ignore[no-any-return]


def _forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, seed: int | Tensor, threshold: int
) -> Tensor:
    return F.linear(input, _drop(weight, seed, threshold), bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, seed, ctx.threshold = inputs
    ctx.seed = seed if isinstance(seed, int) else None
    ctx.save_for_backward(input, weight, *(() if isinstance(seed, int) else (seed,)))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, *seed_tensor = ctx.saved_tensors
    seed = seed_tensor[0] if seed_tensor else ctx.seed
    rows, input_rows = (t.reshape(math.prod(t.shape[:-1]), t.shape[-1]) for t in (grad, input))
    grad_input = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = grad @ _drop(weight, seed, ctx.threshold)
    if ctx.needs_input_grad[1]:
        grad_weight = _drop(rows.t() @ input_rows, seed, ctx.threshold)
    if ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0)
    return grad_input, grad_weight, grad_bias, None, None


_dropconnect_linear = Op(
    "dropconnect_linear(Tensor input, Tensor weight, Tensor? bias, Tensor seed, int threshold)"
    " -> Tensor",
    dict.fromkeys(NAMES, _forward),
    fake=lambda input, weight, *_: input.new_empty((*input.shape[:-1], weight.shape[0])),
    setup_context=_setup_context,
    backward=_backward,
    differentiable=(0, 1),
)


def dropconnect_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    generator: Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``input @ dropout(weight).T + bias``: a linear layer with each weight dropped with
    probability ``p``.

    DropConnect of Wan et al., "Regularization of Neural Networks using DropConnect", 2013, with one
    mask a call, shared by all rows of the input. torch has no such function. The dropped weight
    matrix lives for the matrix product alone: the backward pass makes it again from the seed.

    Args:
        input: (..., in_features), the dtype of ``weight``; any strides.
        weight: (out_features, in_features) float32, float64, float16 or bfloat16.
        bias: (out_features,) or None; never dropped.
        p: probability of a weight to be zeroed. Default: 0.5
        training: ``False`` gives ``torch.nn.functional.linear``. Default: ``True``
        generator: where the seed is drawn from. Default: torch's default CPU generator
        seed: the 64-bit seed itself, an int or a tensor of one int64.

    Returns:
        (..., out_features). ``dropout_mask(weight.shape, p, seed, stream=2)`` is the mask.

    Raises:
        ValueError: if ``p`` is outside of [0, 1] or ``weight`` is not a matrix.
        RuntimeError: for shapes and dtypes that do not match, with torch's text.
    """
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(
            dropconnect_linear,
            (input, weight, bias),
            input,
            weight,
            bias,
            p=p,
            training=training,
            generator=generator,
            seed=seed,
        )
    check_probability(p)
    if weight.dim() != 2:
        raise ValueError(
            "dropconnect_linear: weight must be (out_features, in_features), "
            f"got {tuple(weight.shape)}"
        )
    if not training or p == 0 or input.shape[-1:] != weight.shape[1:]:
        return F.linear(input, weight, bias)
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    eager = is_eager(input) and is_eager(weight)
    seed = resolve_seed("dropconnect_linear", weight, eager, generator, seed)
    call = _dropconnect_linear.eager if eager else _dropconnect_linear.traced
    return call(input, weight, bias, seed, threshold_of(p))  # type: ignore[no-any-return]
