"""int8 values with float32 scales: to, from, and both at once for training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..kernels.quantize_int8.quantize_int8_reference import quantize_int8_reference
from ._native import contiguous, empty, get_num_threads, native
from ._op import Op, is_eager

GRANULARITIES = ("row", "tensor", "channel", "block")


def _native_kernel(
    x: Tensor, scale: Tensor | None, smooth: Tensor | None, block_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, scale, smooth = contiguous(x, scale, smooth)
    values = empty(tuple(x.shape), torch.empty(0, dtype=torch.int8, device=x.device))
    shape = (*x.shape[:-1], -(-x.shape[-1] // block_size))
    new_scale = torch.empty(shape, dtype=torch.float32, device=x.device)
    zero_point = torch.empty(0 if symmetric else shape, dtype=torch.int32, device=x.device)
    native.quantize_int8(
        x, scale, smooth, values, new_scale, zero_point, x.shape[-1], block_size, get_num_threads()
    )
    return values, new_scale, zero_point


def _triton_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.quantize_int8.quantize_int8_triton import quantize_int8_triton

    return quantize_int8_triton(*arguments)


def _fake(
    x: Tensor, scale: Tensor | None, smooth: Tensor | None, block_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:-1], -(-x.shape[-1] // block_size))
    zero_point = x.new_empty(0 if symmetric else shape, dtype=torch.int32)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(shape, dtype=torch.float32),
        zero_point,
    )


quantize_int8_op = Op(
    "quantize_int8(Tensor x, Tensor? scale, Tensor? smooth, SymInt block_size, bool symmetric)"
    " -> (Tensor, Tensor, Tensor)",
    {
        "cpu": _native_kernel,
        "cuda": _native_kernel,
        "triton": _triton_kernel,
        "reference": quantize_int8_reference,
    },
    fake=_fake,
)


def _check_input(function: str, x: Tensor) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(
            f"{function}: x must be a floating-point tensor of at least one dimension, "
            f"got {tuple(x.shape)} {x.dtype}"
        )


def _check_granularity(
    function: str, x: Tensor, granularity: str, dim: int, block_size: int | None
) -> None:
    if granularity not in GRANULARITIES:
        names = ", ".join(GRANULARITIES)
        raise ValueError(f"{function}: granularity must be one of {names}, got {granularity!r}")
    if (block_size is not None) != (granularity == "block"):
        raise ValueError(
            f"{function}: block_size goes with granularity 'block' and no other, "
            f"got {block_size} with {granularity!r}"
        )
    if block_size is not None and block_size < 1:
        raise ValueError(f"{function}: block_size must be at least 1, got {block_size}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{function}: dim must be in [{-x.dim()}, {x.dim() - 1}], got {dim}")


def check_scale(
    function: str, name: str, scale: Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    """ValueError unless ``scale`` is float32 of this shape (or of one element) on the device."""
    if (
        scale.dtype != torch.float32
        or (scale.shape != shape and scale.numel() != 1)
        or scale.device != device
    ):
        raise ValueError(
            f"{function}: {name} must be {shape} float32 on {device}, "
            f"got {tuple(scale.shape)} {scale.dtype} on {scale.device}"
        )


def check_scale_values(function: str, name: str, scale: Tensor) -> None:
    """ValueError unless every scale is positive and finite. Waits for a GPU; compiled code, which
    has no values yet, is not checked."""
    if is_eager(scale) and not bool((scale.isfinite() & (scale > 0)).all()):
        wrong = scale[~(scale.isfinite() & (scale > 0))][0].item()
        raise ValueError(f"{function}: {name} must be positive and finite, got {wrong}")


def _rows_of(x: Tensor, granularity: str, dim: int) -> Tensor:
    """x with what shares a scale in its rows, or in blocks of them."""
    if granularity == "tensor":
        return x.reshape(1, x.numel())
    if granularity == "channel":
        others = x.movedim(dim, 0)
        return others.reshape(others.shape[0], math.prod(others.shape[1:]))
    return x


def _scale_shape(x: Tensor, granularity: str, dim: int, block_size: int | None) -> tuple[int, ...]:
    if granularity == "tensor":
        return ()
    if granularity == "channel":
        return (x.shape[dim],)
    if granularity == "block":
        return (*x.shape[:-1], -(-x.shape[-1] // block_size))  # type: ignore[operator]
    return tuple(x.shape[:-1])


def quantize_int8(
    x: Tensor,
    *,
    granularity: str = "row",
    dim: int = 0,
    block_size: int | None = None,
    symmetric: bool = True,
    scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Quantize to int8: ``values = round(x / scale)``, halves to even.

    Replaces ``torch.quantize_per_tensor`` and ``torch.quantize_per_channel`` (both deprecated),
    without quantized tensor types. Differences: scales come from the values where none are given,
    symmetric values are -127..127, and NaN and Inf show: a block that holds one gets a scale of NaN
    and values of 0. All arithmetic is in float32, and the same to the bit on every backend.

    Args:
        x: (..., n) floating point, any strides.
        granularity: what shares a scale: ``"row"``, the last dimension (a token);
            ``"tensor"``; ``"channel"``, everything with one index in ``dim``; ``"block"``,
            ``block_size`` elements of a row, of which the last block may be shorter. Default: row
        dim: of the channels. Default: 0
        block_size: with ``"block"`` alone.
        symmetric: ``scale = absmax / 127``. Otherwise ``scale = (max - min) / 255`` where max is at
            least and min at most 0, and the ``zero_point``, the value that stands for 0, is
            returned too. Default: ``True``
        scale: float32, of the shape that is returned or of one element, positive: taken instead
            of the one that the values ask for; what is beyond is clamped. With symmetric alone.

    Returns:
        ``(values, scale)``, or ``(values, scale, zero_point)`` if not symmetric: int8 of x's shape,
        float32 and int32 of shape (...) for rows, () for the tensor, (x.shape[dim],) for channels,
        (..., ceil(n / block_size)) for blocks. Zeros have a scale of 1.

    Raises:
        ValueError: for another dtype, granularity, shape of ``scale``, or a scale that is not
            positive and finite.
    """
    if has_torch_function((x,)):
        return handle_torch_function(
            quantize_int8,
            (x,),
            x,
            granularity=granularity,
            dim=dim,
            block_size=block_size,
            symmetric=symmetric,
            scale=scale,
        )
    return _quantize("quantize_int8", x, granularity, dim, block_size, symmetric, scale)


def _quantize(
    function: str,
    x: Tensor,
    granularity: str,
    dim: int,
    block_size: int | None,
    symmetric: bool,
    scale: Tensor | None,
) -> tuple[Tensor, ...]:
    """See :func:`quantize_int8`; ``function`` is the name in errors."""
    _check_input(function, x)
    _check_granularity(function, x, granularity, dim, block_size)
    shape = _scale_shape(x, granularity, dim, block_size)
    if scale is not None:
        if not symmetric:
            raise ValueError(f"{function}: scale goes with symmetric=True, got symmetric=False")
        check_scale(function, "scale", scale, shape, x.device)
        check_scale_values(function, "scale", scale)
    rows = _rows_of(x.detach(), granularity, dim)
    if rows.numel() == 0:
        new_scale = torch.ones(shape, dtype=torch.float32, device=x.device)
        if scale is not None:
            new_scale = scale.reshape(shape) if scale.shape == shape else new_scale * scale
        result = (torch.empty(x.shape, dtype=torch.int8, device=x.device), new_scale)
        return result if symmetric else (*result, torch.zeros_like(new_scale, dtype=torch.int32))
    size = min(block_size or rows.shape[-1], rows.shape[-1])
    values, new_scale, zero_point = quantize_int8_op(rows, scale, None, size, symmetric)
    if granularity == "channel":
        others = [s for d, s in enumerate(x.shape) if d != dim % x.dim()]
        values = values.view(x.shape[dim], *others).movedim(0, dim).contiguous()
    else:
        values = values.view(x.shape)
    result = (values, new_scale.view(shape))
    return result if symmetric else (*result, zero_point.view(shape))


def dequantize_int8(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    granularity: str = "row",
    dim: int = 0,
    block_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(values - zero_point) * scale``: what :func:`quantize_int8` stands for.

    Replaces ``torch.dequantize``. One multiplication in float32, rounded once to ``dtype``.

    Args:
        values: (..., n) int8.
        scale, zero_point: as :func:`quantize_int8` returned them.
        granularity, dim, block_size: as given to it.
        dtype: of the result, floating point. Default: float32

    Returns:
        The shape of ``values``.

    Raises:
        ValueError: for another dtype or shape.
    """
    function = "dequantize_int8"
    if values.dtype != torch.int8 or values.dim() == 0:
        raise ValueError(
            f"{function}: values must be int8 of at least one dimension, "
            f"got {tuple(values.shape)} {values.dtype}"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"{function}: dtype must be floating point, got {dtype}")
    _check_granularity(function, values, granularity, dim, block_size)
    shape = _scale_shape(values, granularity, dim, block_size)
    check_scale(function, "scale", scale, shape, values.device)
    if zero_point is not None and (
        zero_point.shape != scale.shape
        or zero_point.dtype != torch.int32
        or zero_point.device != values.device
    ):
        raise ValueError(
            f"{function}: zero_point must be {tuple(scale.shape)} int32 on {values.device}, "
            f"got {tuple(zero_point.shape)} {zero_point.dtype} on {zero_point.device}"
        )

    def spread(t: Tensor) -> Tensor:
        if t.numel() == 1:
            return t.reshape(())
        if granularity == "channel":
            return t.view(-1, *(1,) * (values.dim() - 1 - dim % values.dim()))
        if granularity == "block":
            return t.repeat_interleave(block_size, -1)[..., : values.shape[-1]]  # type: ignore[arg-type]
        return t.unsqueeze(-1)

    steps = values.to(torch.float32)
    if zero_point is not None:
        steps.sub_(spread(zero_point).to(torch.float32))
    return steps.mul_(spread(scale)).to(dtype)


def fake_quantize(
    x: Tensor,
    *,
    granularity: str = "row",
    dim: int = 0,
    block_size: int | None = None,
    symmetric: bool = True,
    scale: Tensor | None = None,
) -> Tensor:
    """``dequantize_int8(quantize_int8(x))`` in x's dtype, with a gradient: for training with the
    errors that quantization will make.

    Replaces ``torch.fake_quantize_per_tensor_affine`` and ``fake_quantize_per_channel_affine``.
    The gradient is passed through as if nothing was rounded (straight-through estimator, Bengio et
    al. 2013), but zero where x is beyond a given ``scale``. The scale gets none.

    Args and Raises: as :func:`quantize_int8`.

    Returns:
        The shape and dtype of x.
    """
    fixed = x.detach()
    result = _quantize("fake_quantize", fixed, granularity, dim, block_size, symmetric, scale)
    layout: dict[str, Any] = {"granularity": granularity, "dim": dim, "block_size": block_size}
    through = x - fixed  # zero, with the gradient of x
    if scale is not None:
        limit = dequantize_int8(torch.full_like(result[0], 127), result[1], **layout)
        through = torch.where(fixed.abs() <= limit, through, 0.0)
    return dequantize_int8(*result, dtype=x.dtype, **layout) + through
