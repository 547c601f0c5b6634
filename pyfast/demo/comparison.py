"""Figures of the two runs, and the checks that decide about the exit status."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, median

from .options import Options
from .training import Run

# What other dropout masks alone change in the held-out loss, as a standard deviation in nats per
# byte. Measured over 4 to 10 runs each, stock and patched, that differ in the seed of the masks
# only: 0.0016 with the default options; 0.0012, 0.0010 and 0.0025 after 60, 600 and 2,000 steps of
# 2 layers of width 64. Longer runs were not measured: there it grows as a random walk does. For
# scale: with dropout that drops nothing the loss is 0.016 lower after the default 200 steps.
TRAINING_NOISE = 0.003
MEASURED_STEPS = 2000


@dataclass(frozen=True)
class Figures:
    """One model's figures: nats per byte, seconds, bytes."""

    training_loss: float
    held_out_loss: float
    step_seconds: float
    tokens_per_second: float
    saved_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """Both models' figures and what they say.

    Attributes:
        last_steps: the training losses are means over so many last steps.
        warmup_steps: so many first steps are left out of the times.
        speedup: median step time of stock over that of patched.
        pairwise_speedup: median over the steps of the ratio of the two times.
        difference: held-out loss of patched less that of stock.
        standard_error: of the difference, over the held-out sequences.
        training_noise: standard deviation of one model's held-out loss over dropout masks.
        bound: the largest difference that counts as noise.
        problems: one line for each check that failed.
    """

    stock: Figures
    patched: Figures
    last_steps: int
    warmup_steps: int
    speedup: float
    pairwise_speedup: float
    difference: float
    standard_error: float
    training_noise: float
    bound: float
    problems: tuple[str, ...]


def compare(stock: Run, patched: Run, options: Options) -> Comparison:
    """The figures of both runs and the checks on them."""
    last_steps = max(1, options.steps // 10)
    warmup_steps = min(5, options.steps // 5)
    figures = [_figures(run, options, last_steps, warmup_steps) for run in (stock, patched)]
    pairs = zip(stock.step_seconds[warmup_steps:], patched.step_seconds[warmup_steps:], strict=True)
    differences = patched.held_out_losses - stock.held_out_losses
    count = len(differences)
    standard_error = differences.std().item() / math.sqrt(count) if count > 1 else 0.0
    training_noise = TRAINING_NOISE * math.sqrt(max(1.0, options.steps / MEASURED_STEPS))
    bound = 3 * math.hypot(standard_error, math.sqrt(2) * training_noise)  # two models trained
    difference = differences.mean().item()
    return Comparison(
        stock=figures[0],
        patched=figures[1],
        last_steps=last_steps,
        warmup_steps=warmup_steps,
        speedup=figures[0].step_seconds / figures[1].step_seconds,
        pairwise_speedup=median(one / other for one, other in pairs),
        difference=difference,
        standard_error=standard_error,
        training_noise=training_noise,
        bound=bound,
        problems=(
            *_loss_problems(stock, last_steps),
            *_loss_problems(patched, last_steps),
            *_agreement_problems(difference, bound),
        ),
    )


def _figures(run: Run, options: Options, last_steps: int, warmup_steps: int) -> Figures:
    step_seconds = median(run.step_seconds[warmup_steps:])
    return Figures(
        training_loss=fmean(run.losses[-last_steps:]),
        held_out_loss=run.held_out_losses.mean().item(),
        step_seconds=step_seconds,
        tokens_per_second=options.batch * options.context / step_seconds,
        saved_bytes=run.saved_bytes,
        peak_bytes=run.peak_bytes,
    )


def _loss_problems(run: Run, last_steps: int) -> list[str]:
    if not all(map(math.isfinite, [*run.losses, *run.held_out_losses.tolist()])):
        return [f"{run.name}: a loss is not finite"]
    first, last = fmean(run.losses[:last_steps]), fmean(run.losses[-last_steps:])
    return [] if last < first else [f"{run.name}: the loss did not fall ({first:.3f}, {last:.3f})"]


def _agreement_problems(difference: float, bound: float) -> list[str]:
    if abs(difference) <= bound or math.isnan(difference):
        return []
    return [
        f"the held-out losses differ by {difference:+.4f}, more than noise explains ({bound:.4f})"
    ]
