"""What ``python -m pyfast bench`` prints and draws of its rows."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .benchmarks.rows import Row


def machine(environment: dict[str, Any]) -> str:
    names = ("torch", "pyfast", "python", "cpu", "isa", "threads", "load_average", "gpu")
    return ", ".join(f"{name} {environment[name]}" for name in names if environment.get(name))


def print_table(console: Console, rows: list[Row], environment: dict[str, Any]) -> None:
    table = new_table("median us", "IQR us", "GB/s", "% of copy", "x copy time", "x torch")
    table.add_column("backend", max_width=60)
    before = None
    for row in rows:
        where = row.where if row.where != before else ("",) * len(row.where)
        table.add_row(*where, row.implementation, *figures(row))
        before = row.where
    print_whole(console, table)
    _print_arithmetic(console, rows)
    _print_floors(console, rows)
    _print_means(console, rows)
    notes = [
        "copy: dst.copy_(src) that moves as many bytes, in the same rounds. x copy time: the time "
        f"over moving these bytes once{_goal(rows)}",
        "x torch: median over the rounds of torch's time by this one's. pyfast is green above 1 "
        "where the quartile ranges of the two do not overlap, red below 1",
        machine(environment),
    ]
    if environment["command"].endswith("--quick"):
        notes.append("left out by --quick: torch.compile, and cases above 4M elements or 10 GFLOP")
    for note in notes:
        console.print(note, style="dim", markup=False, soft_wrap=True)


def _goal(rows: list[Row]) -> str:
    bars = {row.bar for row in rows if row.bar is not None}
    return f"; the goal of pyfast's fused ops is {max(bars)}" if bars else ""


def _print_arithmetic(console: Console, rows: list[Row]) -> None:
    table = new_table("GFLOP/s", "of matmul")
    peaks = {row.where: row.gflops for row in rows if row.implementation == "matmul"}
    for row in rows:
        if row.gflops and (peak := peaks.get(row.where)):
            cells = f"{row.gflops:,.0f}", f"{row.gflops / peak:.0%}"
            table.add_row(*row.where, row.implementation, *cells)
    if table.row_count:
        print_whole(console, table)


def _print_floors(console: Console, rows: list[Row]) -> None:
    from rich.text import Text

    table = new_table("times as fast", "at least")
    for row in rows:
        for name, ratio in row.ratios.items():
            floor = row.floors[name]
            cell = Text(f"{ratio:.2f}", "green" if ratio >= floor else "red")
            table.add_row(*row.where, f"pyfast than {name}", cell, f"{floor:.2f}")
    if table.row_count:
        print_whole(console, table)


def _print_means(console: Console, rows: list[Row]) -> None:
    from rich.table import Table

    speedups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row.implementation == "pyfast" and row.speedup:
            speedups.setdefault((row.op, row.case, row.dtype), []).append(row.speedup)
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("op", "case", "dtype", "shapes", "x torch: geometric mean", "least"):
        table.add_column(name, no_wrap=True)
    for words, values in speedups.items():
        if len(values) > 1:
            mean = f"{statistics.geometric_mean(values):.2f}"
            table.add_row(*words, str(len(values)), mean, f"{min(values):.2f}")
    if table.row_count:
        print_whole(console, table)


def figures(row: Row) -> list[Text]:
    from rich.text import Text

    over_copy_style = speedup_style = ""
    if row.implementation == "pyfast" and row.time_over_copy and row.bar:
        over_copy_style = "green" if row.time_over_copy <= row.bar else "red"
    if row.implementation == "pyfast" and row.speedup and (row.is_clear or row.speedup < 1):
        speedup_style = "green" if row.speedup > 1 else "red"
    values = (
        (row.median_us, ",.1f", ""),
        (row.iqr_us, ",.1f", ""),
        (row.bandwidth_gbps, ",.2f", ""),
        (row.percent_of_copy, ".0f", ""),
        (row.time_over_copy, ".2f", over_copy_style),
        (row.speedup, ".2f", speedup_style),
    )
    cells = [Text("-" if x is None else format(x, spec), style) for x, spec, style in values]
    if row.failed:
        return [*cells, Text(f"FAILED: {row.problem}", "bold red")]
    return [*cells, Text(f"left out: {row.problem}", "dim") if row.problem else Text(row.backend)]


def new_table(*figures: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("op", "case", "shape", "dtype", "implementation"):
        table.add_column(name, no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def print_whole(console: Console, table: Table) -> None:
    """Print at full width: a narrow terminal must not shorten numbers."""
    from rich.measure import Measurement

    wide = console.options.update(width=1000)
    console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)


def plot(rows: list[Row], environment: dict[str, Any], path: Path) -> None:
    """A bar for each speed-up; the bars of losing rows point left."""
    from matplotlib.figure import Figure

    bars = {
        f"{' '.join(row.where)}, {row.implementation}": row.speedup
        for row in rows
        if row.speedup is not None and row.implementation != "torch"
    }
    colors = ["C0" if label.endswith(", pyfast") else "0.7" for label in bars]
    figure = Figure(figsize=(11, 1.5 + 0.25 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(bars), [speedup - 1 for speedup in bars.values()], left=1, color=colors)
    for y, speedup in enumerate(bars.values()):
        axes.text(speedup, y, f" {speedup:.2f} ", va="center", ha=("right", "left")[speedup >= 1])
    axes.set(xscale="log", xlabel="x torch (torch's time by this one's)")
    axes.margins(x=0.15, y=0.01)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    figure.suptitle(machine(environment))
    figure.savefig(path, dpi=120)
