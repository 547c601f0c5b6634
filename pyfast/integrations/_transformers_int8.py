"""transformers: models whose Linear layers become int8 while they are loaded.

transformers 5 loads one tensor at a time, so that the model never exists in floating point: layers
wait for their weights (:class:`_Awaiting`) and become :class:`pyfast.nn.Int8Linear` when int8
weights arrive, from a quantized checkpoint, or quantized on the way from any other.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Int8Linear
from ..nn.int8 import quantize_weight
from ..quantization import QuantizationEntry, QuantizationReport, dequantize_
from ..quantization._replace import assume
from ..quantization._report import num_bytes

_version: str = importlib.import_module("transformers").__version__
if int(_version.split(".", 1)[0]) < 5:
    raise ImportError(
        "PyfastConfig needs transformers 5 or newer, which loads weights in another way than "
        f"before, got {_version}; pyfast.quantization.quantize_ quantizes the loaded models of "
        "every version"
    )


def _transformers(name: str) -> Any:
    return importlib.import_module(f"transformers.{name}")


_auto: Any = _transformers("quantizers.auto")
_utils: Any = _transformers("quantizers.quantizers_utils")
_Conv1D: type[nn.Module] = _transformers("pytorch_utils").Conv1D
_ConversionOps: Any = _transformers("core_model_loading").ConversionOps
_HfQuantizer: Any = _transformers("quantizers").HfQuantizer
_QuantizationConfigMixin: Any = _transformers("utils.quantization_config").QuantizationConfigMixin

METHOD = "pyfast"
_MODES = {"int8_weight_only": "weight_only", "int8_dynamic": "dynamic"}


class PyfastConfig(_QuantizationConfigMixin):  # type: ignore[misc]
    """Loads models with int8 weights: ``from_pretrained(..., quantization_config=PyfastConfig())``.

    Every ``torch.nn.Linear`` that the checkpoint has weights for becomes
    :class:`pyfast.nn.Int8Linear`, with the weights that :func:`pyfast.quantization.quantize_` makes
    of the loaded model's. Weights are quantized one at a time, while they are loaded. Activations
    keep the dtype of the model. ``model.hf_quantizer.report`` tells what was quantized, and what
    not and why; ``model.dequantize()`` undoes it.

    ``save_pretrained`` saves the int8 weights, and ``from_pretrained`` loads them to the bit,
    without a configuration. This class must have been imported then: to transformers, the method
    ``"pyfast"`` in the checkpoint's config.json is otherwise unknown, and it goes on without.

    Left alone: subclasses of Linear, transformers' ``Conv1D`` (all that GPT-2 has), experts that a
    model keeps in one three-dimensional parameter, weights that are tied to others (often
    ``lm_head``), modules that transformers keeps in float32, and layers that are not in the
    checkpoint, such as a new classification head, which is to be trained. Code of a model that
    reads ``module.weight`` to compute with it sees int8.

    int8 weights are not trained; adapters (LoRA) on top of them are. Call
    :func:`pyfast.quantization.dequantize_` before adapters are merged: peft refuses to add to int8
    weights, and with ``safe_merge=True`` rounds what it adds to int8, which loses it silently. Not
    supported: tensor parallel loading, and offloading to the disk.

    Args:
        name: ``"int8_weight_only"``, or ``"int8_dynamic"``: inputs are quantized too, with a scale
            a row. Default: int8_weight_only
        modules_to_not_convert: names of modules, or ends of them, or regular expressions for their
            beginnings. A list takes the place of the default. Default: None: the output embedding
            (``lm_head``) and the last module, as everywhere in transformers. config.json of a saved
            model has all that was left out.
        quant_method: ``"pyfast"``; comes from config.json.

    Raises:
        ValueError: for another ``name`` or ``quant_method``. From ``from_pretrained``: if the model
            has no Linear to quantize, or the checkpoint does not fit.
        TypeError: if ``modules_to_not_convert`` is neither None nor strings.
    """

    def __init__(
        self,
        name: str = "int8_weight_only",
        modules_to_not_convert: list[str] | None = None,
        *,
        quant_method: str = METHOD,
    ) -> None:
        if name not in _MODES:
            raise ValueError(f"PyfastConfig: name must be one of {', '.join(_MODES)}, got {name!r}")
        if quant_method != METHOD:
            raise ValueError(f"PyfastConfig: quant_method must be {METHOD!r}, got {quant_method!r}")
        skip = modules_to_not_convert
        if skip is not None and (
            isinstance(skip, str) or not all(isinstance(pattern, str) for pattern in skip)
        ):
            raise TypeError(
                "PyfastConfig: modules_to_not_convert must be None or a list of strings, "
                f"got {skip!r}"
            )
        self.quant_method = METHOD
        self.name = name
        self.modules_to_not_convert = None if skip is None else list(skip)


class _Awaiting(nn.Linear):
    """A Linear on the meta device that becomes Int8Linear when it is given int8 weights."""

    mode: str
    dtype: torch.dtype
    weight_scale: Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight" and isinstance(value, Tensor) and value.dtype == torch.int8:
            size = (self.in_features, self.out_features, self.bias is not None)
            new = Int8Linear(*size, "meta", self.dtype, mode=self.mode)
            new.weight, new.bias = self.weight, self.bias
            new.weight_scale = self.weight_scale
            assume(self, new)

    @classmethod
    def wait(cls, linear: nn.Linear, mode: str) -> None:
        linear.__class__ = cls
        scale = torch.empty(linear.out_features, dtype=torch.float32, device="meta")
        linear.register_buffer("weight_scale", scale)
        linear.mode, linear.dtype = mode, linear.weight.dtype  # type: ignore[assignment]

    def stop_waiting(self) -> None:
        del self._buffers["weight_scale"], self.mode, self.dtype
        self.__class__ = nn.Linear  # type: ignore[assignment]


class _Quantize(_ConversionOps):  # type: ignore[misc]
    """Quantizes weights between the checkpoint and the model."""

    def __init__(self, quantizer: PyfastQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, **kwargs: Any
    ) -> dict[str, Tensor]:
        result = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            result[name] = value
            if not self.quantizer.param_needs_quantization(model, name):
                continue
            module, _ = _utils.get_module_from_name(model, name)
            if value.shape != module.weight.shape:  # for transformers to find
                self.quantizer.of_other_shape.add(name)
                continue
            result[name], result[f"{name}_scale"] = quantize_weight(name, value)
        return result


class PyfastQuantizer(_HfQuantizer):  # type: ignore[misc]
    """What transformers asks how to load a model; users meet it as ``model.hf_quantizer``.

    Attributes:
        report: a :class:`pyfast.quantization.QuantizationReport`.
    """

    requires_calibration = False
    quantized_element_size = 1
    report: QuantizationReport

    def __init__(self, quantization_config: PyfastConfig, **kwargs: Any) -> None:
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.of_other_shape: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._bytes_before = 0
        self._ignored: Any = None

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("PyfastConfig: device_map must not offload to the disk, got 'disk'")

    def get_quantize_ops(self) -> _Quantize:
        return _Quantize(self)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, name = _utils.get_module_from_name(model, param_name)
        return (
            name == "weight"
            and isinstance(module, _Awaiting)
            and param_name not in self.of_other_shape
        )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._bytes_before = num_bytes(model)
        config = self.quantization_config
        float32 = {
            *(model._keep_in_fp32_modules or ()),
            *(model._keep_in_fp32_modules_strict or ()),
        }
        skip = set(config.modules_to_not_convert or ())
        if config.modules_to_not_convert is None:
            modules = dict(model.named_modules())
            last = [name for name, _ in model.named_parameters()][-1].rpartition(".")[0]
            skip = {last, *self.get_modules_to_not_convert(model)} & modules.keys()
        tied = {
            key.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for key in pair
        }
        waiting = 0
        for path, module in model.named_modules():
            if isinstance(module, _Conv1D):
                self._reasons[path] = "transformers' Conv1D is no nn.Linear"
            elif not isinstance(module, nn.Linear):
                continue
            elif type(module) is not nn.Linear:
                self._reasons[path] = "a subclass of Linear: its forward may differ"
            elif path in tied:
                self._reasons[path] = "its weight is also that of another module"
            elif not _utils.should_convert_module(path, sorted(float32)):
                self._reasons[path] = "transformers keeps it in float32"
            elif not _utils.should_convert_module(path, sorted(skip)):
                self._reasons[path] = "left out by modules_to_not_convert"
            else:
                _Awaiting.wait(module, _MODES[config.name])
                waiting += 1
        if not waiting:
            first = {why: path for path, why in reversed(self._reasons.items())}
            found = "; ".join(f"{path} and its like: {why}" for why, path in first.items())
            raise ValueError(
                f"PyfastConfig: {type(model).__name__} must have an nn.Linear to quantize, got none"
                + (f" ({found})" if found else "")
            )
        config.modules_to_not_convert = sorted(skip | tied & self._reasons.keys())
        # Layers that stay floating point have no scale; _check_loaded asks for the others'.
        self._ignored = model._keys_to_ignore_on_load_missing
        model._keys_to_ignore_on_load_missing = {*(self._ignored or ()), r"\.weight_scale$"}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model._keys_to_ignore_on_load_missing = self._ignored
        kind = "int8 weights" if self.pre_quantized else "weights"
        entries = []
        for path, module in model.named_modules():
            source: type[nn.Module] = type(module)
            if isinstance(module, _Awaiting):
                module.stop_waiting()
                source, self._reasons[path] = nn.Linear, f"the checkpoint has no {kind} for it"
                self.quantization_config.modules_to_not_convert.append(path)
            elif source is Int8Linear:
                _check_loaded(path, module)
                entries.append(QuantizationEntry(path, nn.Linear, Int8Linear, ""))
                continue
            elif isinstance(module, nn.Linear) and module.weight.dtype == torch.int8:
                raise ValueError(
                    f"PyfastConfig: the checkpoint has int8 weights for {path}, which is left "
                    f"alone ({self._reasons.get(path)}): load it with the class that saved it"
                )
            if path in self._reasons:
                entries.append(QuantizationEntry(path, source, None, self._reasons[path]))
        self.report = QuantizationReport(entries, self._bytes_before, num_bytes(model))
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        dequantize_(model, dtype)
        return model


def _check_loaded(path: str, module: Any) -> None:
    # transformers marks what came from the checkpoint; dispatched over devices, tensors are copies,
    # without the mark.
    scale = module.weight_scale
    if not (getattr(scale, "_is_hf_initialized", False) or hasattr(module, "_hf_hook")):
        raise ValueError(
            f"PyfastConfig: the checkpoint has int8 weights for {path}, but no "
            f"{path}.weight_scale, without which they mean nothing"
        )


def register_quantizer() -> None:
    """Make ``"pyfast"`` known to transformers; importing this module does it. May be repeated.

    Raises:
        ValueError: if another package has the name; nothing is registered then.
    """
    ours: list[tuple[dict[str, type], type]] = [
        (_auto.AUTO_QUANTIZATION_CONFIG_MAPPING, PyfastConfig),
        (_auto.AUTO_QUANTIZER_MAPPING, PyfastQuantizer),
    ]
    for mapping, cls in ours:
        other = mapping.get(METHOD, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"pyfast.integrations.transformers: the quantization method {METHOD!r} of "
                f"transformers is taken by {other.__module__}.{other.__qualname__}"
            )
    for mapping, cls in ours:
        mapping[METHOD] = cls


register_quantizer()
