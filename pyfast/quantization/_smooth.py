"""SmoothQuant: outliers of inputs, moved into the weights (Xiao et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._configs import SmoothQuant
from ._replace import LINEARS, NORMS

_TINY = 1e-5  # channels that are never used would be divided by zero


class Fold(NamedTuple):
    """A norm with the parameters it gets, and the factors by which its output shrinks."""

    norm: nn.LayerNorm | nn.RMSNorm
    parameters: dict[str, Tensor]
    factors: Tensor


def smoothing_factors(absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """``max|x_j|**alpha / max|w_j|**(1 - alpha)``, w of all that read x: (in_features,) float32."""
    largest = [weight.detach().abs().amax(0).float() for weight in weights]
    limit = torch.stack(largest).amax(0).clamp(min=_TINY)
    absmax = absmax.to(limit.device).clamp(min=_TINY)
    return (absmax**alpha / limit ** (1 - alpha)).clamp(min=_TINY)


def plan_folds(
    model: nn.Module, config: SmoothQuant, quantized: dict[str, nn.Module]
) -> dict[int, Fold]:
    """By the id of the Linear that reads the norm; ValueError for pairs that are none.

    Args:
        quantized: the layers that will be quantized, by path.
    """
    folds: dict[int, Fold] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    calibration = config.calibration
    for norm_path, paths in config.fold.items():
        norm = modules.get(norm_path)
        if type(norm) not in NORMS or norm.weight is None:  # type: ignore[union-attr]
            got = type(norm).__name__ if norm is not None else "no module"
            raise ValueError(
                f"quantize_: fold: {norm_path!r} must be a LayerNorm or RMSNorm with weights, "
                f"got {got}"
            )
        if isinstance(paths, str) or not paths:
            raise ValueError(
                f"quantize_: fold: {norm_path!r} must have a list of paths, got {paths!r}"
            )
        linears = []
        for path in paths:
            linear = quantized.get(path)
            if not isinstance(linear, LINEARS) or id(linear) in folds:
                raise ValueError(
                    f"quantize_: fold: {path!r} must be an nn.Linear that is quantized, once"
                )
            given, read = calibration.norms.get(norm_path), calibration.inputs.get(path)
            if given is None or read is None or not torch.equal(given, read.channel_absmax):
                raise ValueError(
                    f"quantize_: fold: {path!r} does not read what {norm_path!r} gives"
                )
            linears.append(linear)
        absmax = calibration.norms[norm_path]
        factors = smoothing_factors(absmax, [linear.weight for linear in linears], config.alpha)
        parameters = {
            name: parameter.detach().float().div(factors).to(parameter.dtype)
            for name, parameter in norm.named_parameters(recurse=False)  # type: ignore[union-attr]
        }
        for linear in linears:
            folds[id(linear)] = Fold(norm, parameters, factors)  # type: ignore[arg-type]
    return folds
