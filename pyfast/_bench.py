"""``python -m pyfast bench``: the ops against torch on this machine, each result checked first."""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import pkgutil
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import _backend, benchmarks
from ._bench_report import machine, new_table, plot, print_table, print_whole
from ._info import cpu_name
from ._version import __version__
from .benchmarks.cases import (
    FULL,
    GRAPH_CALLS,
    QUICK,
    BaseCase,
    Call,
    Effort,
    first_line,
    graphed,
    measure,
)
from .benchmarks.rows import Row

if TYPE_CHECKING:
    from rich.console import Console
QUICK_MAX_ELEMENTS = 1 << 22
QUICK_MAX_FLOPS = 10**10
TOLERATED_SLOWDOWN = 1.15
_KEY = ("op", "case", "shape", "dtype", "device", "implementation")


class UsageError(Exception):
    """A wrong option, in one line for the user."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m pyfast bench``; :func:`main` takes the result."""
    add = parser.add_argument
    add("--op", action="append", metavar="NAME", help=f"one of {', '.join(_modules())}; repeatable")
    add("--dtype", action="append", metavar="NAME", help="such as float32; repeatable")
    text = "cases whose name contains this, such as decode; repeatable"
    add("--case", action="append", metavar="TEXT", help=text)
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    text = "fewer rounds, no torch.compile, nothing above 4M elements or 10 GFLOP"
    add("--quick", action="store_true", help=text)
    text = "time replays of CUDA graphs: kernels, without launching them"
    add("--graphs", action="store_true", help=text)
    add("--json", type=Path, metavar="FILE", help="write all results and the environment")
    add("--plot", type=Path, metavar="FILE.png", help="draw the speed-ups")
    text = (
        "compare the speed-ups with those of an earlier --json; the exit status is 1 where one of "
        f"pyfast fell by more than a factor of {TOLERATED_SLOWDOWN}"
    )
    add("--compare", type=Path, metavar="OLD.json", help=text)


def main(arguments: argparse.Namespace) -> int:
    """Run the benchmarks.

    Args:
        arguments: the options that :func:`add_arguments` defines.

    Returns:
        The exit status: 0, or 1 where a result of pyfast is wrong or ``--compare`` found pyfast
        slower, or 2 for a wrong option or a missing package, with one line on stderr.
    """
    packages = ("rich", "matplotlib") if arguments.plot else ("rich",)
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"{' and '.join(missing)} not found: pip install 'pyfast[bench]'")
    try:
        cases = _select_cases(arguments)
        old = _read_old(arguments, cases) if arguments.compare else None
        for option in ("json", "plot"):
            _check_writable(option, getattr(arguments, option))
    except UsageError as error:
        return _refuse(str(error))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(arguments.threads or threads)
        return _run(arguments, cases, old)
    finally:
        torch.set_num_threads(threads)


def _refuse(text: str) -> int:
    print(f"pyfast bench: {text}", file=sys.stderr)
    return 2


def _run(arguments: argparse.Namespace, cases: list[BaseCase], old: dict[str, Any] | None) -> int:
    from rich.console import Console

    console = Console(highlight=False)
    environment = _environment(arguments)
    rows = _measure_all(cases, arguments)
    print_table(console, rows, environment)
    if arguments.json:
        lines = ",\n".join(json.dumps(asdict(row), allow_nan=False) for row in rows)
        content = f'{{"environment": {json.dumps(environment)},\n"rows": [\n{lines}\n]}}\n'
        arguments.json.write_text(content, encoding="utf-8")
    if arguments.plot:
        plot(rows, environment, arguments.plot)
    is_slower = old is not None and _print_comparison(console, rows, environment, old)
    return 1 if is_slower or any(row.failed for row in rows) else 0


def _modules() -> dict[str, str]:
    """``{op: name of its benchmark module}``."""
    prefix = f"{benchmarks.__name__}.bench_"
    modules = pkgutil.iter_modules(benchmarks.__path__, f"{benchmarks.__name__}.")
    names = sorted(module.name for module in modules if module.name.startswith(prefix))
    return {name.removeprefix(prefix): name for name in names}


def _load_cases() -> dict[str, list[BaseCase]]:
    return {op: importlib.import_module(name).CASES for op, name in _modules().items()}


def _select_cases(arguments: argparse.Namespace) -> list[BaseCase]:
    available = _load_cases()
    dtypes = {case.dtype_name: None for cases in available.values() for case in cases}
    for option, known in (("op", available), ("dtype", dtypes)):
        for name in getattr(arguments, option) or ():
            if name not in known:
                raise UsageError(f"--{option} must be one of {', '.join(known)}, got {name}")
    if arguments.device not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu or cuda, got {arguments.device}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device must be cpu here, got cuda: torch sees no CUDA device")
    if arguments.graphs and arguments.device != "cuda":
        raise UsageError("--graphs needs --device cuda")
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError(f"--threads must be at least 1, got {arguments.threads}")
    chosen = [
        case
        for op in available
        for case in available[op]
        if op in (arguments.op or available)
        and case.dtype_name in (arguments.dtype or dtypes)
        and any(text in case.name for text in arguments.case or ("",))
        and not (arguments.quick and _is_large(case))
    ]
    if not chosen:
        raise UsageError("no case of this --op has this --dtype, and this in its name")
    return chosen


def _is_large(case: BaseCase) -> bool:
    flops = 0 if case.flops is None else case.flops(case.shape)
    return case.num_elements > QUICK_MAX_ELEMENTS or flops > QUICK_MAX_FLOPS


def _check_writable(option: str, path: Path | None) -> None:
    if path is None:
        return
    target = path if path.exists() else path.absolute().parent
    if path.is_dir() or not os.access(target, os.W_OK):
        raise UsageError(f"--{option} must be a file that can be written, got {path}")
    if option == "plot" and path.suffix.lower() != ".png":
        raise UsageError(f"--plot must be a file whose name ends in .png, got {path}")


def _measure_all(cases: list[BaseCase], arguments: argparse.Namespace) -> list[Row]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    effort = QUICK if arguments.quick else FULL
    if arguments.graphs:
        effort = replace(effort, calls_at_once=GRAPH_CALLS, min_calls=1)
    device = torch.device(arguments.device)
    rows: list[Row] = []
    columns = BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases) * effort.rounds)
        for index, case in enumerate(cases):
            progress.update(task, completed=index * effort.rounds, description=str(case))
            rows += _run_case(case, device, effort, lambda: progress.advance(task))
    return rows


def _new_row(case: BaseCase, device: torch.device, implementation: str) -> Row:
    where = (case.op, case.name, list(case.shape), case.dtype_name, device.type)
    num_flops = None if case.flops is None else case.flops(case.shape)
    row = Row(*where, implementation, case.num_bytes, case.bar, num_flops=num_flops)
    row.floors = dict(case.floors) if implementation == "pyfast" else {}
    return row


def _run_case(
    case: BaseCase, device: torch.device, effort: Effort, after_round: Callable[[], None]
) -> list[Row]:
    """Check and time every implementation. What fails has a problem in place of figures."""
    prepared = case.prepare(device)
    rows: dict[str, Row] = {}
    as_timed = graphed if effort.calls_at_once > 1 else _unchanged
    calls = {"copy": as_timed(prepared.copy_call())}
    for name in case.implementations:
        if name == "torch.compile" and not effort.with_compile:
            continue
        row = rows[name] = _new_row(case, device, name)
        try:
            if name == "pyfast":
                row.backend, row.problem = prepared.backend, prepared.check()
            if not row.problem:
                call = prepared.call(name)
                if name in ("torch", "pyfast"):
                    row.peak_bytes = _peak_memory(call, device)
                else:
                    call()
                calls[name] = as_timed(call)
        except Exception as error:
            row.problem = first_line(error)
        row.failed = bool(row.problem) and name not in case.optional
    samples = measure(calls, device, effort, after_round)
    copy_s, _ = samples.pop("copy")
    torch_s, _ = samples.get("torch", ([], 0))
    for name, (seconds, num_calls) in samples.items():
        rows[name].add_samples(seconds, num_calls, copy_s, torch_s)
    if "pyfast" in samples:
        others_s = {name: seconds for name, (seconds, _) in samples.items()}
        rows["pyfast"].add_ratios(others_s["pyfast"], others_s)
    return list(rows.values())


def _unchanged(call: Call) -> Call:
    return call


def _peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that a call takes beyond what is taken before it; None where not known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError:
        call()
        return None
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{name}:")[2].split()[0])


def _environment(arguments: argparse.Namespace) -> dict[str, Any]:
    native = _backend.native
    return {
        "pyfast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "isa": None if native is None else native.selected_isa(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "load_average": round(os.getloadavg()[0], 2),
        "commit": _commit(),
        "command": _command(arguments),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The commit of a source tree, with ``-dirty`` where it was changed since."""
    if not ((root := Path(__file__).resolve().parents[1]) / ".git").exists():
        return None
    words = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    command = ["git", "--no-optional-locks", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _command(arguments: argparse.Namespace) -> str:
    """The command that repeats this run."""
    words = ["python", "-m", "pyfast", "bench"]
    for option in ("op", "dtype", "case", "device", "threads", "json", "plot", "compare"):
        value = getattr(arguments, option)
        for word in value if isinstance(value, list) else [value]:
            words += [f"--{option}", str(word)] if word is not None else []
    return shlex.join(words + ["--quick"] * arguments.quick + ["--graphs"] * arguments.graphs)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in _KEY)


def _read_old(arguments: argparse.Namespace, cases: list[BaseCase]) -> dict[str, Any]:
    """An earlier result: its environment, and its speed-ups by key."""
    path: Path = arguments.compare
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        environment = dict(content["environment"])
        speedups = {_key(row): float(row["speedup"]) for row in content["rows"] if row["speedup"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--compare cannot use {path}: {first_line(error)}") from None
    device = torch.device(arguments.device)
    if not any(_key(asdict(_new_row(case, device, "pyfast"))) in speedups for case in cases):
        raise UsageError(f"--compare cannot use {path}: it has no case of this run")
    return {"environment": environment, "speedups": speedups}


def _print_comparison(
    console: Console, rows: list[Row], environment: dict[str, Any], old: dict[str, Any]
) -> bool:
    """Show the speed-ups then and now; True where one of pyfast fell too far."""
    from rich.text import Text

    table, falls = new_table("x torch then", "now", "now / then"), []
    for row in rows:
        then, now = old["speedups"].get(_key(asdict(row))), row.speedup
        if row.implementation == "torch" or now is None or then is None:
            continue
        is_slower = row.implementation == "pyfast" and then > TOLERATED_SLOWDOWN * now
        falls += [is_slower] if row.implementation == "pyfast" else []
        figures = [Text(f"{x:.2f}", "red" if is_slower else "") for x in (then, now, now / then)]
        table.add_row(*row.where, row.implementation, *figures)
    print_whole(console, table)
    for label, facts in (("then", old["environment"]), ("now ", environment)):
        console.print(f"{label}: {machine(facts)}", style="dim", markup=False, soft_wrap=True)
    verdict = f"of {len(falls)} speed-ups of pyfast, {sum(falls)} fell by more than a factor of "
    console.print(f"{verdict}{TOLERATED_SLOWDOWN}", style="red" if any(falls) else "")
    return any(falls)
