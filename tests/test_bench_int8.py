"""The int8 kinds of benchmark case: their checks, their rows, and a run of the command."""

from __future__ import annotations

import argparse
import json
import math
import re
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pyfast.benchmarks import bench_int8_linear, bench_quantize_int8
from pyfast.benchmarks.bench_int8_linear import LinearCase
from pyfast.benchmarks.bench_quantize_int8 import QuantizeCase
from pyfast.benchmarks.cases import BaseCase, Effort
from pyfast.benchmarks.rows import Row
from torch import Tensor

import pyfast.nn.functional as pyfast_F
from pyfast import _bench
from pyfast._bench_report import print_table
from pyfast.ops._op import registered

pytest.importorskip("rich", reason="pyfast[bench] is not installed")

CPU = torch.device("cpu")
HASTY = Effort(rounds=3, block_s=2e-4, with_compile=False)
K, N = 80, 45
POOL_BYTES = 4 * K * N  # 4 int8 weights, 2 bfloat16, 1 float32


def small(case: LinearCase) -> LinearCase:
    shape = (min(case.shape[0], 35), K, N)
    return replace(case, shape=shape, pool_bytes=POOL_BYTES)


LINEARS = list({str(small(case)): small(case) for case in bench_int8_linear.CASES}.values())
QUANTIZE = [replace(case, shape=(9, 83)) for case in bench_quantize_int8.CASES[:2]]


def find(name: str, tokens: int, dtype: torch.dtype = torch.bfloat16) -> LinearCase:
    return next(c for c in LINEARS if (c.name, c.shape[0], c.dtype) == (name, tokens, dtype))


@pytest.mark.parametrize("case", [*LINEARS, *QUANTIZE], ids=str)
def test_every_case_passes_its_check(case: BaseCase) -> None:
    prepared = case.prepare(CPU)
    assert prepared.check() == ""
    assert 0 <= case.num_bytes - 2 * prepared.copy_call()().nbytes < 2 * case.dtype.itemsize


def test_rows_compute_the_same() -> None:
    """All but those that leave something out, within the errors of their roundings."""
    for case in (find("W8A8", 16), find("weight-only", 16)):
        prepared = case.prepare(CPU)
        expected = prepared.call("torch")().float()
        for name in case.implementations:
            y = prepared.call(name)().float()
            if name not in ("read", "torch._int_mm", "torch._weight_int8pack_mm"):
                assert y.shape == (16, N), name
                assert (y - expected).norm() < 0.05 * expected.norm(), name
        exact = prepared.call("torch float32")()
        if case.name == "weight-only":
            y = prepared.call("torch._weight_int8pack_mm")().float() + prepared.bias.float()
        else:
            scales = bench_quantize_int8.quantize_rows(prepared.x)[1][:, None] * prepared.scale
            y = prepared.call("torch._int_mm")() * scales + prepared.bias.float()
        assert (y - exact).norm() < 0.05 * exact.norm()
        assert prepared.call("read")().item() == prepared.weight.view(-1).view(torch.int64).sum()


def test_dynamic_is_of_onednn_and_the_engine_stays() -> None:
    before = torch.backends.quantized.engine
    assert before != "onednn"
    linear = torch.nn.Linear(K, N).requires_grad_(False)
    with pytest.warns(DeprecationWarning):
        module = bench_int8_linear._dynamic(linear, find("W8A8", 1))
    assert torch.backends.quantized.engine == before
    assert "LinearPackedParamsBase" in str(module._packed_params._packed_params._type())


def test_weights_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def record(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append(weight.data_ptr())
        return x

    monkeypatch.setattr(bench_int8_linear.F, "linear", record)
    monkeypatch.setattr(bench_int8_linear, "pyfast_F", types.SimpleNamespace(int8_linear=record))
    prepared = find("W8A8", 4).prepare(CPU)
    for name, count in (("pyfast", 4), ("torch", 2), ("torch float32", 1)):
        seen.clear()
        call = prepared.call(name)
        for _ in range(2 * count):
            call()
        assert len(set(seen)) == count and seen[:count] == seen[count:]
    copy = prepared.copy_call()
    assert len({copy().data_ptr() for _ in range(3)}) == 3


Mutant = Callable[..., Any]


def _linear(**changes: Any) -> Mutant:
    """pyfast's function with some of its arguments changed."""

    def mutated(x: Any, weight: Any, scale: Any, bias: Any, weight_only: bool) -> Any:
        values = {"x": x, "weight": weight, "weight_scale": scale, "bias": bias}
        values = {name: changes.get(name, lambda t: t)(t) for name, t in values.items()}
        other = changes.get("weight_only", lambda value: value)(weight_only)
        return pyfast_F.int8_linear(**values, weight_only=other)

    return mutated


def _replaced(t: Tensor, value: float) -> Tensor:
    t = t.clone()
    t.view(-1)[-1] = value
    return t


MUTANTS: dict[str, tuple[str, Mutant]] = {
    "scale off": ("W8A8", _linear(weight_scale=lambda t: t * (127 / 128))),
    "scale of another row": ("W8A8", _linear(weight_scale=lambda t: t.roll(1))),
    "no bias": ("W8A8", _linear(bias=lambda t: None)),
    "tail of K": ("W8A8", _linear(x=lambda t: _replaced(t, 0.0))),
    "one weight": ("weight-only", _linear(weight=lambda t: _replaced(t, -100))),
    "not quantized": ("W8A8", _linear(weight_only=lambda value: True)),
    "quantized": ("weight-only", _linear(weight_only=lambda value: False)),
    "NaN": ("weight-only", _linear(bias=lambda t: _replaced(t, math.nan))),
    "another dtype": ("weight-only", lambda *a, **o: pyfast_F.int8_linear(*a, **o).double()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_check_rejects(mutant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    name, function = MUTANTS[mutant]
    monkeypatch.setattr(bench_int8_linear, "pyfast_F", types.SimpleNamespace(int8_linear=function))
    found = find(name, 35, dtype).prepare(CPU).check()
    assert re.search(r"^output(: \d+ of 1575 values are wrong| is .* torch.float64, not)", found)


QUANTIZE_MUTANTS = {
    "half away": lambda v, s, x: ((x.float() / s[:, None]).abs().add(0.5).floor() * x.sign(), s),
    "scale off": lambda v, s, x: (v, s * (127 / 128)),
    "last value": lambda v, s, x: (_replaced(v, 1 - int(v[-1, -1])), s),
}


@pytest.mark.parametrize("mutant", QUANTIZE_MUTANTS)
def test_check_of_quantize_rejects(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = QuantizeCase("quantize_int8", "rows", (9, 83), torch.float32).prepare(CPU)
    prepared.x[0].copy_(torch.arange(83) + 0.5)[0] = 127.0  # halves
    assert prepared.check() == ""

    def mutated(x: Tensor) -> tuple[Tensor, Tensor]:
        values, scale = QUANTIZE_MUTANTS[mutant](*pyfast_F.quantize_int8(x), x)
        return values.to(torch.int8), scale

    fake = types.SimpleNamespace(quantize_int8=mutated)
    monkeypatch.setattr(bench_quantize_int8, "pyfast_F", fake)
    assert re.match(r"(values|scale): \d+ of \d+ differ$", prepared.check())


def run(case: BaseCase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Any]:
    parser = argparse.ArgumentParser()
    _bench.add_arguments(parser)
    monkeypatch.setattr(_bench, "FULL", HASTY)
    monkeypatch.setattr(_bench, "_load_cases", lambda: {case.op: [case]})
    result = folder / "result.json"
    status = _bench.main(parser.parse_args(["--json", str(result)]))
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    return status, {row["implementation"]: row for row in rows}


@pytest.mark.parametrize("name", ["W8A8", "weight-only"])
def test_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floors = {"torch": 1.0, "read": 0.5}
    case = replace(find(name, 1), floors=floors)
    status, rows = run(case, tmp_path, monkeypatch)
    assert status == 0 and tuple(rows) == case.implementations
    for row in rows.values():
        assert len(row["samples_us"]) == HASTY.rounds and not row["problem"]
        assert row["num_bytes"] == case.num_bytes and row["shape"] == [1, K, N]
        assert row["floors"] == (floors if row["implementation"] == "pyfast" else {})
    row = rows["pyfast"]
    assert row["backend"] == registered()["int8_linear"].backend_of(torch.ones(1))
    assert row["ratios"]["torch"] == row["speedup"] and set(row["ratios"]) == set(floors)


def test_floors_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    row = Row("op", "case", [8], "float32", "cpu", "pyfast", 64, None)
    row.floors = {"torch": 2.0, "read": 0.8, "dynamic": 1.0}
    row.add_samples([1.0, 1.0, 2.0], 3, [1.0] * 3, [])
    row.add_ratios([1.0, 1.0, 2.0], {"torch": [3.0, 1.0, 6.0], "read": [0.7, 0.7, 0.7]})
    assert row.ratios == {"torch": 3.0, "read": 0.7}  # dynamic was left out
    console = Console(force_terminal=True, color_system="standard", width=200)
    print_table(console, [row], {"command": ""})
    lines = [line for line in capsys.readouterr().out.splitlines() if "pyfast than" in line]
    assert len(lines) == 2
    assert re.search(r"torch +\x1b\[32m +3\.00\x1b\[0m +2\.00", lines[0])
    assert re.search(r"read +\x1b\[31m +0\.70\x1b\[0m +0\.80", lines[1])


def test_floors_are_of_rows_that_there_are() -> None:
    for case in bench_int8_linear.CASES:
        assert case.floors and set(case.floors) <= set(case.implementations)


def test_wrong_result_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.SimpleNamespace(int8_linear=MUTANTS["scale off"][1])
    monkeypatch.setattr(bench_int8_linear, "pyfast_F", fake)
    status, rows = run(find("W8A8", 4), tmp_path, monkeypatch)
    assert status == 1 and rows["pyfast"]["failed"] and rows["pyfast"]["samples_us"] == []
    assert rows["pyfast"]["ratios"] == {} and not rows["torch"]["failed"]


def test_pools_do_not_fit_into_a_cache() -> None:
    for case in bench_int8_linear.CASES:
        assert case.pool_bytes >= 1 << 28


def test_quick_has_cases() -> None:
    for module in (bench_int8_linear, bench_quantize_int8):
        assert [case for case in module.CASES if not _bench._is_large(case)]
