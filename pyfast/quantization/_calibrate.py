"""Ranges of the inputs of linear layers, from batches of data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._replace import LINEARS, NORMS

_NUM_BINS = 0x7F80  # of finite magnitudes, by the upper half of a float32


@dataclass(frozen=True)
class MinMaxObserver:
    """Inputs are quantized up to the largest magnitude that was seen."""

    def limit(self, absmax: float, histogram: Tensor | None) -> float:
        return absmax


@dataclass(frozen=True)
class PercentileObserver:
    """Inputs are quantized up to the magnitude that ``percentile`` percent of them do not exceed.

    Magnitudes are counted in bins of at most 1/128 of their value, so that the result does not
    depend on how the data is cut into batches.

    Args:
        percentile: above 0 and at most 100. Default: 99.9
    """

    percentile: float = 99.9

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise ValueError(
                f"PercentileObserver: percentile must be in (0, 100], got {self.percentile}"
            )

    def limit(self, absmax: float, histogram: Tensor | None) -> float:
        assert histogram is not None
        reached = histogram.cumsum(0) >= histogram.sum() * (self.percentile / 100)
        first = int(reached.nonzero()[0])
        edge = torch.tensor([(first + 1) << 16], dtype=torch.int32).view(torch.float32)
        return min(edge.item(), absmax)


@dataclass(frozen=True, eq=False)
class InputRange:
    """Of the input of one layer.

    Attributes:
        limit: the magnitude that static quantization maps to 127.
        channel_absmax: (in_features,) float32, on the CPU.
    """

    limit: float
    channel_absmax: Tensor


@dataclass(frozen=True, eq=False)
class Calibration:
    """What :func:`calibrate` saw; configurations take it.

    Attributes:
        inputs: of each ``nn.Linear`` that was called, by its path.
        norms: absmax of the channels of the output of each LayerNorm and RMSNorm, by its path.
    """

    inputs: Mapping[str, InputRange]
    norms: Mapping[str, Tensor]


@dataclass
class _Watch:
    """Collects the magnitudes of one tensor of a model."""

    path: str
    what: str
    histogram: Tensor | None
    absmax: Tensor | None = field(default=None, init=False)

    def see(self, x: Tensor) -> None:
        magnitudes = x.detach().reshape(-1, x.shape[-1]).abs().float()
        if magnitudes.numel() == 0:
            return
        absmax = magnitudes.amax(0)
        if not bool(absmax.isfinite().all()):
            raise ValueError(f"calibrate: the {self.what} of {self.path!r} holds NaN or Inf")
        self.absmax = absmax if self.absmax is None else torch.maximum(self.absmax, absmax)
        if self.histogram is not None:
            bins = magnitudes.flatten().view(torch.int32) >> 16
            self.histogram = self.histogram.to(bins.device)
            self.histogram += torch.bincount(bins, minlength=_NUM_BINS)


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """In eval mode, without gradients; every module's mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _watch_input(watch: _Watch) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch.see(args[0] if args else kwargs["input"])

    return hook


def _watch_output(watch: _Watch) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        watch.see(output)

    return hook


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    observer: MinMaxObserver | PercentileObserver | None = None,
) -> Calibration:
    """Run the model on batches and record the ranges of the inputs of its ``nn.Linear`` layers.

    For :class:`Int8StaticActivationInt8Weight` and :class:`SmoothQuant`. The model runs in eval
    mode without gradients, and is left as it was. Layers whose weights a parent reads without
    calling them (the projections of MultiheadAttention) are not seen.

    Args:
        model: not quantized yet.
        batches: each is what the model is called with: a tuple or list of arguments, a mapping of
            keyword arguments, or one argument.
        observer: the limit of static quantization. Default: ``MinMaxObserver()``

    Raises:
        TypeError: if ``model`` is no module or ``observer`` no observer.
        ValueError: if ``batches`` is empty, no ``nn.Linear`` was called, or an input of one, or
            output of a norm, holds NaN or Inf.
    """
    observer = observer if observer is not None else MinMaxObserver()
    if not isinstance(model, nn.Module):
        raise TypeError(f"calibrate: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(observer, (MinMaxObserver, PercentileObserver)):
        raise TypeError(
            "calibrate: observer must be a MinMaxObserver or PercentileObserver, "
            f"got {type(observer).__name__}"
        )
    with contextlib.ExitStack() as stack:
        linears, norms = {}, {}
        for path, module in model.named_modules():
            if type(module) in LINEARS:
                counted = isinstance(observer, PercentileObserver)
                histogram = torch.zeros(_NUM_BINS, dtype=torch.int64) if counted else None
                watch = linears[path] = _Watch(path, "input", histogram)
                hook = module.register_forward_pre_hook(_watch_input(watch), with_kwargs=True)
            elif type(module) in NORMS:
                watch = norms[path] = _Watch(path, "output", None)
                hook = module.register_forward_hook(_watch_output(watch))
            else:
                continue
            stack.callback(hook.remove)
        stack.enter_context(_evaluated(model))
        num_batches = 0
        for batch in batches:
            num_batches += 1
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, (tuple, list)):
                model(*batch)
            else:
                model(batch)
    if not num_batches:
        raise ValueError("calibrate: batches must hold at least one batch, got none")
    inputs = {}
    for path, watch in linears.items():
        if watch.absmax is not None:
            absmax = watch.absmax.max().item()
            inputs[path] = InputRange(observer.limit(absmax, watch.histogram), watch.absmax.cpu())
    if not inputs:
        raise ValueError(
            "calibrate: model must call its nn.Linear layers, but no Linear was called"
        )
    outputs = {path: w.absmax.cpu() for path, w in norms.items() if w.absmax is not None}
    return Calibration(inputs, outputs)
