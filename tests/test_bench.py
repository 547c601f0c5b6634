"""``python -m pyfast bench``: tiny runs in this process, its check, its verdicts, and what it
refuses. The times of most tests are made up: what is tested is what is made of them."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pyfast.benchmarks import bench_dropout
from pyfast.benchmarks.cases import Case, Effort, PreparedCase, measure
from pyfast.benchmarks.rows import Row
from torch import Tensor

import pyfast
from pyfast import _bench
from pyfast._bench_report import figures

pytest.importorskip("rich", reason="pyfast[bench] is not installed")
pytest.importorskip("matplotlib", reason="pyfast[bench] is not installed")

CPU = torch.device("cpu")
HASTY = Effort(rounds=3, block_s=2e-4, with_compile=False)
DROPOUT = bench_dropout.DROPOUT
TIMES_MS = {"copy": 1.0, "torch": 4.0, "torch.compile": 3.0, "extra": 8.0, "pyfast": 2.0}
SMALL_SHAPES = {1: (1021,), 2: (67, 40), 3: (2, 5, 24), 4: (5, 7, 3, 2)}


def _small_cases() -> list[Case]:
    """Every computation, dtype and pass that is measured, at a small size; not of optimizers."""
    every = [c for cases in _bench._load_cases().values() for c in cases if isinstance(c, Case)]
    small = [replace(case, shape=SMALL_SHAPES[len(case.shape)]) for case in every]
    return list({str(case): case for case in small}.values())


SMALL_CASES = _small_cases()


def parse(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    _bench.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def fake_case(function: Callable[..., Tensor] = DROPOUT.pyfast, **options: Any) -> Case:
    computation = replace(DROPOUT, pyfast=function)
    fields = {"name": "fake", "shape": (64,), "dtype": torch.float32, "num_passes": 2, **options}
    return Case(op="dropout", computation=computation, **fields)


class Bench:
    """Runs the command in haste, on a made-up case; keeps what the last run wrote."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], patch: Any) -> None:
        self.result, self._capsys, self._patch = folder / "result.json", capsys, patch
        self.output = ""
        patch.setattr(_bench, "QUICK", HASTY)
        patch.setattr(_bench, "FULL", replace(HASTY, with_compile=True))

    def run(self, case: Case, *words: object) -> int:
        self._patch.setattr(_bench, "_load_cases", lambda: {"dropout": [case]})
        status = _bench.main(parse("--json", self.result, *words))
        self.output = self._capsys.readouterr().out
        return status

    def row(self, implementation: str = "pyfast") -> dict[str, Any]:
        rows = json.loads(self.result.read_text(encoding="utf-8"))["rows"]
        found: dict[str, Any]
        (found,) = [row for row in rows if row["implementation"] == implementation]
        return found


@pytest.fixture
def bench(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Bench:
    return Bench(tmp_path, capsys, monkeypatch)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What every call takes, in ms, in place of the clock."""
    chosen = dict(TIMES_MS)

    def made_up(calls: dict[str, Any], *_: Any) -> dict[str, tuple[list[float], int]]:
        return {name: ([1e-3 * chosen[name]] * 3, 5) for name in calls}

    monkeypatch.setattr(_bench, "measure", made_up)
    return chosen


def line_of(text: str, word: str) -> list[str]:
    """The words of the first line with this word."""
    return next(line.split() for line in text.splitlines() if word in line.split())


def test_quick_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [case for case in bench_dropout.CASES if case.num_elements <= 1 << 16]
    monkeypatch.setattr(bench_dropout, "CASES", small)
    monkeypatch.setattr(_bench, "QUICK", HASTY)
    result, plot = tmp_path / "result.json", tmp_path / "plot.png"
    words = ("--op", "dropout", "--dtype", "float32", "--json", result, "--plot", plot, "--quick")
    assert _bench.main(parse(*words)) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    content = json.loads(result.read_text(encoding="utf-8"))
    environment, rows = content["environment"], content["rows"]
    assert set(environment) == {
        *("pyfast", "torch", "python", "cpu", "isa", "threads", "gpu", "load_average", "commit"),
        *("command", "date"),
    }
    assert environment["torch"] == torch.__version__
    assert "bench --op dropout --dtype float32 --device cpu" in environment["command"]
    expected = {str(case) for case in small if case.dtype == torch.float32}
    assert {" ".join(Row(**row).where) for row in rows} == expected and len(expected) == 5
    assert [row["implementation"] for row in rows] == ["torch", "pyfast"] * 5
    output = capsys.readouterr().out
    for row in rows:
        check_figures(row, rows)
        assert f"{row['median_us']:,.1f}" in output and row["case"] in output


def check_figures(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    assert len(row["samples_us"]) == HASTY.rounds and row["num_calls"] >= 3
    assert row["q1_us"] <= row["median_us"] == statistics.median(row["samples_us"]) <= row["q3_us"]
    assert row["bandwidth_gbps"] == pytest.approx(row["num_bytes"] / row["median_us"] / 1e3)
    assert row["percent_of_copy"] == pytest.approx(100 / row["time_over_copy"])
    where = Row(**row).where
    (stock,) = [r for r in rows if Row(**r).where == where and r["implementation"] == "torch"]
    ratios = [a / b for a, b in zip(stock["samples_us"], row["samples_us"], strict=True)]
    assert row["speedup"] == pytest.approx(statistics.median(ratios))
    assert not row["failed"] and not row["problem"]
    backend = pyfast.ops._op.registered()["dropout"].backend_of(torch.ones(1))
    assert row["backend"] == (backend if row["implementation"] == "pyfast" else "")


def test_figures(bench: Bench, times: dict[str, float]) -> None:
    case = fake_case(shape=(1000,), bar=1.25, others={"extra": lambda x: x.clone})
    assert bench.run(case, "--quick") == 0
    row = bench.row()
    assert row["num_bytes"] == 8000 and row["num_calls"] == 5
    assert row["bandwidth_gbps"] == pytest.approx(8000 / 2e-3 / 1e9)
    assert row["copy_bandwidth_gbps"] == pytest.approx(8000 / 1e-3 / 1e9)
    assert (row["speedup"], row["time_over_copy"], row["percent_of_copy"]) == (2.0, 2.0, 50.0)
    cells = ["pyfast", "2,000.0", "0.0", "0.00", "50", "2.00", "2.00", row["backend"]]
    assert line_of(bench.output, "pyfast") == cells
    assert line_of(bench.output, "extra")[-1] == "0.50"
    assert "goal of pyfast's fused ops is 1.25" in bench.output
    assert "left out by --quick: torch.compile" in bench.output


def test_losing_row_is_shown(bench: Bench, times: dict[str, float]) -> None:
    times["pyfast"] = 5.0
    assert bench.run(fake_case(), "--quick") == 0
    assert bench.row()["speedup"] == 0.8 and not bench.row()["failed"]
    assert line_of(bench.output, "pyfast")[1:7] == ["5,000.0", "0.0", "0.00", "20", "5.00", "0.80"]


@pytest.mark.parametrize(
    ("samples", "style"),
    [
        ([1.0, 1.1, 1.2], "green"),
        ([1.9, 1.9, 2.9], ""),  # faster, but the quartile ranges overlap
        ([2.2, 2.2, 2.2], "red"),
        ([4.0, 4.1, 4.2], "red"),
    ],
)
def test_color_of_the_speedup(samples: list[float], style: str) -> None:
    for name, expected in (("pyfast", style), ("torch.compile", "")):
        row = Row("op", "case", [8], "float32", "cpu", name, 64, None)
        row.add_samples(samples, 3, [1.0] * 3, [2.0, 2.1, 2.3])
        assert figures(row)[5].style == expected


@pytest.mark.parametrize(("seconds", "style"), [(1.25, "green"), (1.3, "red")])
def test_color_of_the_bar(seconds: float, style: str) -> None:
    for bar, expected in ((1.25, style), (None, "")):
        row = Row("op", "case", [8], "float32", "cpu", "pyfast", 64, bar)
        row.add_samples([seconds] * 3, 3, [1.0] * 3, [])
        assert [figures(row)[4].style, str(figures(row)[5])] == [expected, "-"]


def _dropout(x: Tensor, p: float, seed: int) -> Tensor:
    return pyfast.nn.functional.dropout(x, p, seed=seed)


class _ForgetsMask(torch.autograd.Function):
    """Dropout whose backward pass lets every gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        return _dropout(x, p, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad / 0.9, None, None


def _keeps_tail(x: Tensor, p: float, seed: int) -> Tensor:
    return torch.cat([_dropout(x, p, seed)[:-9], x[-9:] * (65536 / (65536 - round(65536 * p)))])


def _raises(x: Tensor, p: float, seed: int) -> Tensor:
    raise ValueError("first line\nsecond line")


MUTANTS = {
    "drops nothing": (lambda x, p, seed: x * 1.0, "^output: "),
    "another scale": (lambda x, p, seed: _dropout(x, p, seed) * 1.00002, "^output: "),
    "another mask": (lambda x, p, seed: _dropout(x, p, seed + 1), "^output: "),
    "torch's mask": (lambda x, p, seed: F.dropout(x, p), "^output: "),
    "keeps the tail": (_keeps_tail, "^output: "),
    "NaN": (lambda x, p, seed: _dropout(x, p, seed) * float("nan"), "^output: 1021 of 1021"),
    "another dtype": (lambda x, p, seed: _dropout(x, p, seed).double(), "not .* torch.float32$"),
    "another shape": (lambda x, p, seed: _dropout(x, p, seed)[None], r"^output is \(1, 1021\)"),
    "raises": (_raises, "^ValueError: first line$"),
    "forgets the mask": (lambda x, p, seed: _ForgetsMask.apply(x, p, seed), "^grad of x: "),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_check_rejects(mutant: str) -> None:
    function, problem = MUTANTS[mutant]
    case = fake_case(function, shape=(1021,), backward=mutant == "forgets the mask")
    found = PreparedCase(case, CPU).check()
    assert re.search(problem, found), found


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_every_case_passes_its_check(case: Case) -> None:
    prepared = PreparedCase(case, CPU)
    assert prepared.check() == ""
    copied = prepared.copy_call()()
    assert 2 * copied.nbytes == case.num_bytes == case.num_passes * prepared.inputs[0].nbytes


@pytest.mark.parametrize("case", [c for c in SMALL_CASES if c.dtype == torch.float32], ids=str)
def test_torch_does_the_same_work(case: Case) -> None:
    """Without dropping, the baseline and pyfast must agree, also in what they differentiate."""
    prepared = PreparedCase(replace(case, p=0.0), CPU)
    ours, stock = prepared.call("pyfast")(), prepared.call("torch")()
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_wrong_result_is_red(bench: Bench, tmp_path: Path) -> None:
    case = fake_case(MUTANTS["another mask"][0])
    assert bench.run(case, "--quick", "--plot", tmp_path / "plot.png") == 1
    row = bench.row()
    assert row["failed"] and "values are wrong" in row["problem"] and row["samples_us"] == []
    names = ("median_us", "bandwidth_gbps", "percent_of_copy", "time_over_copy", "speedup")
    assert [row[name] for name in names] == [None] * 5
    assert line_of(bench.output, "pyfast")[1:8] == [*"------", "FAILED:"]
    assert figures(Row(**row))[-1].style == "bold red"
    assert bench.row("torch")["median_us"] > 0


def test_failed_compilation_is_left_out(
    bench: Bench, times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(function: Callable[..., Tensor], **_: Any) -> Callable[..., Tensor]:
        raise RuntimeError("no compiler [here]")

    for compiler, speedup in ((fail, None), (lambda function, **_: function, 4 / 3)):
        monkeypatch.setattr(torch, "compile", compiler)
        assert bench.run(fake_case(backward=True)) == 0
        row = bench.row("torch.compile")
        assert row["speedup"] == pytest.approx(speedup) and not row["failed"]
        is_told = "left out: RuntimeError: no compiler [here]" in bench.output
        assert is_told == (speedup is None)


@pytest.mark.parametrize(("then", "status"), [(2.0, 0), (2.29, 0), (2.31, 1), (20.0, 1), (0.2, 0)])
def test_compare(
    then: float, status: int, bench: Bench, times: dict[str, float], tmp_path: Path
) -> None:
    """Only the ratio of pyfast to torch counts, not that the machine is ten times slower now."""
    case = fake_case(others={"extra": lambda x: x.clone})
    times["pyfast"], times["extra"] = times["torch"] / then, 0.001
    assert bench.run(case, "--quick") == 0
    old = bench.result.rename(tmp_path / "old.json")
    times.update({name: 10 * time_ms for name, time_ms in TIMES_MS.items()})
    assert bench.run(case, "--quick", "--compare", old) == status
    output = bench.output.partition("x torch then")[2]
    assert line_of(output, "fake")[-4:] == ["extra", "4000.00", "0.50", "0.00"]
    assert line_of(output, "pyfast")[-3:] == [f"{then:.2f}", "2.00", f"{2 / then:.2f}"]
    assert f"of 1 speed-ups of pyfast, {status} fell" in output


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


NO_ROWS = '{"environment": {}, "rows": []}'
REFUSED = {
    "op": (lambda _: ("--op", "relu"), "--op must be one of dropout, got relu"),
    "dtype": (lambda _: ("--dtype", "int8"), "--dtype must be one of float32, got int8"),
    "device": (lambda _: ("--device", "tpu"), "--device must be cpu or cuda, got tpu"),
    "cuda": (lambda _: ("--device", "cuda"), "torch sees no CUDA device"),
    "threads": (lambda _: ("--threads", 0), "--threads must be at least 1, got 0"),
    "json": (lambda tmp: ("--json", tmp / "no" / "r.json"), "--json must be a file that can be"),
    "folder": (lambda tmp: ("--json", tmp), "--json must be a file that can be written"),
    "plot": (lambda tmp: ("--plot", tmp / "p.txt"), "ends in .png"),
    "missing": (lambda tmp: ("--compare", tmp / "no.json"), "--compare cannot use"),
    "binary": (lambda _: ("--compare", sys.executable), "--compare cannot use"),
    "text": (lambda tmp: ("--compare", _write(tmp / "old", "words")), "JSONDecodeError"),
    "list": (lambda tmp: ("--compare", _write(tmp / "old", "[1]")), "--compare cannot use"),
    "other": (lambda tmp: ("--compare", _write(tmp / "old", NO_ROWS)), "no case of this run"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_rejects(
    what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, text = REFUSED[what]
    monkeypatch.setattr(_bench, "_load_cases", lambda: {"dropout": [fake_case()]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_bench, "_measure_all", lambda *_: pytest.fail("measured all the same"))
    assert _bench.main(parse("--quick", *words(tmp_path))) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("pyfast bench: ") and text in captured.err


@pytest.mark.parametrize(("package", "words"), [("rich", ()), ("matplotlib", ("--plot", "p.png"))])
def test_missing_package(
    package: str, words: tuple[str, ...], monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else find(n))
    assert _bench.main(parse("--quick", *words)) == 2
    expected = f"pyfast bench: {package} not found: pip install 'pyfast[bench]'\n"
    assert capsys.readouterr().err == expected


def test_measures_in_turns() -> None:
    calls: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: calls.append(name) or (gc.isenabled() and pytest.fail("gc is on"))

    rounds: list[int] = []
    effort = Effort(rounds=4, block_s=0.0, with_compile=False)
    samples = measure({n: call(n) for n in "abc"}, CPU, effort, lambda: rounds.append(len(calls)))
    # Two calls each to find the number of calls, then blocks of an untimed and three timed ones.
    blocks = "abc" + "bca" + "cab" + "abc"
    assert "".join(calls) == "aabbcc" + "".join(4 * name for name in blocks)
    assert rounds == [18, 30, 42, 54] and gc.isenabled()
    assert all(len(seconds) == 4 and num_calls == 3 for seconds, num_calls in samples.values())


def test_number_of_threads(bench: Bench) -> None:
    seen: set[int] = set()

    def record(x: Tensor, **options: Any) -> Tensor:
        seen.add(torch.get_num_threads())
        return pyfast.nn.functional.dropout(x, **options)

    torch.set_num_threads(2)
    assert bench.run(fake_case(record), "--quick", "--threads", 1) == 0
    assert seen == {1} and torch.get_num_threads() == 2
    assert "threads 1" in bench.output and '"threads": 1' in bench.result.read_text()


def test_quick_leaves_out_large_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = fake_case(), fake_case(shape=(1 << 24,))
    monkeypatch.setattr(_bench, "_load_cases", lambda: {"dropout": [small, large]})
    assert _bench._select_cases(parse("--quick")) == [small]
    assert _bench._select_cases(parse("--case", "fake")) == [small, large]


@pytest.mark.parametrize("op", _bench._modules())
def test_benchmark_file(op: str) -> None:
    module = importlib.import_module(_bench._modules()[op])
    assert callable(getattr(module, f"test_{op}"))
    assert {case.op for case in module.CASES} == {op}
    assert len(set(map(str, module.CASES))) == len(module.CASES)


def test_pytest_benchmark() -> None:
    pytest.importorskip("pytest_benchmark", reason="pyfast[bench] is not installed")
    file = Path(__file__).parents[1] / "benchmarks" / "bench_dropout.py"
    chosen = "forward-64-float32 and not grad and not compile"
    words = [sys.executable, "-m", "pytest", str(file), "--benchmark-disable", "-k", chosen]
    done = subprocess.run(words, capture_output=True, text=True, cwd=file.parents[1], timeout=120)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
