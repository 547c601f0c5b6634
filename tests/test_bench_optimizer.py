"""The optimizers' kind of benchmark case: its check, its rows, and a run of the command."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pyfast.benchmarks.bench_optimizer_step import CASES, QUICK, OptimizerCase
from pyfast.benchmarks.cases import Effort

import pyfast
from pyfast import _bench
from pyfast.ops._op import registered

pytest.importorskip("rich", reason="pyfast[bench] is not installed")

CPU = torch.device("cpu")
HASTY = Effort(rounds=3, block_s=2e-4, with_compile=False)
SMALL_SHAPES = {2: (60, 333), 3: (3, 17, 31)}


def small(case: OptimizerCase) -> OptimizerCase:
    return replace(case, shape=SMALL_SHAPES[len(case.shape)])


SMALL_CASES = list({str(small(case)): small(case) for case in CASES}.values())


def find(name: str, dtype: torch.dtype = torch.float32) -> OptimizerCase:
    return next(case for case in SMALL_CASES if (case.name, case.dtype) == (name, dtype))


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_every_row_passes_the_check(case: OptimizerCase) -> None:
    prepared = case.prepare(CPU)
    for name in (*case.rows, "pyfast"):
        assert prepared.check(name) == "", name
    bytes_copied = 2 * prepared.copy_call()().nbytes
    assert 0 <= case.num_bytes - bytes_copied < 2 * case.dtype.itemsize


BYTES = {"AdamW": 7, "Adamax": 7, "RMSprop": 5, "SGD momentum 0.9": 5, "clip, AdamW, EMA": 10}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_tensors_read_and_written(name: str) -> None:
    for case in CASES:
        if case.name == name:
            assert case.num_bytes == BYTES[name] * case.num_elements * case.dtype.itemsize


def _set(name: str, value: Any) -> Callable[[Any, Any], None]:
    def mutated(optimizer: Any, step: Callable[[], None]) -> None:
        for group in optimizer.param_groups:
            group[name] = value
        step()

    return mutated


def _last_element(value: float | None) -> Callable[[Any, Any], None]:
    """Leaves the last element of the last parameter as it was, or sets it."""

    def mutated(optimizer: Any, step: Callable[[], None]) -> None:
        last = optimizer.param_groups[-1]["params"][-1].detach().view(-1)[-1]
        before = last.clone()
        step()
        last.copy_(before if value is None else torch.tensor(value))

    return mutated


def _raise(optimizer: Any, step: Callable[[], None]) -> None:
    raise ValueError("first line\nsecond line")


MUTANTS: dict[str, tuple[str, Callable[[Any, Any], None], str]] = {
    "no step": ("AdamW", lambda optimizer, step: None, "^parameters: "),
    "two steps": ("AdamW", lambda optimizer, step: (step(), step()), "^parameters: "),
    "no decay": ("AdamW", _set("weight_decay", 0.0), "^parameters: "),
    "another eps": ("AdamW", _set("eps", 1e-5), "^parameters: "),
    "one rate": ("AdamW, 50 groups", _set("lr", 0.1), "^parameters: "),
    "no clipping": ("clip, AdamW, EMA", _set("max_grad_norm", None), "^parameters: "),
    "no average": ("clip, AdamW, EMA", _set("ema_decay", 1.0), "^averages: "),
    "other states": ("AdamW, bfloat16 states", _set("betas", (0.8, 0.999)), "^parameters: "),
    "other codes": ("AdamW, int8 states", _set("betas", (0.8, 0.999)), "^parameters: the steps"),
    "NaN of codes": ("AdamW, int8 states", _last_element(math.nan), "are wrong by nan"),
    "last element": ("AdamW", _last_element(None), "^parameters: 1 of 1581 "),
    "NaN": ("AdamW", _last_element(math.nan), "^parameters: 1 of 1581 "),
    "raises": ("AdamW", _raise, "^ValueError: first line$"),
}


def install(name: str, monkeypatch: pytest.MonkeyPatch) -> OptimizerCase:
    """Put a mutant in pyfast's place; returns the case that shows it."""
    case_name, mutated, _ = MUTANTS[name]

    class Mutant(pyfast.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            mutated(self, super().step)

    monkeypatch.setattr(pyfast.optim, "AdamW", Mutant)
    return find(case_name)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_check_rejects(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = install(mutant, monkeypatch).prepare(CPU).check()
    assert re.search(MUTANTS[mutant][2], found), found


def test_check_rejects_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is far above the rounding of the dtype."""
    install("no step", monkeypatch)
    assert find("AdamW", torch.bfloat16).prepare(CPU).check().startswith("parameters: ")


def test_rows_share_parameters_and_gradients_stay() -> None:
    prepared = find("AdamW, 50 groups").prepare(CPU)
    before = [(p.detach().clone(), p.grad.clone()) for p in prepared.params]
    for name in prepared.case.implementations:
        prepared.call(name)()
        for p, (value, grad) in zip(prepared.params, before, strict=True):
            assert torch.equal(p.grad, grad) and not torch.equal(p, value)
            value.copy_(p.detach())


def run(case: OptimizerCase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Any]:
    parser = argparse.ArgumentParser()
    _bench.add_arguments(parser)
    monkeypatch.setattr(_bench, "FULL", HASTY)
    monkeypatch.setattr(_bench, "_load_cases", lambda: {"optimizer_step": [case]})
    result = folder / "result.json"
    status = _bench.main(parser.parse_args(["--json", str(result)]))
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    return status, {row["implementation"]: row for row in rows}


def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def eight_bit(groups: Any) -> torch.optim.Optimizer:
        raise RuntimeError("no kernel for the CPU")

    others = {"bitsandbytes": eight_bit, "torchao": torch.optim.AdamW}
    case = replace(find("AdamW, int8 states"), others=others)
    status, rows = run(case, tmp_path, monkeypatch)
    assert status == 0 and tuple(rows) == ("torch", "bitsandbytes", "torchao", "pyfast")
    left_out = rows.pop("bitsandbytes")
    assert left_out["problem"] == "RuntimeError: no kernel for the CPU" and not left_out["failed"]
    for row in rows.values():
        assert len(row["samples_us"]) == HASTY.rounds and row["speedup"] > 0 and not row["problem"]
        assert row["num_bytes"] == case.num_bytes and row["shape"] == list(case.shape)
    assert rows["pyfast"]["backend"] == registered()["optimizer_step"].backend_of(torch.ones(1))


def test_wrong_result_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, rows = run(install("no decay", monkeypatch), tmp_path, monkeypatch)
    assert status == 1 and rows["pyfast"]["failed"] and rows["pyfast"]["samples_us"] == []
    assert "values are wrong" in rows["pyfast"]["problem"] and not rows["torch"]["failed"]


def test_quick_has_a_case() -> None:
    assert [case.shape for case in CASES if not _bench._is_large(case)] == [QUICK]
