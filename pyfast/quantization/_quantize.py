"""``quantize_`` and back: the modules of a model change their class, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import nn as fast
from .._patch import _find
from ..nn import Int8Conv1d, Int8Conv2d, Int8Embedding, Int8Linear, Int8MultiheadAttention
from ._configs import (
    Config,
    Int8QAT,
    Int8StaticActivationInt8Weight,
    Int8WeightOnly,
    SmoothQuant,
)
from ._qat import Int8QATLinear
from ._replace import INT8, LINEARS, assume, set_fast_paths
from ._report import QuantizationEntry, QuantizationReport, num_bytes
from ._smooth import Fold, plan_folds, smoothing_factors

_CONVS: dict[type[nn.Module], Any] = {nn.Conv1d: Int8Conv1d, nn.Conv2d: Int8Conv2d}
_ATTENTIONS = (nn.MultiheadAttention, fast.MultiheadAttention)
_KINDS = (*LINEARS, nn.Embedding, *_CONVS, *_ATTENTIONS)
_Filter = Callable[[nn.Module, str], bool]


class _Found:
    """The modules of a model, each once, with all their paths."""

    def __init__(self, function: str, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            what = (
                f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
            )
            raise TypeError(f"{function}: model must be a torch.nn.Module, got {what}")
        self.model = model
        self.bytes_before = num_bytes(model)
        self.modules: dict[int, nn.Module] = {}
        self.paths: dict[int, list[str]] = {}
        for path, module in _find(model):
            self.modules[id(module)] = module
            self.paths.setdefault(id(module), []).append(path)

    def fqn(self, module: nn.Module) -> str:
        return self.paths[id(module)][0].replace("(root)", "")

    def name(self, module: nn.Module) -> str:
        return ", ".join(self.paths[id(module)])

    def report(
        self, changes: dict[int, nn.Module], reasons: dict[int, str], folds: Iterable[Fold] = ()
    ) -> QuantizationReport:
        """Assign what was planned, which cannot fail, and tell."""
        sources = {key: type(module) for key, module in self.modules.items()}
        for key, new in changes.items():
            assume(self.modules[key], new)
        for fold in folds:
            for name, value in fold.parameters.items():
                getattr(fold.norm, name).data.copy_(value)
            reasons[id(fold.norm)] = "its weights were divided by the factors of SmoothQuant"
        for module in set_fast_paths(self.model):
            reasons[id(module)] = "torch's fast path, which does not call its layers, is off"
        entries = [
            QuantizationEntry(
                self.name(module),
                sources[key],
                type(module) if key in changes else None,
                reasons.get(key, ""),
            )
            for key, module in self.modules.items()
            if key in changes or key in reasons
        ]
        return QuantizationReport(entries, self.bytes_before, num_bytes(self.model))


def _kind_reason(module: nn.Module, config: Config) -> str | None:
    """Why a module of this kind is left alone: empty if not, None if it needs no mention."""
    kind = type(module)
    if kind is NonDynamicallyQuantizableLinear:
        return None  # a part of MultiheadAttention
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule: its code, and that of the modules in it, is compiled already"
    if isinstance(module, INT8):
        return "already int8"
    if kind is Int8QATLinear:
        return "prepared for training: convert makes it int8"
    if kind not in _KINDS:
        base = next((base for base in _KINDS if isinstance(module, base)), None)
        return None if base is None else f"a subclass of {base.__name__}: its forward may differ"
    if "forward" in module.__dict__:
        return "its forward is overridden on the instance"
    if isinstance(config, Int8QAT):
        return "" if kind in LINEARS else "Int8QAT prepares Linear alone"
    if kind is nn.Embedding and not config.embeddings:
        return "embeddings are quantized where the configuration says embeddings=True"
    if kind in _CONVS and not isinstance(config, Int8WeightOnly):
        return "convolutions are quantized by Int8WeightOnly alone"
    return ""


def _weights(module: nn.Module) -> dict[str, Any]:
    """By name; None for what is no parameter of the module."""
    if not isinstance(module, nn.MultiheadAttention):
        return {"weight": module._parameters.get("weight")}
    names: tuple[str, ...] = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    if module._qkv_same_embed_dim:
        names = ("in_proj_weight",)
    weights: dict[str, Any] = {name: module._parameters.get(name) for name in names}
    return {**weights, "out_proj.weight": module.out_proj._parameters.get("weight")}


def _weight_reason(module: nn.Module) -> str:
    """Why a module is left alone for what its weights are."""
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm changes its weights in every forward"
    if isinstance(module, nn.MultiheadAttention):
        out_proj = type(module.out_proj)
        if out_proj is not NonDynamicallyQuantizableLinear:
            return f"its out_proj is a {out_proj.__name__}"
    for name, weight in _weights(module).items():
        if weight is None:
            return f"its {name} is not a parameter"
        if type(weight) is not nn.Parameter:
            return f"its {name} is a {type(weight).__name__}: quantize before it is wrapped"
    return ""


def _break_ties(found: _Found, chosen: dict[int, nn.Module], can_share: bool) -> dict[int, str]:
    """Reasons to leave modules alone: their weight has another user that would not see it int8."""
    holders: dict[int, list[nn.Module]] = {}
    for module in found.modules.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(module)
    reasons = {}
    for key, module in chosen.items():
        for weight in _weights(module).values():
            users = holders[id(weight)]
            if len(users) == 1:
                continue
            if can_share and all(
                id(user) in chosen and type(user) in (*LINEARS, nn.Embedding) for user in users
            ):
                continue
            others = ", ".join(found.name(user) for user in users if user is not module)
            reasons[key] = f"its weight is also that of {others}"
    return reasons


def _choose(
    found: _Found, config: Config, filter_fn: _Filter | None
) -> tuple[dict[int, nn.Module], dict[int, str]]:
    """The modules to change, and why others are not."""
    chosen, reasons = {}, {}
    for key, module in found.modules.items():
        reason = _kind_reason(module, config)
        if reason == "" and filter_fn is not None and not filter_fn(module, found.fqn(module)):
            reason = "left out by filter_fn"
        if reason == "":
            reason = _weight_reason(module)
        if reason == "":
            chosen[key] = module
        elif reason is not None:
            reasons[key] = reason
    ties = _break_ties(found, chosen, not isinstance(config, (SmoothQuant, Int8QAT)))
    return {key: m for key, m in chosen.items() if key not in ties}, {**reasons, **ties}


def _input_range(found: _Found, module: nn.Module, config: Any) -> Any:
    for path in found.paths[id(module)]:
        path = path.replace("(root)", "")
        if path in config.calibration.inputs:
            return config.calibration.inputs[path]
    raise ValueError(
        f"quantize_: calibration must have the input of {found.name(module)!r}, which no batch "
        "reached: leave it out by filter_fn, or calibrate with other batches"
    )


def _new_linear(found: _Found, linear: nn.Linear, config: Any, fold: Fold | None) -> nn.Module:
    name = f"quantize_: {found.fqn(linear)}.weight"
    if isinstance(config, Int8QAT):
        size = (linear.in_features, linear.out_features, linear.bias is not None)
        prepared = Int8QATLinear(*size, device="meta")
        prepared.weight, prepared.bias = linear.weight, linear.bias
        prepared.quantize_input = config.quantize_input
        return prepared
    options: dict[str, Any] = {}
    device = linear.weight.device
    if isinstance(config, Int8StaticActivationInt8Weight):
        limit = torch.tensor(_input_range(found, linear, config).limit, dtype=torch.float32)
        options["input_scale"] = torch.where(limit > 0, limit / 127.0, 1.0).to(device)
    if isinstance(config, SmoothQuant):
        if fold is None:
            absmax = _input_range(found, linear, config).channel_absmax
            factors = smoothing_factors(absmax, [linear.weight], config.alpha)
        else:
            factors = fold.factors
        options["smooth"] = 1.0 / factors
    new = Int8Linear.from_linear(linear, config.mode, name=name, **options)
    if fold is not None:
        new.smooth = None
    return new


def _new(found: _Found, module: nn.Module, config: Any, fold: Fold | None) -> nn.Module:
    name = f"quantize_: {found.fqn(module)}.weight"
    if isinstance(module, nn.Linear):
        return _new_linear(found, module, config, fold)
    if isinstance(module, nn.Embedding):
        return Int8Embedding.from_embedding(module, name=name)
    if isinstance(module, nn.MultiheadAttention):
        mode = "weight_only" if config.mode == "weight_only" else "dynamic"
        prefix = name.removesuffix("weight")
        return Int8MultiheadAttention.from_attention(module, mode, name=prefix)
    new: nn.Module = _CONVS[type(module)].from_conv(module, name=name)
    return new


def quantize_(
    model: nn.Module, config: Config, filter_fn: _Filter | None = None
) -> QuantizationReport:
    """Quantize the weights of a model to int8, in place.

    What is replaced, by pyfast.nn's class of the same name with ``Int8`` before it:
    ``torch.nn.Linear``, ``MultiheadAttention`` (torch's and pyfast's); with :class:`Int8WeightOnly`
    ``Conv1d`` and ``Conv2d``; where the configuration says ``embeddings=True``, ``Embedding``.
    torch's fast paths of TransformerEncoder and TransformerEncoderLayer, which read weights without
    calling the layers, are turned off around them; call this on the whole model, so that they are
    found.

    What stays: every module object, its hooks, training flag, bias and attributes, and what is
    tied: modules that share a weight share it in int8 if all of them are quantized, and are left
    alone otherwise. Weights are new parameters without gradient: make optimizers afterwards. Both
    copies of the weights exist until all are converted. Weights on the meta device stay there, for
    a checkpoint to be loaded with ``assign=True``.

    Left alone, and reported with the reason: subclasses, modules whose ``forward`` is overridden on
    the instance or whose weight is no plain parameter (parametrized, sharded), and ScriptModules
    with all that is in them. Code that reads ``module.weight`` to compute with it sees int8.

    Args:
        model: the model; changed itself if it is an instance of one of these classes.
        config: :class:`Int8WeightOnly`, :class:`Int8DynamicActivationInt8Weight`,
            :class:`Int8StaticActivationInt8Weight`, :class:`SmoothQuant` or :class:`Int8QAT`.
        filter_fn: called with each such module and its path; False leaves it alone.

    Returns:
        A :class:`QuantizationReport`: ``print`` it, or iterate over it.

    Raises:
        TypeError: if ``model`` is no module, or ``config`` no configuration.
        ValueError: for weights that are empty, hold NaN or Inf, or are not floating point, layers
            that were not calibrated, and a ``fold`` that is none. The model is then unchanged.
    """
    found = _Found("quantize_", model)
    if not isinstance(config, Config):
        what = f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
        raise TypeError(f"quantize_: config must be a configuration of quantization, got {what}")
    chosen, reasons = _choose(found, config, filter_fn)
    folds: dict[int, Fold] = {}
    if isinstance(config, SmoothQuant):
        by_path = {p.replace("(root)", ""): m for k, m in chosen.items() for p in found.paths[k]}
        folds = plan_folds(model, config, by_path)
    changes: dict[int, nn.Module] = {}
    shared: dict[int, Any] = {}
    for key, module in chosen.items():
        new: Any = _new(found, module, config, folds.get(key))
        if isinstance(module, (nn.Linear, nn.Embedding)) and not isinstance(config, Int8QAT):
            new.weight = shared.setdefault(id(module.weight), new.weight)
        if isinstance(new, Int8MultiheadAttention) and new.mode != config.mode:  # type: ignore[union-attr]
            reasons[key] = "dynamic: its inputs are not calibrated"
        elif isinstance(new, Int8MultiheadAttention) and isinstance(config, SmoothQuant):
            reasons[key] = "without smoothing: its inputs are not calibrated"
        changes[key] = new
    return found.report(changes, reasons, {id(f.norm): f for f in folds.values()}.values())


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> QuantizationReport:
    """Undo :func:`quantize_`: torch's modules with the weights that the int8 ones stand for.

    The rounding stays, and so do norms that SmoothQuant was folded into. Weights are new parameters
    that need a gradient; those that were tied are tied. Layers that Int8QAT has prepared become
    Linear again, with their weights as they are.

    Args:
        model: a model with modules of int8 weights.
        dtype: of weights and biases. Default: that before, changed as the model was since

    Returns:
        A :class:`QuantizationReport`.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: for a layer with a fused activation. The model is then unchanged.
    """
    found = _Found("dequantize_", model)
    inside = {
        id(m.out_proj) for m in found.modules.values() if isinstance(m, Int8MultiheadAttention)
    }
    changes: dict[int, nn.Module] = {}
    shared: dict[int, Any] = {}
    for key, module in found.modules.items():
        if key in inside:
            continue
        if type(module) is Int8QATLinear:
            size = (module.in_features, module.out_features, module.bias is not None)
            linear = nn.Linear(*size, device="meta")
            linear.weight, linear.bias = module.weight, module.bias
            changes[key] = linear
        elif type(module) in INT8:
            source: Any = module
            new = changes[key] = source.dequantize(dtype)
            if (
                isinstance(new, (nn.Linear, nn.Embedding))
                and getattr(module, "smooth", None) is None
            ):
                new.weight = shared.setdefault(id(module.weight), new.weight)
    return found.report(changes, {})


def convert(model: nn.Module) -> QuantizationReport:
    """Make the layers that :class:`Int8QAT` has prepared int8, with the values they computed with.

    Args:
        model: after training.

    Returns:
        A :class:`QuantizationReport`.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if there is nothing to convert, or a weight is not finite. The model is then
            unchanged.
    """
    found = _Found("convert", model)
    prepared = {k: m for k, m in found.modules.items() if type(m) is Int8QATLinear}
    if not prepared:
        raise ValueError("convert: model must have layers that Int8QAT has prepared, got none")
    ties = _break_ties(found, prepared, False)  # type: ignore[arg-type]
    changes: dict[int, nn.Module] = {
        key: Int8Linear.from_linear(
            linear, linear.mode, name=f"convert: {found.fqn(linear)}.weight"
        )
        for key, linear in prepared.items()
        if key not in ties
    }
    return found.report(changes, ties)
