"""Multi-head attention with int8 projections."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..ops.multi_head_attention import Layer, attend, is_regular
from . import functional as F
from ._fx import leaf
from .attention import MultiheadAttention
from .int8 import Int8Linear, Int8Module, as_dtype, quantize_weight

_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Int8MultiheadAttention(Int8Module, MultiheadAttention):
    """Replaces :class:`torch.nn.MultiheadAttention`: its projections have int8 weights.

    See :class:`pyfast.nn.MultiheadAttention` for the attention, which is the same, and
    :class:`pyfast.nn.Int8Linear` for the weights: ``in_proj_weight`` with
    ``in_proj_weight_scale`` (or ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` with
    theirs), and ``out_proj``, which is an Int8Linear. Nested tensors, and what torch refuses, go to
    torch with weights that are dequantized for the call.

    Args: as for MultiheadAttention; initialised as it, and then quantized.
        mode: ``"weight_only"``, or ``"dynamic"``: inputs of the projections are quantized too.
            Default: weight_only

    Raises:
        ValueError: for another mode.
    """

    SCALES = tuple(f"{name}_scale" for name in _WEIGHTS)
    OPTIONS = ("dtype", "mode")

    def __init__(self, *args: Any, mode: str = "weight_only", **kwargs: Any) -> None:
        if mode not in ("weight_only", "dynamic"):
            raise ValueError(
                f"Int8MultiheadAttention: mode must be weight_only or dynamic, got {mode!r}"
            )
        super().__init__(*args, **kwargs)
        self.mode = mode
        self._quantize(self, "Int8MultiheadAttention: ")

    def _quantize(self, attention: nn.MultiheadAttention, prefix: str) -> None:
        """Take the weights of ``attention``."""
        self.dtype = attention.out_proj.weight.dtype
        for name in _WEIGHTS:
            weight, scale = getattr(attention, name), None
            if weight is not None:
                weight, scale = quantize_weight(f"{prefix}{name}", weight)
                setattr(self, name, weight)
            self.register_buffer(f"{name}_scale", scale)
        self.out_proj = Int8Linear.from_linear(  # type: ignore[assignment]
            attention.out_proj, self.mode, name=f"{prefix}out_proj.weight"
        )

    @classmethod
    def from_attention(
        cls, attention: nn.MultiheadAttention, mode: str = "weight_only", *, name: str = ""
    ) -> Int8MultiheadAttention:
        """The same layer with int8 projections; biases are shared with ``attention``.

        Args:
            attention: torch's class or pyfast's.
            mode: as for the class.
            name: prefix of the names of its weights, for errors.

        Raises:
            ValueError: for weights that are empty, not finite, or of another dtype.
        """
        options: dict[str, Any] = {"device": "meta", "dtype": attention.out_proj.weight.dtype}
        new = cls(*_arguments(attention), mode=mode, **options)
        new._quantize(attention, name)
        for bias in ("in_proj_bias", "bias_k", "bias_v"):
            setattr(new, bias, getattr(attention, bias))
        return new.train(attention.training)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.MultiheadAttention:
        """torch's class with the weights that the int8 ones stand for; they need a gradient.

        Args:
            dtype: of all parameters; biases are shared if it is theirs. Default: what it was before
        """
        dtype = dtype or self.dtype
        options: dict[str, Any] = {"device": "meta"}
        new = nn.MultiheadAttention(*_arguments(self), **options)
        for name in _WEIGHTS:
            values = getattr(self, name)
            if values is not None:
                scale = getattr(self, f"{name}_scale")
                setattr(new, name, Parameter(F.dequantize_int8(values, scale, dtype=dtype)))
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            setattr(new, name, as_dtype(getattr(self, name), dtype))
        projection: Any = self.out_proj
        linear = projection.dequantize(dtype)
        linear.__class__ = NonDynamicallyQuantizableLinear
        new.out_proj = linear
        return new.train(self.training)

    def _linear(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return F.int8_linear(x, weight, scale, bias, weight_only=self.mode == "weight_only")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The three projections, as views of one where the inputs are one tensor."""
        size, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            return tuple(
                self._linear(x, getattr(self, name), getattr(self, f"{name}_scale"), b)
                for x, name, b in zip((query, key, value), _WEIGHTS[1:], biases, strict=True)
            )
        weight, scale = self.in_proj_weight, self.in_proj_weight_scale

        def rows(x: Tensor, begin: int, end: int) -> Tensor:
            part = slice(begin * size, end * size)
            b = None if bias is None else bias[part]
            return self._linear(x, weight[part], scale[part], b)  # type: ignore[index]

        if key is value and query is key:
            packed: tuple[Tensor, ...] = rows(query, 0, 3).unflatten(-1, (3, size)).unbind(-2)
            return packed
        if key is value:
            return (rows(query, 0, 1), *rows(key, 1, 3).unflatten(-1, (2, size)).unbind(-2))
        return rows(query, 0, 1), rows(key, 1, 2), rows(value, 2, 3)

    @leaf
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`pyfast.nn.MultiheadAttention.forward`."""
        separate = None
        if not self._qkv_same_embed_dim:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        layer = Layer(
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout if self.training else 0.0,
            self.out_proj.weight,
            self.out_proj.bias,
            separate,
            self.batch_first,
            in_proj=self._project,
            out_proj=self.out_proj,
        )
        masks = (key_padding_mask, need_weights, attn_mask)
        if not is_regular(layer, query, key, value, *masks, is_causal):
            torchs = self.dequantize()
            for name, parameter in torchs.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and "bias" in name)
            return torchs(  # type: ignore[no-any-return]
                query, key, value, *masks, average_attn_weights, is_causal
            )
        return attend(layer, query, key, value, *masks, average_attn_weights, is_causal)


def _arguments(attention: nn.MultiheadAttention) -> tuple[Any, ...]:
    return (
        *(attention.embed_dim, attention.num_heads, attention.dropout),
        *(attention.in_proj_bias is not None, attention.bias_k is not None),
        *(attention.add_zero_attn, attention.kdim, attention.vdim, attention.batch_first),
    )
