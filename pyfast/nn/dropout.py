"""Dropout modules: subclasses of torch's, with the same arguments, repr and (empty) state_dict."""

from __future__ import annotations

import torch.nn as nn
from torch import Generator, Tensor

from . import functional as F
from ._fx import leaf


class _Seeded:
    """The two keyword-only extras. They are class attributes too, so that ``pyfast.patch`` may
    change the class of a torch module in place."""

    generator: Generator | None = None
    seed: int | Tensor | None = None

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        generator: Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> None:
        super().__init__(p, inplace)  # type: ignore[call-arg]
        self.generator = generator
        self.seed = seed


class Dropout(_Seeded, nn.Dropout):
    """Replaces :class:`torch.nn.Dropout`; see :func:`pyfast.nn.functional.dropout` for the
    differences.

    Args:
        p: probability of an element to be zeroed. Default: 0.5
        inplace: write the result to the input. Default: ``False``
        generator: where seeds are drawn from. Default: torch's default CPU generator
        seed: a fixed seed: every call then has the same mask.
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(
            input, self.p, self.training, self.inplace, generator=self.generator, seed=self.seed
        )


class Dropout1d(_Seeded, nn.Dropout1d):
    """Replaces :class:`torch.nn.Dropout1d`: whole channels of a (N, C, L) or (C, L) input.
    Arguments as Dropout."""

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout1d(
            input, self.p, self.training, self.inplace, generator=self.generator, seed=self.seed
        )


class Dropout2d(_Seeded, nn.Dropout2d):
    """Replaces :class:`torch.nn.Dropout2d`: whole channels of a (N, C, H, W) input. Arguments as
    Dropout."""

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout2d(
            input, self.p, self.training, self.inplace, generator=self.generator, seed=self.seed
        )


class Dropout3d(_Seeded, nn.Dropout3d):
    """Replaces :class:`torch.nn.Dropout3d`: whole channels of a (N, C, D, H, W) input. Arguments as
    Dropout."""

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout3d(
            input, self.p, self.training, self.inplace, generator=self.generator, seed=self.seed
        )


class AlphaDropout(_Seeded, nn.AlphaDropout):
    """Replaces :class:`torch.nn.AlphaDropout`, which ignores ``inplace``. Arguments as Dropout."""

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return F.alpha_dropout(
            input, self.p, self.training, generator=self.generator, seed=self.seed
        )


class FeatureAlphaDropout(_Seeded, nn.FeatureAlphaDropout):
    """Replaces :class:`torch.nn.FeatureAlphaDropout`, which ignores ``inplace``. Arguments as
    Dropout."""

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return F.feature_alpha_dropout(
            input, self.p, self.training, generator=self.generator, seed=self.seed
        )
