"""Dropout and its relatives: one op, ``y = keep ? x * scale + shift : fill``."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _backend, _random
from .._backend import KERNEL_DTYPES
from ..kernels.dropout.dropout_reference import dropout_reference
from ._native import LARGE, get_num_threads, large_empty_like, native
from ._op import Op, is_eager
from ._rule import check_probability, resolve_seed, scale_of, threshold_of

_native_dropout: Any = getattr(native, "dropout", None)
_torch_empty_like = torch.empty_like
_forced = _backend.forced
_observers = _backend.observers
_is_grad_enabled = torch.is_grad_enabled
_SELU_SATURATION = 1.7580993408473766  # -alpha' of Klambauer et al. 2017: lambda * alpha


def _dropout_native(
    x: Tensor,
    seed: int | Tensor,
    threshold: int,
    stream: int,
    scale: float,
    shift: float,
    fill: float,
    mask_ndim: int,
) -> Tensor:
    y = _torch_empty_like(x) if x.numel() < LARGE else large_empty_like(x)
    _native_dropout(x, y, seed, threshold, stream, scale, shift, fill, mask_ndim, get_num_threads())
    return y


def _dropout_triton(x: Tensor, seed: int | Tensor, *arguments: Any) -> Tensor:
    from ..kernels.dropout.dropout_triton import dropout_triton

    return dropout_triton(x, seed, *arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    seed = inputs[1]
    if type(seed) is int:
        ctx.arguments = inputs[1:]
    else:
        ctx.arguments = (None, *inputs[2:])
        ctx.save_for_backward(seed)


def _regenerated(
    grad: Tensor,
    seed: int | Tensor,
    threshold: int,
    stream: int,
    scale: float,
    shift: float,
    fill: float,
    mask_ndim: int,
) -> Tensor:
    """The gradient of dropout: the same map without its constants."""
    return dropout_op(grad, seed, threshold, stream, scale, -0.0, 0.0, mask_ndim)  # type: ignore[no-any-return]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    seed, *rest = ctx.arguments
    grad = _regenerated(grad, ctx.saved_tensors[0] if seed is None else seed, *rest)
    return grad, None, None, None, None, None, None, None


dropout_op = Op(
    "dropout(Tensor x, Tensor seed, int threshold, int stream, float scale, float shift,"
    " float fill, int mask_ndim) -> Tensor",
    {
        "cpu": _dropout_native,
        "cuda": _dropout_native,
        "triton": _dropout_triton,
        "reference": dropout_reference,
    },
    fake=lambda x, *_: torch.empty_like(x),
    setup_context=_setup_context,
    backward=_backward,
)


def _compute_affine(p: float, alpha: bool) -> tuple[int, int, float, float, float]:
    """(threshold, stream, scale, shift, fill); a shift of -0.0 changes nothing."""
    threshold, stream = threshold_of(p), _random.DROPOUT_STREAM
    if not alpha or threshold in (0, 65536):
        return threshold, stream, scale_of(threshold), -0.0, 0.0
    rate = threshold / 65536
    scale = 1 / math.sqrt((_SELU_SATURATION**2 * rate + 1) * (1 - rate))
    shift = _SELU_SATURATION * scale * rate
    return threshold, stream, scale, shift, shift - _SELU_SATURATION * scale


_affine = functools.lru_cache(maxsize=256)(_compute_affine)


def apply_dropout(
    op: str,
    x: Tensor,
    p: float,
    inplace: bool,
    generator: Generator | None,
    seed: int | Tensor | None,
    *,
    alpha: bool = False,
    mask_ndim: int | None = None,
) -> Tensor:
    eager = is_eager(x)
    if seed is None and generator is None and eager and x.is_cpu:
        # What resolve_seed would do, without its calls.
        seed = _random.buffer.tensor.random_().item()  # type: ignore[assignment]
    else:
        seed = resolve_seed(op, x, eager, generator, seed)
    affine = (_affine if eager else _compute_affine)(float(p), alpha)
    arguments = (seed, *affine, x.dim() if mask_ndim is None else mask_ndim)
    if inplace:
        return _dropout_inplace(x, eager, *arguments)
    if not eager:
        return dropout_op.traced(x, *arguments)  # type: ignore[no-any-return]
    if forward_ad._current_level < 0:
        # What Op.eager would do, at less cost for a seed that is an int.
        if not (_is_grad_enabled() and x.requires_grad):
            return dropout_op.run(x, *arguments)  # type: ignore[no-any-return]
        if type(seed) is int:
            return _differentiable_dropout(x, arguments)  # type: ignore[no-any-return]
    return dropout_op.eager(x, *arguments)  # type: ignore[no-any-return]


class _Dropout(torch.autograd.Function):
    """What Op makes of setup_context and backward, for a seed that is an int: two inputs instead of
    eight and one attribute halve the cost of a small call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        ctx.arguments = arguments
        if (
            x.is_cpu
            and x.numel() < LARGE
            and _forced() is None
            and not _observers
            and _native_dropout is not None
        ):
            try:
                y = _torch_empty_like(x)
                _native_dropout(x, y, *arguments, get_num_threads())
                return y
            except RuntimeError:  # run knows what to make of it
                pass
        return dropout_op.run(x, *arguments)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _regenerated(grad, *ctx.arguments), None


# Function.apply less its check for functorch, which is_eager makes.
_differentiable_dropout: Any = super(torch.autograd.Function, _Dropout).apply


class _InplaceDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        _setup_context(ctx, (x, *arguments), x)
        ctx.mark_dirty(x)
        _run_inplace(x, *arguments)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _backward(ctx, grad)


_inplace_dropout: Any = _InplaceDropout.apply


def _run_inplace(x: Tensor, seed: int | Tensor, *arguments: Any) -> None:
    backend = dropout_op.backend_of(x)
    if backend in ("cpu", "cuda"):
        if _observers:
            _backend.report("dropout", dropout_op.kernels, x, backend, "", "")
        _native_dropout(x, x, seed, *arguments, get_num_threads())
    else:
        x.copy_(dropout_op.run(x, seed, *arguments))


def _dropout_inplace(x: Tensor, eager: bool, *arguments: Any) -> Tensor:
    if not eager or x._is_view() or x.is_inference() or forward_ad._current_level >= 0:
        # copy_ refuses what must not be written, before it writes.
        return x.copy_(dropout_op(x, *arguments))
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a "
            "single memory location. Please clone() the tensor before performing the operation."
        )
    if torch.is_grad_enabled() and x.requires_grad:
        if x.is_leaf:
            raise RuntimeError(
                "a leaf Variable that requires grad is being used in an in-place operation."
            )
        return _inplace_dropout(x, *arguments)  # type: ignore[no-any-return]
    _run_inplace(x, *arguments)
    torch.autograd.graph.increment_version(x)
    return x


def is_for_torch(x: Tensor) -> bool:
    """Nested tensors, and what torch refuses: called for its error."""
    return x.dtype not in KERNEL_DTYPES or x.layout is not torch.strided or x.is_nested


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by one over the keep rate.

    Replaces :func:`torch.nn.functional.dropout`. Differences: the mask is a function of the seed
    and the element's index alone (Philox-4x32-7, 16 bits an element), the same on every backend and
    for any number of threads; only the seed is saved for the backward pass; ``p`` has a resolution
    of 2**-16 and the scale is the inverse of the true keep rate, so that the expectation is exact;
    a dropped NaN or Inf becomes 0 (torch on the CPU gives NaN); torch's generator advances by one
    64-bit draw a call, on the CPU also for CUDA tensors.

    Args:
        input: any shape and strides; float32, float64, float16 or bfloat16. The result has its
            dtype and memory format. Nested tensors are left to torch, whose masks they get.
        p: probability of an element to be zeroed. Default: 0.5
        training: ``False`` returns ``input`` itself. Default: ``True``
        inplace: write the result to ``input``. Default: ``False``
        generator: where the seed is drawn from. Default: torch's default CPU generator
        seed: the 64-bit seed itself, an int or a tensor of one int64 (on the CPU or on the device
            of ``input``).

    Returns:
        A tensor of input's shape; ``input`` itself if ``p`` is 0, ``training`` is False or there
        are no elements.

    Raises:
        ValueError: if ``p`` is outside of [0, 1].
        RuntimeError, NotImplementedError: for the integer and complex dtypes that torch refuses,
            with torch's text.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            dropout,
            (input,),
            input,
            p=p,
            training=training,
            inplace=inplace,
            generator=generator,
            seed=seed,
        )
    if not 0.0 <= p <= 1.0:
        check_probability(p)
    if not isinstance(input, Tensor) or is_for_torch(input):
        return F.dropout(input, p, training, inplace)
    if not training or p == 0 or input.numel() == 0:
        return input
    return apply_dropout("dropout", input, p, inplace, generator, seed)


def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Set each element to the negative saturation value of SELU with probability ``p``, keeping
    mean and variance.

    Replaces :func:`torch.nn.functional.alpha_dropout` (Klambauer et al., "Self-Normalizing Neural
    Networks", 2017). Arguments, result, errors and differences are those of :func:`dropout`, but
    ``training`` defaults to ``False``, as torch's does.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            alpha_dropout,
            (input,),
            input,
            p=p,
            training=training,
            inplace=inplace,
            generator=generator,
            seed=seed,
        )
    if not 0.0 <= p <= 1.0:
        check_probability(p)
    if not isinstance(input, Tensor) or is_for_torch(input):
        return F.alpha_dropout(input, p, training, inplace)
    if not training or p == 0 or input.numel() == 0:
        return input
    return apply_dropout("alpha_dropout", input, p, inplace, generator, seed, alpha=True)
