"""Modules for the fused ops around dropout; torch has none of these."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Generator, Tensor

from . import functional as F
from ._fx import leaf


class BiasDropoutAdd(nn.Module):
    """``residual + dropout(x + bias, p)``: see :func:`pyfast.nn.functional.bias_dropout_add`.

    Args:
        num_features: the size n of the last dimension.
        p: probability of an element to be zeroed. Default: 0.5
        bias: learn a bias (initialised to zero). Default: ``True``
        generator: where seeds are drawn from. Default: torch's default CPU generator
        seed: a fixed seed: every call then has the same mask.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        p: float = 0.5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        generator: Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> None:
        super().__init__()
        if p < 0 or p > 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        self.num_features, self.p = num_features, p
        self.generator, self.seed = generator, seed
        zeros = torch.zeros(num_features, device=device, dtype=dtype) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros)

    @leaf
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.bias_dropout_add(
            x, self.bias, residual, self.p, self.training, generator=self.generator, seed=self.seed
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, p={self.p}, bias={self.bias is not None}"


class DropoutAddNorm(nn.Module):
    """``norm(residual + dropout(x, p))``: see :func:`pyfast.nn.functional.dropout_add_norm`.

    Args:
        num_features: the size n of the last dimension.
        p: probability of an element of x to be zeroed. Default: 0.5
        norm: ``"layer"`` or ``"rms"``.
        prenorm: return ``(y, residual + dropout(x))``.
        eps: added to the variance. Default: 1e-5 for ``"layer"``, for ``"rms"`` the
            epsilon of float64 for float64 and of float32 for every other dtype.
        elementwise_affine: learn a weight (initialised to one). Default: ``True``
        bias: learn a bias (initialised to zero); not for ``"rms"``. Default: ``True``
        generator: where seeds are drawn from. Default: torch's default CPU generator
        seed: a fixed seed: every call then has the same mask.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        p: float = 0.5,
        *,
        norm: str = "layer",
        prenorm: bool = False,
        eps: float | None = None,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> None:
        super().__init__()
        if p < 0 or p > 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        if norm not in ("layer", "rms"):
            raise ValueError(f'DropoutAddNorm: norm must be "layer" or "rms", got {norm!r}')
        self.num_features, self.p, self.norm = num_features, p, norm
        self.prenorm, self.eps = prenorm, eps
        self.generator, self.seed = generator, seed
        self.weight = self.bias = None
        if elementwise_affine:
            self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        if elementwise_affine and bias and norm == "layer":
            self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    @leaf
    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        return F.dropout_add_norm(  # type: ignore[return-value]
            x,
            residual,
            self.weight,
            self.bias,
            self.p,
            self.training,
            norm=self.norm,
            prenorm=self.prenorm,
            eps=self.eps,
            generator=self.generator,
            seed=self.seed,
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, p={self.p}, norm={self.norm}, prenorm={self.prenorm}"
