"""Everything that a run of the demo found, on the terminal and as report.json."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

import pyfast
from pyfast._patch import PatchReport, class_name

from .comparison import Comparison
from .data import Corpus
from .options import Options
from .quantization import Quantization, quantization_rows, quantization_text
from .training import Run


@dataclass(frozen=True)
class Results:
    """A finished run of the demo.

    Attributes:
        quantization: None where the comparison has problems.
    """

    options: Options
    corpus: Corpus
    parameters: int
    runs: tuple[Run, Run]
    comparison: Comparison
    patch_report: PatchReport
    sample: str
    quantization: Quantization | None
    environment: dict[str, str]

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each check that failed."""
        more = () if self.quantization is None else self.quantization.problems
        return (*self.comparison.problems, *more)


def environment(device: str) -> dict[str, str]:
    """Where the run took place."""
    found = {
        "pyfast": pyfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    ops: dict[str, list[str]] = {}
    for op, table in pyfast.backends().items():
        text = "; ".join(f"{name} {status}" for name, status in table.items())
        ops.setdefault(text, []).append(op)
    found |= {f"backends of {', '.join(names)}": text for text, names in ops.items()}
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(corpus: Corpus, parameters: int, options: Options) -> tuple[str, str]:
    """The text and the model, a line each."""
    text = (
        f"{corpus.source}: {len(corpus.train):,} bytes to learn from, "
        f"{len(corpus.held_out):,} held out"
    )
    model = (
        f"byte-level GPT, {parameters / 1e6:.1f} million parameters: {options.layers} layers, "
        f"width {options.width}, {options.heads} heads, context {options.context}, "
        f"batch {options.batch}, {options.dtype}, {options.device}"
    )
    return text, model


def change_text(options: Options) -> str:
    """What makes the patched run of the stock one."""
    optimizer = "pyfast.patch_optimizer(optimizer)"
    if options.state_dtype is not None:
        optimizer = f'pyfast.optim.AdamW(..., state_dtype="{options.state_dtype}")'
    return f"pyfast.patch(model), {optimizer}"


def optimizers(results: Results) -> dict[str, str]:
    """The class of each run's optimizer, as users write it."""
    found = {}
    for run in results.runs:
        kind = type(run.optimizer)
        package = kind.__module__.rpartition(".")[0]
        found[run.name] = f"{package}.{kind.__name__}"
    return found


def optimizer_text(results: Results) -> str:
    """The optimizers in one line."""
    names = ", ".join(f"{name} {kind}" for name, kind in optimizers(results).items())
    state_dtype = results.options.state_dtype
    return names if state_dtype is None else f"{names} with {state_dtype} states"


def comparison_rows(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """Rows of (what, stock, patched, patched against stock)."""
    stock, patched = comparison.stock, comparison.patched

    def loss_row(label: str, name: str) -> tuple[str, str, str, str]:
        one, other = getattr(stock, name), getattr(patched, name)
        return label, f"{one:.4f}", f"{other:.4f}", f"{other - one:+.4f}"

    def ratio_row(label: str, name: str, scale: float, digits: int) -> tuple[str, str, str, str]:
        one, other = getattr(stock, name) * scale, getattr(patched, name) * scale
        return label, f"{one:,.{digits}f}", f"{other:,.{digits}f}", f"x {other / one:.2f}"

    rows = [
        loss_row(f"training loss, last {comparison.last_steps} steps", "training_loss"),
        loss_row("held-out loss", "held_out_loss"),
        ratio_row("median step, ms", "step_seconds", 1e3, 1),
        ratio_row("tokens/s", "tokens_per_second", 1, 0),
        ratio_row("saved for backward, MB", "saved_bytes", 1e-6, 1),
    ]
    if stock.peak_bytes is not None:
        rows.append(ratio_row("peak GPU memory of a step, MB", "peak_bytes", 1e-6, 1))
    return rows


def patch_rows(report: PatchReport) -> list[tuple[str, str, str]]:
    """Rows of (modules, from, to or why not); modules that differ in a number share a row."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for entry in report:
        to = entry.reason if entry.target is None else class_name(entry.target)
        counts[re.sub(r"\b\d+\b", "*", entry.path), entry.source.__name__, to] += 1
    return [
        (f"{path} ({count})" if count > 1 else path, source, to)
        for (path, source, to), count in counts.items()
    ]


def speed_text(comparison: Comparison) -> str:
    """The speed-up in one sentence."""
    return (
        f"speed-up {comparison.speedup:.2f} (ratio of the median steps), "
        f"{comparison.pairwise_speedup:.2f} (median over pairs of steps), "
        f"without the first {comparison.warmup_steps} steps"
    )


def agreement_text(comparison: Comparison) -> str:
    """Whether the held-out losses agree, and what the bound is made of."""
    verdict = "agree" if abs(comparison.difference) <= comparison.bound else "do not agree"
    return (
        f"the held-out losses {verdict}: difference {comparison.difference:+.4f}, "
        f"noise up to {comparison.bound:.4f} = 3 sqrt(s^2 + 2 t^2), with s = "
        f"{comparison.standard_error:.4f} the standard error over the held-out sequences and "
        f"t = {comparison.training_noise:.4f} what other dropout masks alone change"
    )


def print_introduction(options: Options, corpus: Corpus, parameters: int, console: Console) -> None:
    """What is about to be trained, and on what."""
    for label, line in zip(("Text", "Model"), describe(corpus, parameters, options), strict=True):
        console.print(f"[bold]{label}:[/]", Text(line))
    console.print("[bold]Change:[/]", Text(change_text(options)), end="\n\n")


def print_results(results: Results, console: Console) -> None:
    """The tables, the checks and the sample."""
    comparison = results.comparison
    table = _table(None, "", "stock", "patched", "against stock")
    for label, *cells in comparison_rows(comparison):
        table.add_row(label, *cells)
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print("[bold]Optimizer:[/]", Text(optimizer_text(results)))
    console.print(f"[bold]Speed:[/] {speed_text(comparison)}")
    console.print(f"[bold]Check:[/] {agreement_text(comparison)}")
    table = _table("What pyfast.patch did", "module", "from", "to, or why not")
    for row in patch_rows(results.patch_report):
        table.add_row(*map(Text, row))
    console.print(table)
    if results.quantization is not None:
        _print_quantization(results.quantization, console)
    for problem in results.problems:
        console.print(f"[bold red]FAILED:[/] {problem}")
    console.print("[bold]The patched model writes:[/]")
    console.print(Text(results.sample), style="dim")
    console.print("\n[bold]Report:[/]", Text(str(results.options.out / "report.html")))


def _print_quantization(quantization: Quantization, console: Console) -> None:
    table = _table("pyfast.quantization.quantize_(model, config)", "", *quantization.variants)
    for row in quantization_rows(quantization):
        table.add_row(*row)
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print(f"[bold]Check:[/] {quantization_text(quantization)}")


def _table(title: str | None, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD)


def write_json(results: Results, path: Path) -> None:
    """All figures and curves; a number that is not finite becomes null."""
    content = {
        "command": results.options.command(),
        "options": asdict(results.options),
        "environment": results.environment,
        "text": results.corpus.source,
        "parameters": results.parameters,
        "optimizers": optimizers(results),
        "passed": not results.problems,
        "comparison": asdict(results.comparison),
        "quantization": None if results.quantization is None else results.quantization.as_dict(),
        "patch": [
            {
                "path": entry.path,
                "from": class_name(entry.source),
                "to": None if entry.target is None else class_name(entry.target),
                "reason": entry.reason,
            }
            for entry in results.patch_report
        ],
        "curves": {
            run.name: {
                "training_loss": run.losses,
                "step_seconds": run.step_seconds,
                "held_out_loss": run.held_out_losses.tolist(),
            }
            for run in results.runs
        },
        "sample": results.sample,
    }
    text = json.dumps(_plain(content), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
