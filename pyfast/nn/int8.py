"""Linear and Embedding with int8 weights: subclasses of torch's, whose state is plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import Parameter

from . import functional as F
from ._fx import leaf

MODES = ("weight_only", "dynamic", "static")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quantize_weight(name: str, weight: Tensor) -> tuple[Parameter, Tensor]:
    """int8 values with one scale an index of the first dimension.

    Args:
        name: of the weight, for errors.
        weight: (out, ...) floating point.

    Returns:
        ``(values, scale)``: a Parameter without gradient of weight's shape, (out,) float32.

    Raises:
        ValueError: for another dtype, and weights that are empty or hold NaN or Inf.
    """
    if weight.dtype not in _DTYPES:
        raise ValueError(
            f"{name} must be float32, bfloat16, float16 or float64, got {weight.dtype}"
        )
    if weight.numel() == 0:
        raise ValueError(f"{name} must not be empty, got {tuple(weight.shape)}")
    if weight.is_meta:
        scale = torch.empty(weight.shape[:1], device="meta")
        return Parameter(torch.empty_like(weight, dtype=torch.int8), requires_grad=False), scale
    values, scale = F.quantize_int8(weight.detach().flatten(1))
    if not bool(scale.isfinite().all()):
        row = int(scale.isfinite().logical_not().nonzero()[0])
        raise ValueError(f"{name} must be finite, got NaN or Inf in row {row}")
    return Parameter(values.view(weight.shape), requires_grad=False), scale


def as_dtype(parameter: Parameter | None, dtype: torch.dtype) -> Parameter | None:
    if parameter is None or parameter.dtype == dtype:
        return parameter
    return Parameter(parameter.detach().to(dtype), parameter.requires_grad)


class Int8Module(nn.Module):
    """What modules with int8 weights share.

    Weights are Parameters that need no gradient: FSDP2 shards parameters alone,
    DistributedDataParallel sends buffers in every forward, and peft and those who walk
    ``parameters()`` look for a weight there. Scales are buffers, float32 whatever the module is
    converted to: FSDP2's mixed precision would convert parameters.

    Attributes:
        dtype: floating point, that of the weights before; it follows ``.to()``.
    """

    dtype: torch.dtype
    SCALES: ClassVar[tuple[str, ...]] = ("weight_scale",)
    OPTIONS: ClassVar[tuple[str, ...]] = ("dtype",)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scales = {id(self._buffers[name]) for name in self.SCALES}

        def keep_float32(t: Tensor) -> Tensor:
            # Conversions of the dtype are for floating point: they see integers.
            return fn(t.view(torch.int32)).view(torch.float32) if id(t) in scales else fn(t)

        super()._apply(keep_float32, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        errors: list[str] = rest[-1] if rest else options["error_msgs"]
        for name, parameter in self._parameters.items():
            value = state_dict.get(prefix + name)
            is_int8 = parameter is not None and parameter.dtype == torch.int8
            if is_int8 and isinstance(value, Tensor) and value.dtype != torch.int8:
                errors.append(
                    f"{type(self).__name__}: {prefix}{name} must be int8, got {value.dtype}: load "
                    "floating-point weights before quantization"
                )
                return
        for name in self.SCALES:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.is_floating_point():
                state_dict[prefix + name] = value.to(torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)


class Int8Linear(Int8Module, nn.Linear):
    """Replaces :class:`torch.nn.Linear`: the weights take a quarter of the memory of float32.

    See :func:`pyfast.nn.functional.int8_linear` for the arithmetic. Differences: the weight is int8
    and not trained (the gradient to input and bias is there, so that adapters train on top),
    inputs may have another dtype than the module and decide that of the result, and ``state_dict``
    holds ``weight`` (out_features, in_features) int8, ``weight_scale`` (out_features,) float32,
    ``bias``, and where they are used ``input_scale`` () and ``smooth`` (in_features,) float32. A
    state that has ``smooth``, or ``input_scale`` for a module that quantizes inputs, brings it
    along. Scales stay float32 when the module is converted. There is no packed copy of the
    weights. What adds to ``weight`` (merging of adapters) must call :meth:`dequantize` before.

    Args:
        in_features, out_features, bias, device, dtype: as for Linear; initialised as it, and then
            quantized.
        mode: ``"weight_only"``; ``"dynamic"``: inputs are quantized too, with a scale a row; or
            ``"static"``: with one scale, ``input_scale``. Default: weight_only
        activation: of the result, in the same pass: ``"none"``, ``"relu"``, ``"gelu"``,
            ``"gelu_tanh"`` or ``"silu"``. Default: none

    Raises:
        ValueError: for another mode.
    """

    SCALES = ("weight_scale", "input_scale", "smooth")
    OPTIONS = ("dtype", "mode", "activation")
    weight_scale: Tensor
    input_scale: Tensor | None
    smooth: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mode: str = "weight_only",
        activation: str = "none",
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"Int8Linear: mode must be one of {', '.join(MODES)}, got {mode!r}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.dtype = self.weight.dtype
        self.mode = mode
        self.activation = activation
        values, scale = quantize_weight("Int8Linear: weight", self.weight)
        self.weight = values
        self.register_buffer("weight_scale", scale)
        one = torch.ones((), device=scale.device) if mode == "static" else None
        self.register_buffer("input_scale", one)
        self.register_buffer("smooth", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mode: str = "weight_only",
        *,
        input_scale: Tensor | None = None,
        smooth: Tensor | None = None,
        activation: str = "none",
        name: str = "weight",
    ) -> Int8Linear:
        """The same layer with int8 weights; the bias is shared with ``linear``.

        Args:
            linear: its weights are floating point.
            mode, activation: as for the class.
            input_scale: () float32, with mode ``"static"`` alone.
            smooth: (in_features,) float32: multiplied to inputs; weights are divided by it before
                they are quantized.
            name: of the weight, for errors.

        Raises:
            ValueError: for weights that are empty, not finite, or of another dtype, and scales that
                do not fit.
        """
        if (input_scale is not None) != (mode == "static"):
            got = "None" if input_scale is None else "a tensor"
            raise ValueError(
                f"Int8Linear: input_scale goes with mode 'static', got {got} with {mode!r}"
            )
        weight = linear.weight.detach()
        for scale, shape in ((input_scale, ()), (smooth, (weight.shape[1],))):
            if scale is None:
                continue
            if scale.shape != shape or scale.dtype != torch.float32:
                raise ValueError(
                    f"Int8Linear: input_scale must be () and smooth {shape or '(in_features,)'} "
                    f"float32, got {tuple(scale.shape)} {scale.dtype}"
                )
            if not scale.is_meta and not bool(((scale > 0) & scale.isfinite()).all()):
                raise ValueError("Int8Linear: input_scale and smooth must be positive and finite")
        if smooth is not None:
            weight = weight.float() / smooth
        values, weight_scale = quantize_weight(name, weight)
        options: dict[str, Any] = {"mode": mode, "activation": activation}
        size = (linear.in_features, linear.out_features, linear.bias is not None)
        new = cls(*size, "meta", linear.weight.dtype, **options)
        new.weight, new.bias = values, linear.bias
        new.weight_scale, new.input_scale, new.smooth = weight_scale, input_scale, smooth
        return new.train(linear.training)

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in input's dtype."""
        return F.int8_linear(
            input,
            self.weight,
            self.weight_scale,
            self.bias,
            weight_only=self.mode == "weight_only",
            activation=self.activation,
            input_scale=self.input_scale,
            smooth=self.smooth,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A Linear with the weights that the int8 ones stand for; they need a gradient.

        Args:
            dtype: of weight and bias, which is shared if it has it. Default: what it was before

        Raises:
            ValueError: if an activation is fused, which a Linear has not.
        """
        if self.activation != "none":
            raise ValueError(
                f"Int8Linear.dequantize: activation must be 'none', got {self.activation!r}"
            )
        dtype = dtype or self.dtype
        weight = F.dequantize_int8(self.weight, self.weight_scale)
        if self.smooth is not None:
            weight = weight * self.smooth
        new = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        new.weight = Parameter(weight.to(dtype))
        new.bias = as_dtype(self.bias, dtype)  # type: ignore[assignment]
        return new.train(self.training)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        wanted = {"smooth": (self.in_features,)}
        if self.mode != "weight_only":
            wanted["input_scale"] = ()  # type: ignore[assignment]
        for name, shape in wanted.items():
            value = state_dict.get(prefix + name)
            if self._buffers[name] is None and value is not None and value.shape == shape:
                self._buffers[name] = torch.ones(shape, device=self.weight.device)
                if name == "input_scale":
                    self.mode = "static"
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)

    def extra_repr(self) -> str:
        fused = "" if self.activation == "none" else f", activation={self.activation}"
        return f"{super().extra_repr()}, mode={self.mode}{fused}"


class Int8Embedding(Int8Module, nn.Embedding):
    """Replaces :class:`torch.nn.Embedding`: the table is int8 with one scale a row.

    Rows are gathered as int8, and these alone are dequantized, to ``dtype``. The table is not
    trained. ``state_dict``: ``weight`` (num_embeddings, embedding_dim) int8, ``weight_scale``
    (num_embeddings,) float32.

    Args:
        num_embeddings, embedding_dim, padding_idx: as for Embedding; initialised as it, and then
            quantized.
        device, dtype: of the result. ``max_norm``, which changes the table, is not supported.
    """

    weight_scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        values, scale = quantize_weight("Int8Embedding: weight", self.weight)
        self.weight = values
        self.register_buffer("weight_scale", scale)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, *, name: str = "weight") -> Int8Embedding:
        """The same table in int8.

        Args:
            embedding: without ``max_norm``.
            name: of the weight, for errors.

        Raises:
            ValueError: with ``max_norm``, and for weights that are empty, not finite, or of another
                dtype.
        """
        if embedding.max_norm is not None:
            raise ValueError(f"Int8Embedding: max_norm must be None, got {embedding.max_norm}")
        weight = embedding.weight
        values, scale = quantize_weight(name, weight)
        size = (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        new = cls(*size, "meta", weight.dtype)
        new.weight, new.weight_scale = values, scale
        return new.train(embedding.training)

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        """(...) int32 or int64 to (..., embedding_dim)."""
        values = nn.functional.embedding(input, self.weight)
        return F.dequantize_int8(values, self.weight_scale[input], dtype=self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """An Embedding with the weights that the int8 ones stand for; they need a gradient."""
        size = (self.num_embeddings, self.embedding_dim, self.padding_idx)
        new = nn.Embedding(*size, device="meta")
        weight = F.dequantize_int8(self.weight, self.weight_scale, dtype=dtype or self.dtype)
        new.weight = Parameter(weight)
        return new.train(self.training)
