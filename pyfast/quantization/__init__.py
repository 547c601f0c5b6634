"""int8 quantization of models, in place: ``quantize_(model, Int8WeightOnly())``."""

from __future__ import annotations

from ._calibrate import Calibration, InputRange, MinMaxObserver, PercentileObserver, calibrate
from ._configs import (
    Int8DynamicActivationInt8Weight,
    Int8QAT,
    Int8StaticActivationInt8Weight,
    Int8WeightOnly,
    SmoothQuant,
)
from ._qat import Int8QATLinear
from ._quantize import convert, dequantize_, quantize_
from ._readers import from_bitsandbytes, from_torchao
from ._report import QuantizationEntry, QuantizationReport

__all__ = [
    "Calibration",
    "InputRange",
    "Int8DynamicActivationInt8Weight",
    "Int8QAT",
    "Int8QATLinear",
    "Int8StaticActivationInt8Weight",
    "Int8WeightOnly",
    "MinMaxObserver",
    "PercentileObserver",
    "QuantizationEntry",
    "QuantizationReport",
    "SmoothQuant",
    "calibrate",
    "convert",
    "dequantize_",
    "from_bitsandbytes",
    "from_torchao",
    "quantize_",
]
