"""State dicts of other libraries, as quantized models of this one load them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TORCHAO_KEY = re.compile(
    r"(?P<module>(?:.*\.)?)_(?P<weight>\w*weight)_(?P<part>qdata|scale|zero_point|act_quant_scale"
    r"|act_quant_zero_point|act_pre_scale)"
)


def from_bitsandbytes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a model with ``Linear8bitLt`` layers, for Int8Linear.

    ``SCB`` is the absmax of a row, so that ``weight_scale = SCB / 127``; ``weight_format`` is
    dropped. Everything else stays.

    Args:
        state_dict: tensors by name.

    Raises:
        ValueError: for int8 weights without ``SCB`` or the other way around, shapes that do not
            fit, and weights whose format is not ``row``.
    """
    function = "from_bitsandbytes"
    result: dict[str, Any] = {}
    for key, value in state_dict.items():
        module, _, name = key.rpartition(".")
        prefix = f"{module}." if module else ""
        if name == "weight_format":
            if str(value.item() if isinstance(value, Tensor) else value) not in ("0", "row"):
                raise ValueError(f"{function}: {key!r} must be 0 (row), got {value}")
        elif name == "SCB":
            weight = state_dict.get(f"{prefix}weight")
            if weight is None or weight.dtype != torch.int8 or value.shape != weight.shape[:1]:
                got = "none" if weight is None else f"{tuple(weight.shape)} {weight.dtype}"
                raise ValueError(
                    f"{function}: {prefix}weight must be ({value.numel()}, in_features) int8, "
                    f"got {got}"
                )
            result[f"{prefix}weight_scale"] = value.to(torch.float32) / 127.0
        else:
            is_int8 = isinstance(value, Tensor) and value.dtype == torch.int8
            if is_int8 and name == "weight" and f"{prefix}SCB" not in state_dict:
                raise ValueError(f"{function}: {key!r} is int8, but there is no '{prefix}SCB'")
            result[key] = value
    return result


def _parts(value: Any) -> dict[str, Tensor | None] | None:
    """The tensors of a quantized weight; None for a tensor that is none."""
    if hasattr(value, "original_weight_tensor"):  # with dynamic quantization of inputs
        return _parts(value.original_weight_tensor)
    plain = getattr(value, "tensor_impl", value)
    values = getattr(plain, "qdata", None)
    if values is None:
        values = getattr(plain, "int_data", None)
    if values is None:
        return None
    names = ("scale", "zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")
    return {"qdata": values, **{name: getattr(plain, name, None) for name in names}}


def _row_scale(name: str, scale: Tensor, rows: int) -> Tensor:
    if scale.numel() not in (1, rows):
        raise ValueError(
            f"from_torchao: {name!r} must have a scale a row ({rows}) or one, "
            f"got {tuple(scale.shape)}"
        )
    return scale.detach().to(torch.float32).reshape(-1).expand(rows).contiguous()


def _converted(name: str, parts: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    values, scale = parts.get("qdata"), parts.get("scale")
    if values is None or scale is None or values.dtype != torch.int8 or values.dim() != 2:
        got = "none" if values is None else f"{tuple(values.shape)} {values.dtype}"
        raise ValueError(f"from_torchao: {name!r} must be an int8 matrix with scale, got {got}")
    for part in ("zero_point", "act_quant_zero_point"):
        zero = parts.get(part)
        if zero is not None and bool((zero != 0).any()):
            raise ValueError(f"from_torchao: {part} of {name!r} must be 0 (symmetric)")
    result = {
        name: values.detach(),
        f"{name}_scale": _row_scale(name, scale, values.shape[0]),
    }
    module = name.rpartition(".")[0]
    prefix = f"{module}." if module else ""
    input_scale, smooth = parts.get("act_quant_scale"), parts.get("act_pre_scale")
    if input_scale is not None:
        if input_scale.numel() != 1:
            raise ValueError(
                f"from_torchao: act_quant_scale of {name!r} must be one number, "
                f"got {tuple(input_scale.shape)}"
            )
        result[f"{prefix}input_scale"] = input_scale.detach().to(torch.float32).reshape(())
    if smooth is not None:
        size = values.shape[1]
        result[f"{prefix}smooth"] = (
            smooth.detach().to(torch.float32).reshape(-1).expand(size).contiguous()
        )
    return result


def from_torchao(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a model with torchao's row-wise int8 weights, for Int8Linear.

    Read by the names of attributes, without importing torchao: ``Int8Tensor`` (``qdata``,
    ``scale``; ``act_quant_scale`` becomes ``input_scale``, ``act_pre_scale`` becomes ``smooth``),
    the older ``AffineQuantizedTensor`` (``tensor_impl.int_data``), also inside of a
    ``LinearActivationQuantizedTensor``, and their tensors as torchao's safetensors files hold them
    (``linear._weight_qdata``). Scales become float32, one a row. Everything else stays.

    Args:
        state_dict: tensors by name.

    Raises:
        ValueError: for weights that are asymmetric, have groups, or are not int8 matrices.
    """
    result: dict[str, Any] = {}
    flat: dict[str, dict[str, Tensor | None]] = {}
    for key, value in state_dict.items():
        match = _TORCHAO_KEY.fullmatch(key)
        if match:
            parts = flat.setdefault(match["module"] + match["weight"], {})
            parts[match["part"]] = value
            continue
        found = _parts(value)
        if found is None:
            result[key] = value
        else:
            result.update(_converted(key, found))
    for name, parts in flat.items():
        result.update(_converted(name, parts))
    return result
