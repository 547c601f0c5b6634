"""``pyfast.patch``: swap the modules of a model in place.

A swap assigns ``module.__class__``: pyfast's modules are subclasses of torch's with the same
attributes, so the module object stays, and with it its hooks, its parameters, and every reference
that a parent or an optimizer holds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import nn
from ._patch_notes import notes_on
from ._patch_optimizer import _scheduled_step, patch_optimizer

if TYPE_CHECKING:
    from .quantization import QuantizationReport
    from .quantization._configs import Config

_REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Dropout: nn.Dropout,
    torch.nn.Dropout1d: nn.Dropout1d,
    torch.nn.Dropout2d: nn.Dropout2d,
    torch.nn.Dropout3d: nn.Dropout3d,
    torch.nn.AlphaDropout: nn.AlphaDropout,
    torch.nn.FeatureAlphaDropout: nn.FeatureAlphaDropout,
    torch.nn.CrossEntropyLoss: nn.CrossEntropyLoss,
    torch.nn.RMSNorm: nn.RMSNorm,
    torch.nn.MultiheadAttention: nn.MultiheadAttention,
    torch.nn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: nn.TransformerDecoderLayer,
}


def _replacements(
    kinds: set[type[torch.nn.Module]], linear: bool
) -> dict[type[torch.nn.Module], type[torch.nn.Module]]:
    """With those of transformers, where models of it can be there.

    Args:
        kinds: the classes in the model.
    """
    replacements = dict(_REPLACEMENTS)
    if linear:
        replacements[torch.nn.Linear] = nn.Linear
    if "transformers.activations" in sys.modules:
        from .integrations._transformers_activations import REPLACEMENTS

        replacements |= REPLACEMENTS
    if "transformers.modeling_utils" in sys.modules:
        from .integrations._transformers_norms import replacements as norms

        replacements |= norms(kinds)
    return replacements


def _transformers_loss() -> Any:
    from .integrations import _transformers_loss as module

    return module


@dataclass(frozen=True)
class PatchEntry:
    """What happened to one module.

    Attributes:
        path: where the module is in the model, ``"(root)"`` for the model itself; all places of a
            shared module, separated by ``", "``.
        source: the module's class before the patch.
        target: the class it was given; None where it was not swapped.
        reason: why it was not swapped; empty where it was.
    """

    path: str
    source: type[torch.nn.Module]
    target: type[torch.nn.Module] | None
    reason: str
    _module: torch.nn.Module = field(repr=False, compare=False)


@dataclass(repr=False)
class PatchReport:
    """What :func:`patch` did, one entry for each module it knows; ``print`` shows it as a table.

    Attributes:
        entries: in the order of ``model.named_modules()``.
        dry_run: True where nothing was changed, and the entries say what would be.
        notes: what patch cannot replace in this model, and what would, in words.
        int8: the report of :func:`pyfast.quantization.quantize_`, where that was asked for.
        optimizer: the classes of the optimizer before and after, where one was given.
        losses: the models of transformers whose loss is pyfast's.
    """

    entries: list[PatchEntry]
    dry_run: bool = False
    notes: list[str] = field(default_factory=list)
    int8: QuantizationReport | None = None
    optimizer: tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer]] | None = None
    losses: list[torch.nn.Module] = field(default_factory=list)
    _optimizer: torch.optim.Optimizer | None = field(default=None, repr=False)
    _undone: bool = field(default=False, init=False)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[PatchEntry]:
        return iter(self.entries)

    @property
    def swapped(self) -> list[PatchEntry]:
        """The entries of the modules that were swapped (in a dry run: that would be)."""
        return [entry for entry in self.entries if entry.target is not None]

    @property
    def skipped(self) -> list[PatchEntry]:
        """The entries of the modules that were left alone; each has a ``reason``."""
        return [entry for entry in self.entries if entry.target is None]

    def undo(self) -> None:
        """Give every swapped module, and the optimizer, its former class back.

        What was changed again since the patch is left alone, and int8 weights stay: they do not
        hold what they were made from (:func:`pyfast.quantization.dequantize_` gives what they
        stand for). Only the first call does anything, and none does after a dry run.
        """
        if self.dry_run or self._undone:
            return
        self._undone = True
        for entry in self.swapped:
            if type(entry._module) is entry.target:
                entry._module.__class__ = entry.source
        for model in self.losses:
            _transformers_loss().restore(model)
        if self._optimizer is not None and self.optimizer is not None:
            _unpatch_optimizer(self._optimizer, *self.optimizer)

    def __repr__(self) -> str:
        return f"<PatchReport: {len(self.swapped)} swapped, {len(self.skipped)} skipped>"

    def __str__(self) -> str:
        parts = [self._table()]
        if self.losses:
            verb = "would be" if self.dry_run else "is"
            names = ", ".join(type(model).__name__ for model in self.losses)
            parts.append(f"the loss of {names} {verb} pyfast.nn.functional.cross_entropy")
        if self.int8 is not None:
            parts.append(str(self.int8))
        if self.optimizer is not None:
            source, target = (f"{kind.__module__}.{kind.__qualname__}" for kind in self.optimizer)
            parts.append(f"the optimizer: {source} to {target}")
        return "\n".join([*parts, *(f"note: {note}" for note in self.notes)])

    def _table(self) -> str:
        if not self.entries:
            return "pyfast.patch: the model has no module that pyfast replaces"
        rows = [("module", "from", "to, or why not")]
        for entry in self:
            to = class_name(entry.target) if entry.target is not None else entry.reason
            rows.append((entry.path, class_name(entry.source), to))
        width, source_width = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [f"{path:{width}}  {source:{source_width}}  {to}" for path, source, to in rows]
        verb = "would be swapped" if self.dry_run else "swapped"
        return "\n".join([*lines, f"{len(self.swapped)} of {len(self)} modules {verb}"])


def class_name(kind: type[torch.nn.Module]) -> str:
    """The name as users write it: torch.nn and pyfast.nn export what their submodules define."""
    for package in (torch.nn, nn):
        if vars(package).get(kind.__name__) is kind:
            return f"{package.__name__}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def _find(
    module: torch.nn.Module, path: str = "", above: frozenset[int] = frozenset()
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every path of the model with its module. Stops at ScriptModules and at cycles."""
    yield path or "(root)", module
    if isinstance(module, torch.jit.ScriptModule) or id(module) in above:
        return
    for name, child in module._modules.items():
        if child is not None:
            yield from _find(child, f"{path}.{name}" if path else name, above | {id(module)})


def _why_skipped(
    module: torch.nn.Module, replacements: dict[type[torch.nn.Module], type[torch.nn.Module]]
) -> str | None:
    """Why a module is left alone: empty if it is not, None if it needs no mention."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule: its code, and that of the modules in it, is compiled already"
    if kind in replacements:
        return "its forward is overridden on the instance" if "forward" in module.__dict__ else ""
    if kind in replacements.values():
        return "already pyfast's"
    if kind is NonDynamicallyQuantizableLinear:
        return None  # a part of MultiheadAttention
    for known in replacements:
        if isinstance(module, known):
            return f"a subclass of {known.__name__}: its forward may differ"
    return None


def _unpatch_optimizer(
    optimizer: torch.optim.Optimizer,
    source: type[torch.optim.Optimizer],
    target: type[torch.optim.Optimizer],
) -> None:
    step = vars(optimizer).get("step")
    if type(optimizer) is not target or not (step is None or hasattr(step, "_wrapped_by_lr_sched")):
        return  # changed since
    optimizer.__class__ = source
    optimizer._patch_step_function()
    if step is not None:
        optimizer.step = _scheduled_step(optimizer)  # type: ignore[method-assign]


def _plan_int8(model: torch.nn.Module, config: Config) -> str:
    from .quantization._quantize import _choose, _Found

    found = _Found("patch", model)
    chosen, _ = _choose(found, config, None)
    names = ", ".join(found.name(module) for module in chosen.values())
    return f"int8: {len(chosen)} modules would be quantized" + (f": {names}" if names else "")


def _check(
    model: torch.nn.Module, int8: Config | None, optimizer: torch.optim.Optimizer | None
) -> None:
    if not isinstance(model, torch.nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"patch: model must be a torch.nn.Module, got {what}")
    if int8 is None:
        return
    from .quantization._configs import Config

    if not isinstance(int8, Config):
        what = f"the class {int8.__name__}" if isinstance(int8, type) else type(int8).__name__
        raise TypeError(f"patch: int8 must be a configuration of pyfast.quantization, got {what}")
    if optimizer is not None:
        raise ValueError(
            "patch: int8 and optimizer must not be given together: quantizing replaces the "
            "parameters that the optimizer holds"
        )


def patch(
    model: torch.nn.Module,
    dry_run: bool = False,
    *,
    linear: bool = False,
    int8: Config | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> PatchReport:
    """Make a model use pyfast: swap the modules that pyfast replaces, in place.

    What is replaced, by pyfast.nn's class of the same name: ``torch.nn.Dropout``, ``Dropout1d``,
    ``Dropout2d``, ``Dropout3d``, ``AlphaDropout``, ``FeatureAlphaDropout``, ``CrossEntropyLoss``,
    ``RMSNorm``, ``MultiheadAttention``, ``TransformerEncoderLayer`` and
    ``TransformerDecoderLayer``; ``torch.nn.Transformer``, ``TransformerEncoder`` and
    ``TransformerDecoder`` stay, with their layers replaced. Of transformers: "gelu_new" and
    "gelu_fast", which torch computes in one operation, every class with the code of the RMSNorm of
    Llama, OLMo 2, T5 or Gemma (:func:`pyfast.nn.functional.rms_norm`; 177 classes of version 5.24),
    and the loss of causal language models (:func:`pyfast.nn.functional.cross_entropy`).
    Evaluation gives the same numbers as before: dropout to the bit, all else up to rounding. In
    training the masks are other ones of the same distribution; see
    :func:`pyfast.nn.functional.dropout` and
    :func:`pyfast.nn.functional.multi_head_attention_forward` for the differences.

    What stays: every module object (the root too, so nothing needs to be reassigned), its hooks,
    training flag, parameters and buffers, the ``state_dict``, shared modules, and optimizers made
    before the call. Copies and pickles of a patched model are patched; unpickling one needs
    pyfast. A compiled model is patched inside, and compiles again on its next call. The device
    does not matter, and may be the meta device.

    What is left alone, and reported with the reason: subclasses of these classes, modules whose
    ``forward`` is overridden on the instance, modules that are pyfast's already, and ScriptModules
    with all that is in them. Modules of other types are not listed. Attention and dropout that a
    ``forward`` calls as functions are not replaced: the report names those that a search of the
    source of the model's classes finds (calls by way of other functions it does not), and
    :func:`pyfast.activate` reaches them.

    Args:
        model: the model; swapped itself if it is an instance of one of these classes.
        dry_run: change nothing, report what would be. Default: ``False``
        linear: also replace ``torch.nn.Linear``, for a model that decodes on the CPU: layers of few
            tokens run at the memory's speed (:func:`pyfast.nn.functional.linear`). Default:
            ``False``
        int8: also quantize the model: :func:`pyfast.quantization.quantize_` with this
            configuration, for a model that is deployed. ``undo()`` does not bring the weights back.
        optimizer: also make this optimizer of the model pyfast's, for one that is trained:
            :func:`pyfast.patch_optimizer`.

    Returns:
        A :class:`PatchReport`: ``print`` it, iterate over it, or call its ``undo()``. It holds
        references to the modules it lists, and to the optimizer. A model without anything to
        replace is no error: the report is empty, and says so.

    Raises:
        TypeError: if ``model`` is not a ``torch.nn.Module``, ``int8`` no configuration, or
            ``optimizer`` not one that pyfast replaces.
        ValueError: if ``int8`` and ``optimizer`` are given together, or one of them cannot be
            served. Nothing is changed then.
    """
    _check(model, int8, optimizer)
    modules: dict[int, torch.nn.Module] = {}
    paths: dict[int, list[str]] = {}
    for path, module in _find(model):
        modules[id(module)] = module
        paths.setdefault(id(module), []).append(path)
    entries = []
    replacements = _replacements({type(module) for module in modules.values()}, linear)
    for key, module in modules.items():
        reason = _why_skipped(module, replacements)
        if reason is not None:
            source, target = type(module), None if reason else replacements[type(module)]
            entries.append(PatchEntry(", ".join(paths[key]), source, target, reason, module))
            if target is not None and not dry_run:
                module.__class__ = target
    report = PatchReport(entries, dry_run, notes_on(model))
    if {"transformers.loss.loss_utils", "transformers.modeling_utils"} <= sys.modules.keys():
        report.losses = _transformers_loss().find(model)
        for found in report.losses if not dry_run else ():
            _transformers_loss().replace(found)
    try:
        if int8 is not None and dry_run:
            report.notes.insert(0, _plan_int8(model, int8))
        elif int8 is not None:
            from .quantization import quantize_

            report.int8 = quantize_(model, int8)
        if optimizer is not None:
            former = type(optimizer)
            report.optimizer = former, type(patch_optimizer(optimizer))
            report._optimizer = optimizer
    except BaseException:
        report.undo()
        raise
    if optimizer is not None and dry_run and report.optimizer is not None:
        _unpatch_optimizer(optimizer, *report.optimizer)
    return report
