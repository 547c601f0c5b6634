"""Modules become what other modules are, in place."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import (
    Int8Conv1d,
    Int8Conv2d,
    Int8Embedding,
    Int8Linear,
    Int8MultiheadAttention,
    Linear,
    RMSNorm,
)
from ._qat import Int8QATLinear

INT8 = (Int8Conv1d, Int8Conv2d, Int8Embedding, Int8Linear, Int8MultiheadAttention)
LINEARS = (nn.Linear, Linear)
NORMS = (nn.LayerNorm, nn.RMSNorm, RMSNorm)
_SWITCHES = {  # of torch's fast paths, which read the weights of layers without calling them
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
_SAVED = "_fast_path_before_quantization"


def assume(module: nn.Module, other: nn.Module) -> None:
    """Make ``module`` what ``other`` is: its class, tensors and options.

    The object stays, with its hooks, and with what users have added to it.
    """
    source: Any = type(module)
    for name in (*getattr(source, "SCALES", ()), *getattr(source, "OPTIONS", ())):
        module._buffers.pop(name, None)
        module.__dict__.pop(name, None)
    module.__class__ = type(other)
    module._parameters.update(other._parameters)
    module._buffers.update(other._buffers)
    for name in getattr(other, "OPTIONS", ()):
        if name in other.__dict__:
            module.__dict__[name] = other.__dict__[name]
    for name, child in other.named_children():
        assume(getattr(module, name), child)


def set_fast_paths(model: nn.Module) -> list[nn.Module]:
    """Turn torch's fast paths off around layers that are quantized, and on again where none is.

    Returns:
        The modules whose fast path is off and was on.
    """
    turned_off = []
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            if not isinstance(module, kind):
                continue
            members = module.__dict__
            if any(isinstance(m, (*INT8, Int8QATLinear)) for m in module.modules()):
                if members.get(switch):
                    members[_SAVED] = members[switch]
                    members[switch] = type(members[switch])(False)
                    turned_off.append(module)
            elif _SAVED in members:
                members[switch] = members.pop(_SAVED)
    return turned_off
