"""The last act: the trained model with int8 weights, three ways, against itself in floating point.

Measured for each: the loss on the held-out sequences, the bytes of the weights, and how fast text
is generated, with a cache of keys and values in float32 and in int8.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

import pyfast.quantization

from .data import Corpus, random_windows
from .generation import generate
from .model import GPT
from .options import Options
from .training import held_out_losses

FLOAT, WEIGHT_ONLY, W8A8, SMOOTH = "float", "weight-only", "W8A8", "SmoothQuant"
CACHES = {"float32": torch.float32, "int8": torch.int8}
MAX_CHANGE = {WEIGHT_ONLY: 0.005, W8A8: 0.02}  # of the held-out loss, as a share of it
CALIBRATION_BATCHES = 8
ROUNDS = 3
MAX_GENERATED = 64

# What another rounding of the weights alone changes in the held-out loss, as a standard deviation
# in nats per byte. Measured over 4 to 12 quantizations each of one model with the largest weight of
# each row moved, which moves the steps of that row, against that model in floating point: 0.0001
# with the default options and after 60 and 600 steps of 2 layers of width 64, up to 0.0006 in small
# models that have hardly learned (30 steps of 2 layers of width 32, 12 of one of width 64).
ROUNDING_NOISE = 0.0006


@dataclass(frozen=True)
class Variant:
    """One model's figures.

    Attributes:
        held_out_losses: [windows], nats per byte.
        weight_bytes: of all parameters and scales.
        num_quantized: modules with int8 weights.
        tokens_per_second: of generation, by the dtype of the cache.
    """

    name: str
    held_out_losses: Tensor
    weight_bytes: int
    num_quantized: int
    tokens_per_second: dict[str, float]

    @property
    def loss(self) -> float:
        return self.held_out_losses.mean().item()

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2)


@dataclass(frozen=True)
class Quantization:
    """All models' figures and what they say.

    Attributes:
        variants: by name, the float model first.
        changes: of the held-out loss against the float model, as a share of it, by name.
        difference: held-out loss with SmoothQuant less that of W8A8.
        standard_error: of the difference, over the held-out sequences.
        bound: the largest difference that counts as noise.
        problems: one line for each check that failed.
    """

    variants: dict[str, Variant]
    changes: dict[str, float]
    difference: float
    standard_error: float
    bound: float
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        content = {name: getattr(self, name) for name in ("changes", "difference")}
        names = ("standard_error", "bound", "problems")
        content |= {name: getattr(self, name) for name in names}
        content["rounding_noise"] = ROUNDING_NOISE
        content["variants"] = {
            name: {
                **asdict(variant),
                "held_out_losses": variant.held_out_losses.tolist(),
                "held_out_loss": variant.loss,
                "bits_per_byte": variant.bits_per_byte,
            }
            for name, variant in self.variants.items()
        }
        return content


def quantize(model: GPT, corpus: Corpus, options: Options, prompt: bytes) -> Quantization:
    """Quantize copies of a trained model and measure them beside it."""
    models = {FLOAT: model}
    for name, config in _configs(model, corpus, options).items():
        models[name] = copy.deepcopy(model)
        pyfast.quantization.quantize_(models[name], config)
    rates = _generation_rates(models, options, prompt)
    variants = [
        Variant(
            name,
            held_out_losses(each, corpus, options),
            sum(t.nbytes for t in each.state_dict().values()),
            sum(p.dtype == torch.int8 for p in each.parameters()),
            rates[name],
        )
        for name, each in models.items()
    ]
    return judge(variants)


def _configs(model: GPT, corpus: Corpus, options: Options) -> dict[str, Any]:
    config = pyfast.quantization
    generator = torch.Generator().manual_seed(options.seed)
    batches = [
        random_windows(corpus.train, options.batch, options.context, generator)[:, :-1]
        for _ in range(CALIBRATION_BATCHES)
    ]
    calibration = config.calibrate(model, [batch.to(options.device) for batch in batches])
    return {
        WEIGHT_ONLY: config.Int8WeightOnly(),
        W8A8: config.Int8DynamicActivationInt8Weight(),
        SMOOTH: config.SmoothQuant(calibration=calibration),
    }


def _generation_rates(
    models: dict[str, GPT], options: Options, prompt: bytes
) -> dict[str, dict[str, float]]:
    """Bytes a second, one at a time, for every model and cache in turns."""
    length = max(1, min(MAX_GENERATED, options.context - len(prompt)))
    seconds: dict[tuple[str, str], list[float]] = {}
    for index in range(ROUNDS + 1):
        for name, model in models.items():
            for cache, dtype in CACHES.items():
                start = time.perf_counter()
                generate(model, prompt, length if index else 1, options.seed, dtype)
                if index:  # the first round is for first calls
                    seconds.setdefault((name, cache), []).append(time.perf_counter() - start)
    return {
        name: {cache: length / median(seconds[name, cache]) for cache in CACHES} for name in models
    }


def judge(variants: list[Variant]) -> Quantization:
    """What the figures say, and the checks on them."""
    by_name = {variant.name: variant for variant in variants}
    loss = by_name[FLOAT].loss
    changes = {v.name: v.loss / loss - 1 for v in variants if v.name != FLOAT}
    differences = by_name[SMOOTH].held_out_losses - by_name[W8A8].held_out_losses
    difference, count = differences.mean().item(), len(differences)
    standard_error = differences.std().item() / math.sqrt(count) if count > 1 else 0.0
    bound = 3 * math.hypot(standard_error, math.sqrt(2) * ROUNDING_NOISE)  # two models rounded
    problems = [
        f"{name}: no weight is int8, or they take no less memory"
        for name, variant in by_name.items()
        if name != FLOAT
        and not (variant.num_quantized and variant.weight_bytes < by_name[FLOAT].weight_bytes)
    ]
    problems += [
        f"{name}: the held-out loss changes by {changes[name]:+.2%}, allowed {most:.1%}"
        for name, most in MAX_CHANGE.items()
        if not abs(changes[name]) <= most  # NaN is wrong too
    ]
    if not difference <= bound:
        problems.append(
            f"{SMOOTH}: the held-out loss is {difference:+.5f} above that of {W8A8}, more than "
            f"noise explains ({bound:.5f})"
        )
    return Quantization(by_name, changes, difference, standard_error, bound, tuple(problems))


def quantization_rows(quantization: Quantization) -> list[tuple[str, ...]]:
    """Rows of (what, one figure for each model)."""
    variants = quantization.variants.values()
    stock = quantization.variants[FLOAT]

    def row(label: str, figure: Callable[[Variant], str]) -> tuple[str, ...]:
        return label, *(figure(variant) for variant in variants)

    def change(variant: Variant) -> str:
        return f"{quantization.changes.get(variant.name, 0.0):+.3%}"

    return [
        row("held-out loss", lambda v: f"{v.loss:.4f}"),
        row("against float", lambda v: "" if v is stock else change(v)),
        row("bits per byte", lambda v: f"{v.bits_per_byte:.4f}"),
        row("weights, MB", lambda v: f"{v.weight_bytes / 1e6:.2f}"),
        row("against float", lambda v: f"x {v.weight_bytes / stock.weight_bytes:.2f}"),
        row("tokens/s, float32 cache", lambda v: f"{v.tokens_per_second['float32']:,.0f}"),
        row("tokens/s, int8 cache", lambda v: f"{v.tokens_per_second['int8']:,.0f}"),
    ]


def quantization_text(quantization: Quantization) -> str:
    """The checks, and what the bound of the last is made of."""
    within = ", ".join(
        f"{name} within {most:.1%} of the loss: {quantization.changes[name]:+.3%}"
        for name, most in MAX_CHANGE.items()
    )
    return (
        f"{within}, {SMOOTH} no worse than {W8A8}: {quantization.difference:+.5f}, noise up to "
        f"{quantization.bound:.5f} = 3 sqrt(s^2 + 2 r^2), with s = "
        f"{quantization.standard_error:.5f} the standard error over the held-out sequences and "
        f"r = {ROUNDING_NOISE:.5f} what another rounding alone changes"
    )
