"""Training with the errors of quantization."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..nn import functional as F
from ..nn._fx import leaf


class Int8QATLinear(nn.Linear):
    """A :class:`torch.nn.Linear` that computes with the values that int8 ones would stand for.

    The weight is rounded row by row, and the input too where asked; gradients pass as if nothing
    was rounded (see :func:`pyfast.nn.functional.fake_quantize`). Parameters, initialisation and
    state_dict are those of Linear. :func:`pyfast.quantization.convert` makes an
    :class:`pyfast.nn.Int8Linear` of it, with the same int8 values.

    Args:
        in_features, out_features, bias, device, dtype: as for Linear.

    Attributes:
        quantize_input: round the input too, with a scale a row. ``True`` from the start.
    """

    SCALES: ClassVar[tuple[str, ...]] = ()
    OPTIONS: ClassVar[tuple[str, ...]] = ("quantize_input",)
    quantize_input = True

    @property
    def mode(self) -> str:
        """Of the Int8Linear that it stands for."""
        return "dynamic" if self.quantize_input else "weight_only"

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        if self.quantize_input:
            input = F.fake_quantize(input)
        return nn.functional.linear(input, F.fake_quantize(self.weight), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantize_input={self.quantize_input}"
