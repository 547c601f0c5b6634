"""Matrix products with int8 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..kernels.int8_linear.int8_linear_reference import (
    ACTIVATIONS,
    activate,
    int8_linear_reference,
    int8_mm_reference,
)
from ._native import contiguous, empty, get_num_threads, native
from ._op import Op, is_eager
from .quantize_int8 import check_scale_values

_is_autocast_enabled = torch._C._is_any_autocast_enabled

_MAX_NATIVE_K = 1 << 17  # beyond, the int32 sum of 127 * 127 may wrap
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _linear_native(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    smooth: Tensor | None,
    weight_only: bool,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    x, weight, weight_scale, bias, input_scale, smooth = contiguous(
        x, weight, weight_scale, bias, input_scale, smooth
    )
    y = empty((*x.shape[:-1], weight.shape[0]), torch.empty(0, dtype=dtype, device=x.device))
    native.int8_linear(
        x,
        weight,
        weight_scale,
        bias,
        input_scale,
        smooth,
        y,
        weight_only,
        ACTIVATIONS.index(activation),
        get_num_threads(),
    )
    return y


def _linear_triton(*arguments: Any) -> Tensor:
    from ..kernels.int8_linear.int8_linear_triton import int8_linear_triton

    return int8_linear_triton(*arguments)


def _linear_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, weight_scale, bias, _, smooth, _, activation, _ = inputs
    if activation != "none":
        raise RuntimeError("int8_linear: an activation is not differentiated inside of the op")
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(weight, weight_scale, smooth)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """As if x was not rounded: the gradient goes through the weights alone."""
    weight, weight_scale, smooth = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        # Gradients of float16 are near its smallest values already.
        dtype = torch.float32 if grad.dtype == torch.float16 else grad.dtype
        grad_x = (grad.float() * weight_scale).to(dtype) @ weight.to(dtype)
        if smooth is not None:
            grad_x = grad_x * smooth
        grad_x = grad_x.to(ctx.x_dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None, None, None, None


def _linear_limits(x: Tensor, weight: Tensor, *rest: Any) -> str:
    if rest[-1] not in _DTYPES or x.dtype == torch.float64:
        return "its kernels compute in float32, bfloat16 and float16"
    if weight.shape[1] >= _MAX_NATIVE_K:
        return f"its kernels take up to {_MAX_NATIVE_K - 1} input features"
    return ""


int8_linear_op = Op(
    "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? input_scale,"
    " Tensor? smooth, bool weight_only, str activation, ScalarType dtype) -> Tensor",
    {
        "cpu": _linear_native,
        "triton": _linear_triton,
        "reference": int8_linear_reference,
    },
    fake=_linear_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=(2,),
    limits=_linear_limits,
)


def _mm_native(a: Tensor, b: Tensor) -> Tensor:
    weight = b.t().contiguous()  # free where b is a transposed weight
    y = empty((a.shape[0], b.shape[1]), torch.empty(0, dtype=torch.int32, device=a.device))
    native.int8_mm(a.contiguous(), weight, y, get_num_threads())
    return y


def _mm_triton(a: Tensor, b: Tensor) -> Tensor:
    from ..kernels.int8_linear.int8_linear_triton import int8_mm_triton

    return int8_mm_triton(a, b)


int8_mm_op = Op(
    "int8_mm(Tensor a, Tensor b) -> Tensor",
    {"cpu": _mm_native, "triton": _mm_triton, "reference": int8_mm_reference},
    fake=lambda a, b: a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32),
)


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """The exact product of two int8 matrices: ``a.int() @ b.int()``.

    Replaces ``torch._int_mm``. Differences: every M, K and N (on CUDA torch refuses M up to 16, and
    K or N not divisible by 8), every stride, and a kernel of its own on processors without AVX-512.
    Fastest where ``b`` is a transposed matrix (``weight.t()``), which is not copied then.

    Args:
        a: (M, K) int8.
        b: (K, N) int8.

    Returns:
        (M, N) int32; sums beyond it wrap, which takes K of 131,072 and more.

    Raises:
        ValueError: for another dtype, shape, or two devices.
    """
    if has_torch_function((a, b)):
        return handle_torch_function(int8_mm, (a, b), a, b)
    if a.dtype != torch.int8 or b.dtype != torch.int8 or a.dim() != 2 or b.dim() != 2:
        raise ValueError(
            f"int8_mm: a and b must be int8 matrices, got {tuple(a.shape)} {a.dtype} and "
            f"{tuple(b.shape)} {b.dtype}"
        )
    if a.shape[1] != b.shape[0] or a.device != b.device:
        raise ValueError(
            f"int8_mm: b must be ({a.shape[1]}, N) on {a.device}, "
            f"got {tuple(b.shape)} on {b.device}"
        )
    return int8_mm_op(a, b)  # type: ignore[no-any-return]


def _check_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    smooth: Tensor | None,
) -> None:
    def fail(name: str, wanted: str, got: Tensor) -> None:
        raise ValueError(
            f"int8_linear: {name} must be {wanted} on {x.device}, "
            f"got {tuple(got.shape)} {got.dtype} on {got.device}"
        )

    if weight.dim() != 2 or weight.dtype != torch.int8 or weight.device != x.device:
        fail("weight", "(out_features, in_features) int8", weight)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k or not (x.is_floating_point() or x.dtype == torch.int8):
        fail("x", f"(..., {k}) floating point or int8", x)
    if (
        weight_scale.shape != (n,)
        or weight_scale.dtype != torch.float32
        or weight_scale.device != x.device
    ):
        fail("weight_scale", f"({n},) float32", weight_scale)
    if bias is not None and (
        bias.shape != (n,) or not bias.is_floating_point() or bias.device != x.device
    ):
        fail("bias", f"({n},) floating point", bias)
    if smooth is not None and (
        smooth.shape != (k,) or smooth.dtype != torch.float32 or smooth.device != x.device
    ):
        fail("smooth", f"({k},) float32", smooth)
    if input_scale is not None:
        shape = tuple(x.shape[:-1]) if x.dtype == torch.int8 else ()
        if (
            not (input_scale.numel() == 1 or input_scale.shape == shape)
            or input_scale.dtype != torch.float32
            or input_scale.device != x.device
        ):
            fail("input_scale", f"{shape} float32", input_scale)
        if input_scale.numel() == 1 and input_scale.is_cpu:
            check_scale_values("int8_linear", "input_scale", input_scale)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    weight_only: bool = False,
    activation: str = "none",
    input_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``activation(F.linear(x, weight * weight_scale[:, None], bias))`` with int8 weights.

    Replaces ``torch.nn.functional.linear`` with a quantized weight, and torch's quantized dynamic
    Linear. By default the rows of x are quantized too (W8A8: :func:`quantize_int8`, one scale a
    row), and multiplied as integers: the sums are exact, and a row of the result depends on its own
    row of x alone, to the bit. With ``weight_only`` x stays as it is, and the weights are converted
    on the way into the product: no error but that of the weights. (On processors with AMX, x is
    rounded to 2**-23 of the largest of its row in half precisions, 2**-31 in float32; with
    instructions for bfloat16, subnormal values of more than a few rows count as 0.) x and bias get
    gradients, as if x was not rounded; the weight gets none.

    A row of x with NaN or Inf gives a row of NaN when it is quantized; other rows are not touched.
    A row of zeros gives the bias. Nothing is packed or kept: weights may change between calls.

    Args:
        x: (..., in_features): float32, bfloat16, float16 (float64 runs in the reference), any
            strides; or int8 with ``input_scale`` of shape (...), quantized before.
        weight: (out_features, in_features) int8.
        weight_scale: (out_features,) float32.
        bias: (out_features,) floating point.
        weight_only: do not quantize x. Default: ``False``
        activation: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``, of the
            float32 result before it is rounded. Default: none
        input_scale: one float32 to quantize x with (static quantization), instead of one a row;
            positive (not checked on a GPU, nor where it is one a row of int8 x).
        smooth: (in_features,) float32, multiplied to x first (the division of SmoothQuant).
        dtype: of the result. Default: x's, or that of autocast; for int8 x that of the bias, or
            float32

    Returns:
        (..., out_features).

    Raises:
        ValueError: for another dtype, shape, device or activation.
    """
    tensors = (x, weight, weight_scale, bias, input_scale, smooth)
    if has_torch_function(tensors):
        return handle_torch_function(
            int8_linear,
            tensors,
            x,
            weight,
            weight_scale,
            bias,
            weight_only=weight_only,
            activation=activation,
            input_scale=input_scale,
            smooth=smooth,
            dtype=dtype,
        )
    _check_linear(*tensors)
    if activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"int8_linear: activation must be one of {names}, got {activation!r}")
    if x.dtype == torch.int8:
        if weight_only or smooth is not None:
            raise ValueError(
                "int8_linear: x must be floating point with weight_only or smooth, got int8"
            )
        if input_scale is None:
            raise ValueError("int8_linear: input_scale must be given with int8 x, got None")
        dtype = dtype or (torch.float32 if bias is None else bias.dtype)
        input_scale = input_scale.expand(x.shape[:-1])
    elif weight_only and input_scale is not None:
        raise ValueError("int8_linear: input_scale must be None with weight_only, got a tensor")
    if dtype is None:
        dtype = x.dtype
        device = x.device.type
        if dtype != torch.float64 and _is_autocast_enabled() and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
    elif not dtype.is_floating_point:
        raise ValueError(f"int8_linear: dtype must be floating point, got {dtype}")
    call = int8_linear_op.eager if is_eager(x) else int8_linear_op.traced
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    operands = (weight, weight_scale, bias, input_scale, smooth, weight_only)
    if needs_grad and activation != "none":  # torch's, which knows its gradient
        wide = torch.promote_types(dtype, torch.float32)
        return activate(call(x, *operands, "none", wide), activation).to(dtype)
    return call(x, *operands, activation, dtype)  # type: ignore[no-any-return]
