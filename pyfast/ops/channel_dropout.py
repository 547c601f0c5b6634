"""Dropout of whole channels: the dropout op with a mask over the leading dimensions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Generator, Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from ._rule import check_probability
from .dropout import apply_dropout, is_for_torch


def _feature(
    op: str,
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    generator: Generator | None,
    seed: int | Tensor | None,
    mask_ndim: int,
    alpha: bool = False,
) -> Tensor:
    if not isinstance(input, Tensor) or is_for_torch(input):
        return getattr(F, op)(input, p, training, inplace)  # type: ignore[no-any-return]
    if not training or p == 0 or input.numel() == 0:
        return input
    if input.dim() + (mask_ndim == 1) < 2 and p < 1:  # torch adds the missing batch dimension
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    return apply_dropout(op, input, p, inplace, generator, seed, alpha=alpha, mask_ndim=mask_ndim)


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Zero whole channels of a (N, C, L) or (C, L) tensor with probability ``p``.

    Replaces :func:`torch.nn.functional.dropout1d`. Arguments, result, errors and differences are
    those of :func:`dropout`; channel c of sample n has the mask index ``n * C + c``.

    Raises:
        RuntimeError: if the input has neither 2 nor 3 dimensions.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            dropout1d,
            (input,),
            input,
            p=p,
            training=training,
            inplace=inplace,
            generator=generator,
            seed=seed,
        )
    check_probability(p)
    if input.dim() != 3:
        F.dropout1d(input, 0.0, False)  # torch's error for a wrong rank
    return _feature("dropout1d", input, p, training, inplace, generator, seed, input.dim() - 1)


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Zero whole channels of a (N, C, H, W) tensor with probability ``p``.

    Replaces :func:`torch.nn.functional.dropout2d`, with its warnings: other ranks are deprecated,
    and a 3-D input is read as (N, C, L). Arguments, result, errors and differences are those of
    :func:`dropout`.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            dropout2d,
            (input,),
            input,
            p=p,
            training=training,
            inplace=inplace,
            generator=generator,
            seed=seed,
        )
    check_probability(p)
    if input.dim() != 4:
        F.dropout2d(input, 0.0, False)  # torch's warnings about the rank
    return _feature("dropout2d", input, p, training, inplace, generator, seed, 2)


def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Zero whole channels of a (N, C, D, H, W) or (C, D, H, W) tensor with probability ``p``.

    Replaces :func:`torch.nn.functional.dropout3d`, with its warning for other ranks. Arguments,
    result, errors and differences are those of :func:`dropout`.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            dropout3d,
            (input,),
            input,
            p=p,
            training=training,
            inplace=inplace,
            generator=generator,
            seed=seed,
        )
    check_probability(p)
    if input.dim() != 5:
        F.dropout3d(input, 0.0, False)  # torch's warnings about the rank
    # torch adds the batch dimension to everything but 5-D input.
    mask_ndim = 2 if input.dim() == 5 else 1
    return _feature("dropout3d", input, p, training, inplace, generator, seed, mask_ndim)


def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Alpha dropout of whole channels: the first two dimensions index the mask.

    Replaces :func:`torch.nn.functional.feature_alpha_dropout`. Arguments, result, errors and
    differences are those of :func:`alpha_dropout`.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            feature_alpha_dropout,
            (input,),
            input,
            p=p,
            training=training,
            inplace=inplace,
            generator=generator,
            seed=seed,
        )
    check_probability(p)
    return _feature(
        "feature_alpha_dropout", input, p, training, inplace, generator, seed, 2, alpha=True
    )
