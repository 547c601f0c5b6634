"""``linear``: few rows on the CPU by a kernel that reads the weights at the speed of memory, all
else by torch."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import _backend
from ..kernels.linear.linear_reference import linear_reference
from ._native import contiguous, empty, get_num_threads, native
from ._op import _PLAIN_TYPES, Op, is_eager

_MOST_ROWS = 128  # of the kernel
# Up to so many rows it was measured to be faster than torch (2.13 on Sapphire Rapids, kept to each
# level), by dtype. In float32 torch reads as fast with one row or two.
_AVX512 = {torch.float32: 16, torch.bfloat16: 16, torch.float16: 16}
_ROWS: dict[str, dict[torch.dtype, int]] = {
    "generic": {},
    "avx2": {**_AVX512, torch.float32: 8},
    "avx512": _AVX512,
    "avx512_vnni": _AVX512,
    "avx512_bf16": {**_AVX512, torch.bfloat16: 8},
    "amx": {**_AVX512, torch.bfloat16: 128},
}
# Made in no time: most calls of a model in training end with it.
_AS_FAST = "torch is as fast with so many rows of this dtype"
_is_grad_enabled = torch.is_grad_enabled
_has_function_mode = torch._C._is_torch_function_mode_enabled
_forced, _observers = _backend.forced, _backend.observers


def _linear_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = empty((*x.shape[:-1], weight.shape[0]), x)
    x, weight, bias = contiguous(x, weight, bias)
    native.linear(x, weight, bias, y, get_num_threads())
    return y


def _num_rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _limits(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    if x.dtype == torch.float64:
        return "its kernel computes in float32, bfloat16 and float16"
    if _num_rows(x) > _MOST_ROWS:
        return f"its kernel takes up to {_MOST_ROWS} rows"
    same = weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    return "" if same else "its kernel takes operands of one dtype"


linear_op = Op(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    {"cpu": _linear_native, "reference": linear_reference},
    fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    limits=_limits,
)


def _why_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Why torch serves the call, or nothing. What most calls fail at comes first."""
    if not is_eager(x) or x.is_nested:
        return "the input is no plain tensor, or is traced or transformed"
    forced, dtype = _forced(), x.dtype
    if not x.is_cpu or native is None or x.dim() == 0 or forced not in (None, "cpu"):
        return "no kernel is usable there"
    num_features = x.shape[-1]
    num_rows = x.numel() // max(num_features, 1)
    if forced is None:
        least = 3 if dtype is torch.float32 else 1
        most = _ROWS[native.selected_isa()].get(dtype, 0)
    else:
        least, most = 0, _MOST_ROWS if dtype in _AVX512 else -1
    if not least <= num_rows <= most:
        return _AS_FAST
    needs_grad = x.requires_grad or weight.requires_grad
    for other in (weight,) if bias is None else (weight, bias):
        if type(other) not in _PLAIN_TYPES or other.dtype is not dtype or not other.is_cpu:
            return "an operand is no plain tensor, or of another dtype or device"
        if other.layout is not torch.strided:
            return "an operand is sparse"
        needs_grad = needs_grad or other.requires_grad
    if needs_grad and _is_grad_enabled():
        return "a gradient is needed"
    if weight.dim() != 2 or weight.shape[1] != num_features:
        return "the weight is no matrix of as many columns as the input"
    if bias is not None and bias.shape != weight.shape[:1]:
        return "the bias is not one value for each row of the weight"
    if x.layout is not torch.strided:
        return "the input is sparse"
    if _has_function_mode() or forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"):
        return "a mode, forward-mode AD or autocast is active"
    return ""


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``y = x W^T + b``, as :func:`torch.nn.functional.linear`, which it replaces.

    With few rows, as in decoding, a product is bound by reading the weights. On the CPU torch reads
    them at half of the memory's speed, or less, in bfloat16 and float16, and in float32 from a few
    rows on. With up to 16 rows (128 of bfloat16 with AMX, 8 where there are vector instructions for
    it, from 3 on to 16 of float32, to 8 with AVX2), a kernel reads them once; sums are in float32.
    Everything else goes to torch's function: more rows, gradients, autocast, traced and compiled
    code, GPUs, other dtypes, subclasses. Results differ from torch's in the last bits; with AMX,
    subnormal values of bfloat16 count as 0, as they do in torch. Errors are torch's.

    Args:
        input: (..., in_features).
        weight: (out_features, in_features) or (in_features,).
        bias: (out_features,) or ().

    Returns:
        (..., out_features), or (...) for a weight of one dimension.
    """
    reason = _why_torch(input, weight, bias)
    if not reason:
        if not _observers:
            with contextlib.suppress(RuntimeError):  # run knows what to make of it
                return _linear_native(input, weight, bias)
        return linear_op.run(input, weight, bias)  # type: ignore[no-any-return]
    if _observers and not torch.compiler.is_dynamo_compiling() and isinstance(input, Tensor):
        _backend.report("linear", linear_op.kernels, input, "torch", reason, "")
    return F.linear(input, weight, bias)
