"""Convolutions with int8 weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import Parameter

from . import functional as F
from ._fx import leaf
from .int8 import Int8Module, as_dtype, quantize_weight

_BLOCK_SIZE = 1 << 20  # weights that are floating point at a time, unless a group is larger


class _Int8Conv(Int8Module):
    """Shared by both; the other base is torch's Conv1d or Conv2d."""

    weight_scale: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        conv: Any = self
        self.dtype = conv.weight.dtype
        conv.weight, scale = quantize_weight(f"{type(self).__name__}: weight", conv.weight)
        self.register_buffer("weight_scale", scale)

    @classmethod
    def from_conv(cls, conv: Any, *, name: str = "weight") -> Any:
        """The same layer with int8 weights; the bias is shared with ``conv``.

        Args:
            conv: a ``torch.nn.Conv1d`` or ``Conv2d``, as the class.
            name: of the weight, for errors.

        Raises:
            ValueError: for weights that are empty, not finite, or of another dtype.
        """
        values, scale = quantize_weight(name, conv.weight)
        new: Any = cls(*_arguments(conv), device="meta", dtype=conv.weight.dtype)
        new.weight, new.weight_scale, new.bias = values, scale, conv.bias
        return new.train(conv.training)

    def _blocks(self) -> Iterator[tuple[slice, slice, int]]:
        """(output channels, input channels, groups) of every block."""
        conv: Any = self
        num_out, num_in = conv.out_channels // conv.groups, conv.in_channels // conv.groups
        if conv.groups == 1:
            size = max(1, _BLOCK_SIZE // conv.weight[0].numel())
            for begin in range(0, num_out, size):
                yield slice(begin, min(begin + size, num_out)), slice(0, num_in), 1
            return
        size = max(1, _BLOCK_SIZE // (num_out * conv.weight[0].numel()))
        for begin in range(0, conv.groups, size):
            end = min(begin + size, conv.groups)
            outputs, inputs = (slice(begin * n, end * n) for n in (num_out, num_in))
            yield outputs, inputs, end - begin

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        """As that of torch's class, in input's dtype."""
        conv: Any = self
        function = nn.functional.conv1d if conv.weight.dim() == 3 else nn.functional.conv2d
        channels = 1 - conv.weight.dim()
        padding = conv.padding
        if conv.padding_mode != "zeros":
            pads = conv._reversed_padding_repeated_twice
            input = nn.functional.pad(input, pads, mode=conv.padding_mode)
            padding = 0
        parts = []
        for outputs, inputs, groups in self._blocks():
            values, scale = conv.weight[outputs], self.weight_scale[outputs]
            weight = F.dequantize_int8(values, scale, granularity="channel", dtype=input.dtype)
            bias = None if conv.bias is None else conv.bias[outputs]
            x = input.narrow(channels, inputs.start, inputs.stop - inputs.start)
            parts.append(function(x, weight, bias, conv.stride, padding, conv.dilation, groups))
        return parts[0] if len(parts) == 1 else torch.cat(parts, channels)

    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """torch's class with the weights that the int8 ones stand for; they need a gradient."""
        conv: Any = self
        dtype = dtype or self.dtype
        kind: Any = nn.Conv1d if conv.weight.dim() == 3 else nn.Conv2d
        new = kind(*_arguments(conv), device="meta")
        weight = F.dequantize_int8(
            conv.weight, self.weight_scale, granularity="channel", dtype=dtype
        )
        new.weight, new.bias = Parameter(weight), as_dtype(conv.bias, dtype)
        return new.train(conv.training)


def _arguments(conv: Any) -> tuple[Any, ...]:
    return (
        *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding),
        *(conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode),
    )


class Int8Conv1d(_Int8Conv, nn.Conv1d):
    """Replaces :class:`torch.nn.Conv1d`: weights are int8 with one scale an output channel.

    This saves memory, not time: the weights are dequantized in every call, at most 2**20 at a time
    (or one group, or one output channel), and torch's convolution does the rest, block by block. A
    call is slower than torch's, by little where the input is large. The weights are not trained;
    input and bias get gradients. ``state_dict``: ``weight`` int8, ``weight_scale`` (out_channels,)
    float32, ``bias``.

    Args: as for Conv1d; initialised as it, and then quantized.
    """


class Int8Conv2d(_Int8Conv, nn.Conv2d):
    """Replaces :class:`torch.nn.Conv2d`; see :class:`Int8Conv1d`.

    Args: as for Conv2d; initialised as it, and then quantized.
    """
