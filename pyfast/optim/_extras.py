"""The keyword-only extras of pyfast's optimizers: their checks, and the states that they need."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from .. import _random
from ..kernels.optimizer_step.optimizer_step_reference import (
    BLOCK_SIZE,
    decode_int8,
    encode_int8,
    is_signed_state,
)
from ..ops.optimizer_step import Flag
from ._distributed import is_dtensor

DEFAULTS: dict[str, Any] = {
    "max_grad_norm": None,
    "ema_decay": None,
    "l1": 0.0,
    "l1_mode": "coupled",
    "state_dtype": None,
    "master_weights": False,
    "stochastic_rounding": False,
    "seed": None,
    "zero_grads": False,
}
STATE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.uint8,
}
_STORAGE = ("state_dtype", "master_weights")  # of the optimizer, not of a checkpoint


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


_RULES: dict[str, tuple[str, Any]] = {
    "max_grad_norm": (
        "None or a number of at least 0",
        lambda v: v is None or (_is_number(v) and v >= 0),
    ),
    "ema_decay": (
        "None or a number in [0, 1]",
        lambda v: v is None or (_is_number(v) and 0 <= v <= 1),
    ),
    "l1": ("a number of at least 0", lambda v: _is_number(v) and 0 <= v < math.inf),
    "l1_mode": ("'coupled' or 'decoupled'", lambda v: v in ("coupled", "decoupled")),
    "state_dtype": (
        "None, 'float32', 'bfloat16' or 'int8'",
        lambda v: v is None or (isinstance(v, str) and v in STATE_DTYPES),
    ),
    "master_weights": ("a bool", lambda v: isinstance(v, bool)),
    "stochastic_rounding": ("a bool", lambda v: isinstance(v, bool)),
    "seed": (
        "None or an int",
        lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool)),
    ),
    "zero_grads": ("a bool", lambda v: isinstance(v, bool)),
}


def checked(optimizer: str, extras: dict[str, Any]) -> dict[str, Any]:
    """The extras that differ from their defaults; ValueError, or TypeError for an unknown one."""
    for name, value in extras.items():
        if name not in DEFAULTS:
            raise TypeError(
                f"{optimizer}.__init__() got an unexpected keyword argument {name!r}; pyfast adds "
                f"{', '.join(DEFAULTS)} to torch's arguments"
            )
        expected, is_valid = _RULES[name]
        if not is_valid(value):
            raise ValueError(f"{optimizer}: {name} must be {expected}, got {value!r}")
    return {name: value for name, value in extras.items() if value != DEFAULTS[name]}


def check_values(optimizer: str, group: dict[str, Any]) -> None:
    """ValueError for a wrong extra in a group."""
    checked(optimizer, {name: group[name] for name in DEFAULTS if name in group})


def check_group(optimizer: str, group: dict[str, Any]) -> None:
    """ValueError for extras that do not go together, or with the parameters."""
    state_dtype, rounding = group.get("state_dtype"), group.get("stochastic_rounding", False)
    if rounding and group.get("master_weights"):
        raise ValueError(
            f"{optimizer}: master_weights must be False with stochastic_rounding, got True"
        )
    if state_dtype == "int8" and group.get("centered"):
        raise ValueError(
            f"{optimizer}: state_dtype must not be 'int8' with centered=True, whose variance is a "
            "difference that codes of eight bits do not carry, got 'int8'"
        )
    for p in group["params"]:
        if p.dtype == torch.float64 and state_dtype in ("bfloat16", "int8"):
            raise ValueError(
                f"{optimizer}: state_dtype must be None or 'float32' for float64 parameters, whose "
                f"states are float64, got {state_dtype!r}"
            )
        if p.dtype == torch.float16 and rounding:
            raise ValueError(
                f"{optimizer}: stochastic_rounding must be False for float16 parameters "
                "(it rounds bfloat16), got True"
            )
        if state_dtype == "int8" and is_dtensor(p):
            raise ValueError(
                f"{optimizer}: state_dtype must not be 'int8' for DTensor parameters, got 'int8'"
            )


def new_seed() -> int:
    return int(_random.buffer.tensor.random_().item())


def refuse(optimizer: str, group: dict[str, Any]) -> None:
    """NotImplementedError for extras in a group that torch's own code steps."""
    for name, default in DEFAULTS.items():
        if name != "seed" and group.get(name, default) != default:
            raise NotImplementedError(
                f"{optimizer}: {name} must be {default!r} for complex parameters, sparse "
                "gradients, parameters that are given twice and differentiable=True, which "
                f"torch's own code steps, got {group[name]!r}"
            )


def flags(group: dict[str, Any]) -> int:
    """The flags of the step that extras set."""
    found = Flag(0)
    if group.get("l1_mode") == "decoupled":
        found |= Flag.DECOUPLED_L1
    if group.get("stochastic_rounding"):
        found |= Flag.STOCHASTIC_ROUNDING
    if group.get("zero_grads"):
        found |= Flag.ZERO_GRADIENT
    return int(found)


def state_dtype(p: Tensor, group: dict[str, Any]) -> torch.dtype:
    name = group.get("state_dtype")
    if name is None or p.dtype == torch.float64:
        return p.dtype
    return STATE_DTYPES[name]


def new_state(p: Tensor, group: dict[str, Any], kind: int) -> Tensor | None:
    """A state as it is before the first step; ``kind`` is its place in ``Group.names``. None where
    the parameter needs none."""
    if kind == 0:
        # Where and as what torch keeps it.
        on_device = group.get("capturable") or group.get("fused")
        is_double = torch.get_default_dtype() == torch.float64 and not group.get("fused")
        dtype = torch.float64 if is_double else torch.float32
        return torch.zeros((), dtype=dtype, device=p.device if on_device else "cpu")
    if kind < 4:
        dtype = state_dtype(p, group)
        layout = torch.contiguous_format if dtype == torch.uint8 else torch.preserve_format
        return torch.zeros_like(p, dtype=dtype, memory_format=layout, requires_grad=False)
    if kind < 7:
        return torch.zeros(-(-p.numel() // BLOCK_SIZE), dtype=torch.float32, device=p.device)
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    if kind == 7:
        return p.detach().to(wide, copy=True)
    if kind == 8 and p.dtype == torch.bfloat16:
        return torch.zeros_like(p, dtype=torch.int16, requires_grad=False)
    if kind == 9 and p.dtype == torch.float16:
        return p.detach().to(torch.float32, copy=True)
    return None


def restore(optimizer: Any, loading: dict[str, Any]) -> None:
    """After torch has loaded a state_dict: extras that it lacks, and dtypes that torch has cast."""
    saved = loading["state_dict"]
    saved_groups = saved["param_groups"]
    for group, before, saved_group in zip(
        optimizer.param_groups, loading["extras"], saved_groups, strict=True
    ):
        for name in _STORAGE:
            group.pop(name, None)
            if name in before:
                group[name] = before[name]
        for name, value in before.items():
            group.setdefault(name, value)
        names = optimizer._state_names(group)
        for key, p in zip(saved_group["params"], group["params"], strict=True):
            if key in saved["state"]:
                _restore_state(optimizer, group, names, p, saved["state"][key])


def _restore_state(
    optimizer: Any,
    group: dict[str, Any],
    names: tuple[str | None, ...],
    p: Tensor,
    saved: dict[str, Any],
) -> None:
    state = optimizer.state[p]
    step = state.get("step")
    if isinstance(step, Tensor) and step.dtype not in (torch.float32, torch.float64):
        state["step"] = step.float()
    for name in ("ema", "master", "remainder"):
        if isinstance(saved.get(name), Tensor):
            state[name] = saved[name].detach().to(p.device, copy=True)
    for i, key in enumerate(names):
        name = key or ""
        if not isinstance(value := saved.get(name), Tensor):
            continue
        is_signed, scale = is_signed_state(optimizer._rule, i), saved.get(f"{name}_scale")
        dtype = state_dtype(p, group)
        state.pop(f"{name}_scale", None)
        if value.dtype == dtype and dtype != torch.uint8:
            state[name] = _like(p, value, dtype)
        elif value.dtype == torch.uint8 and scale is not None and dtype == torch.uint8:
            state[name] = value.detach().to(p.device, copy=True).contiguous()
            state[f"{name}_scale"] = scale.detach().to(p.device, copy=True)
        else:
            if value.dtype == torch.uint8 and scale is not None:
                value = decode_int8(value, scale, is_signed)
            if dtype == torch.uint8:
                codes, scales = encode_int8(value.to(p.device, torch.float32), is_signed, 0)
                state[name], state[f"{name}_scale"] = codes.contiguous(), scales
            else:
                state[name] = _like(p, value, dtype)


def _like(p: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in the memory layout of the parameter."""
    value = value.detach().to(p.device, dtype, copy=True)
    if is_dtensor(p) or value.shape != p.shape or value.stride() == p.stride():
        return value
    return torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(value)
