"""How to quantize: what :func:`quantize_` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ._calibrate import Calibration


@dataclass(frozen=True)
class Int8WeightOnly:
    """Weights are int8, inputs stay as they are: the safe choice, and the fast one for few rows.

    For Linear, MultiheadAttention, Conv1d and Conv2d.

    Args:
        embeddings: quantize ``nn.Embedding`` too. Default: ``False``
    """

    embeddings: bool = False
    mode: ClassVar[str] = "weight_only"


@dataclass(frozen=True)
class Int8DynamicActivationInt8Weight:
    """W8A8: the rows of inputs are quantized on the way, each with a scale of its own.

    For Linear and MultiheadAttention.

    Args:
        embeddings: quantize ``nn.Embedding`` too (its weights). Default: ``False``
    """

    embeddings: bool = False
    mode: ClassVar[str] = "dynamic"


def _check_calibration(config: str, calibration: object) -> None:
    if not isinstance(calibration, Calibration):
        raise TypeError(
            f"{config}: calibration must be what calibrate returns, "
            f"got {type(calibration).__name__}"
        )


@dataclass(frozen=True)
class Int8StaticActivationInt8Weight:
    """W8A8 with one scale for all inputs of a layer, known beforehand.

    For Linear; MultiheadAttention is quantized dynamically.

    Args:
        calibration: of this model, or of one with the same paths.
        embeddings: quantize ``nn.Embedding`` too (its weights). Default: ``False``

    Raises:
        TypeError: for another calibration.
    """

    calibration: Calibration
    embeddings: bool = False
    mode: ClassVar[str] = "static"

    def __post_init__(self) -> None:
        _check_calibration(type(self).__name__, self.calibration)


@dataclass(frozen=True)
class SmoothQuant:
    """W8A8 after a part of the inputs' outliers was moved into the weights.

    Channel j of the input is divided by ``s_j = max|x_j|**alpha / max|w_j|**(1 - alpha)``, and the
    weights are multiplied by it (Xiao et al. 2022). The division is one multiplication on the way
    into the product, or is part of a norm's weights where ``fold`` says so. For Linear;
    MultiheadAttention is quantized dynamically, without it.

    Args:
        calibration: of this model, or of one with the same paths.
        alpha: in [0, 1]. Default: 0.5
        fold: ``{path of a LayerNorm or RMSNorm: paths of all layers that read its output}``; the
            layers share their ``s``. The norm's weights change, so nothing else may read it.
            Default: none
        embeddings: quantize ``nn.Embedding`` too (its weights). Default: ``False``

    Raises:
        TypeError: for another calibration.
        ValueError: for another ``alpha``.
    """

    calibration: Calibration
    alpha: float = 0.5
    fold: Mapping[str, Sequence[str]] = field(default_factory=dict)
    embeddings: bool = False
    mode: ClassVar[str] = "dynamic"

    def __post_init__(self) -> None:
        _check_calibration(type(self).__name__, self.calibration)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"SmoothQuant: alpha must be in [0, 1], got {self.alpha}")


@dataclass(frozen=True)
class Int8QAT:
    """Train with the errors that quantization will make, then call :func:`convert`.

    For Linear, which becomes :class:`Int8QATLinear`.

    Args:
        quantize_input: with the errors of W8A8, otherwise those of int8 weights alone.
            Default: ``True``
    """

    quantize_input: bool = True


Config = (
    Int8WeightOnly
    | Int8DynamicActivationInt8Weight
    | Int8StaticActivationInt8Weight
    | SmoothQuant
    | Int8QAT
)
