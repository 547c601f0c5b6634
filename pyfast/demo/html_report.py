"""report.html: one file, its plots inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .quantization import FLOAT, WEIGHT_ONLY, Quantization, quantization_rows, quantization_text
from .report import (
    Results,
    agreement_text,
    change_text,
    comparison_rows,
    describe,
    optimizer_text,
    patch_rows,
    speed_text,
)
from .training import Run

COLORS = {"stock": "#8a8f98", "patched": "#0b66c3"}
INK, GRID = "#2b2f36", "#e4e7eb"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #2b2f36; background: #f5f6f8; margin: 0 }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.5rem 4rem }
h1 { font-size: 1.7rem; margin: 0 }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .6rem }
p { margin: .4rem 0 }
.verdict { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0 }
.verdict div, .card { background: #fff; border: 1px solid #e4e7eb; border-radius: 8px }
.verdict div { padding: .8rem 1.3rem }
.verdict b { display: block; font-size: 1.8rem; line-height: 1.2; color: #0b66c3 }
.failed { color: #b42318 }
.verdict b.failed { color: #b42318 }
.card { padding: .6rem 1rem; overflow-x: auto }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }
.plots img { width: 100%; height: auto; display: block }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .35rem 1rem .35rem 0; border-bottom: 1px solid #e4e7eb }
tr:last-child td { border-bottom: 0 }
th { font-weight: 600; color: #5b626d }
.figures td + td, .figures th + th { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; font-size: .9rem }
"""


def write_html(results: Results, path: Path) -> None:
    """Write the report as one self-contained file."""
    path.write_text(_page(results), encoding="utf-8")


def _page(results: Results) -> str:
    comparison = results.comparison
    text, model = describe(results.corpus, results.parameters, results.options)
    figures = _table(("", "stock", "patched", "against stock"), comparison_rows(comparison))
    patched = _table(("module", "from", "to, or why not"), patch_rows(results.patch_report))
    environment = _table((), results.environment.items())
    problems = "".join(f'<p class="failed">{escape(text)}</p>' for text in results.problems)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pyfast demo</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(change_text(results.options))}</h1>
<p>{escape(model)}</p>
<p>{escape(text)}</p>
<div class="verdict">{_verdict(results)}</div>
{problems}
<div class="plots">
<div class="card">{_image(_loss_plot(results.runs), "training loss by step")}</div>
<div class="card">{_image(_time_plot(results), "step time by step")}</div>
</div>
<h2>Figures</h2>
<div class="card figures">{figures}</div>
<p>Optimizer: {escape(optimizer_text(results))}.</p>
<p>{escape(speed_text(comparison).capitalize())}.</p>
<p>{escape(agreement_text(comparison).capitalize())}.</p>
<h2>What pyfast.patch did</h2>
<div class="card">{patched}</div>
{_quantization(results.quantization)}<h2>The patched model writes</h2>
<div class="card"><pre>{escape(results.sample)}</pre></div>
<h2>Environment</h2>
<div class="card">{environment}</div>
<h2>Command</h2>
<div class="card"><pre>{escape(results.options.command())}</pre></div>
</main>
</body>
</html>
"""


def _quantization(quantization: Quantization | None) -> str:
    if quantization is None:
        return ""
    figures = _table(("", *quantization.variants), quantization_rows(quantization))
    return f"""<h2>The patched model in int8: pyfast.quantization.quantize_</h2>
<div class="card figures">{figures}</div>
<p>{escape(quantization_text(quantization))}.</p>
"""


def _verdict(results: Results) -> str:
    comparison = results.comparison
    stock, patched = comparison.stock, comparison.patched
    cards = [
        (f"{comparison.speedup:.2f}x", "training speed", ""),
        (f"{1 - patched.saved_bytes / stock.saved_bytes:.0%}", "less saved for backward", ""),
        (f"{comparison.difference:+.4f}", "held-out loss, difference", ""),
        ("failed", "checks", "failed") if results.problems else ("passed", "checks", ""),
    ]
    if results.quantization is not None:
        variants = results.quantization.variants
        ratio = variants[FLOAT].weight_bytes / variants[WEIGHT_ONLY].weight_bytes
        cards.insert(-1, (f"{ratio:.1f}x", "smaller in int8", ""))
    return "".join(f'<div><b class="{kind}">{big}</b>{small}</div>' for big, small, kind in cards)


def _table(head: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    lines = [line(row, "td") for row in rows]
    return f"<table>{line(head, 'th') if head else ''}{''.join(lines)}</table>"


def _image(figure: Figure, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{text}" src="data:image/png;base64,{data}">'


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_xlabel("step", color=INK)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(color=GRID, labelcolor=INK)
    return figure, axes


def _loss_plot(runs: tuple[Run, Run]) -> Figure:
    figure, axes = _axes("Training loss, nats per byte")
    for run, width in zip(runs, (4.0, 1.8), strict=True):
        axes.plot(run.losses, color=COLORS[run.name], linewidth=0.6, alpha=0.35)
        label = f"{run.name}, held-out loss {run.held_out_losses.mean().item():.3f}"
        smooth = _smooth(run.losses)
        axes.plot(smooth, color=COLORS[run.name], linewidth=width, label=label)
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def _smooth(values: list[float]) -> list[float]:
    """Means over a window around each step."""
    half = max(1, len(values) // 40)
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _time_plot(results: Results) -> Figure:
    figure, axes = _axes("Time of a step, ms")
    comparison = results.comparison
    medians = [figures.step_seconds * 1e3 for figures in (comparison.stock, comparison.patched)]
    top = 2 * max(medians)
    for run, median in zip(results.runs, medians, strict=True):
        color = COLORS[run.name]
        times = [min(1e3 * seconds, top) for seconds in run.step_seconds]
        axes.plot(times, ".", color=color, markersize=4, alpha=0.6, clip_on=False)
        axes.axhline(median, color=color, linewidth=1.8, label=f"{run.name}, median {median:,.1f}")
    axes.set_ylim(0, top)
    axes.legend(frameon=False, labelcolor=INK, loc="lower right")
    return figure
