"""Training two models side by side, and what is measured on each."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Corpus, random_windows, spaced_windows
from .model import GPT
from .options import DTYPES, Options
from .processes import mean_over_processes, part_of, rank

LEARNING_RATE = 1e-3
WARMUP_SHARE = 0.1
HELD_OUT_WINDOWS = 256


@dataclass
class Run:
    """A model, its optimizer, and what was measured: seconds and nats per byte."""

    name: str
    model: GPT
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    held_out_losses: Tensor = field(default_factory=lambda: torch.empty(0))  # [windows]
    saved_bytes: int = 0
    peak_bytes: int | None = None


def make_run(name: str, model: GPT) -> Run:
    """``fused=True`` is the fastest AdamW that torch has."""
    return Run(name, model, torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True))


def train(
    runs: tuple[Run, Run], corpus: Corpus, options: Options, on_step: Callable[[], None]
) -> None:
    """Train both models on the same batches, in turns, so that noise of the machine hits both.

    Each step of each model starts from a seed of its own: what one model draws, and which of the
    two goes first, does not matter to the other.
    """
    generator = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        windows = random_windows(corpus.train, options.batch, options.context, generator)
        windows = part_of(windows).to(options.device)
        for run in runs if step % 2 else reversed(runs):
            for group in run.optimizer.param_groups:
                group["lr"] = LEARNING_RATE * _schedule(step, options.steps)
            torch.manual_seed((options.seed + 1_000_003 * rank()) * 1_000_003 + step)
            _train_step(run, windows, options)
        on_step()


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _train_step(run: Run, windows: Tensor, options: Options) -> None:
    _wait(options.device)
    start = time.perf_counter()
    loss = _losses(run.model, windows, options).mean()
    torch.autograd.backward(loss)
    run.optimizer.step()
    run.optimizer.zero_grad()
    _wait(options.device)
    run.step_seconds.append(time.perf_counter() - start)
    run.losses.append(mean_over_processes(loss.detach()))


def _losses(model: GPT, windows: Tensor, options: Options) -> Tensor:  # [batch]
    with _autocast(options):
        logits = model(windows[:, :-1])
    targets = windows[:, 1:].flatten()
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none")
    return losses.view(len(windows), -1).mean(1)


def _autocast(options: Options) -> contextlib.AbstractContextManager[Any]:
    dtype = DTYPES[options.dtype]
    return torch.autocast(options.device, dtype, enabled=dtype is not torch.float32)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def held_out_losses(model: GPT, corpus: Corpus, options: Options) -> Tensor:  # [windows]
    """The loss of each held-out sequence, in eval mode, float64."""
    model.eval()
    windows = spaced_windows(corpus.held_out, HELD_OUT_WINDOWS, options.context)
    losses = [
        _losses(model, part.to(options.device), options).cpu()
        for part in torch.split(windows, options.batch)
    ]
    model.train()
    return torch.cat(losses).double()


def measure_memory(run: Run, corpus: Corpus, options: Options) -> None:
    """What one forward pass keeps for the backward pass; on a GPU also the peak of both."""
    generator = torch.Generator().manual_seed(options.seed)
    windows = random_windows(corpus.train, options.batch, options.context, generator)
    windows = windows.to(options.device)
    parameters = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _losses(run.model, windows, options).mean()
    torch.autograd.backward(loss)
    run.optimizer.zero_grad()
    run.saved_bytes = sum(saved.values())
    if options.device == "cuda":
        run.peak_bytes = torch.cuda.max_memory_allocated() - resident
