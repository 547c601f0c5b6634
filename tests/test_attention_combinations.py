"""Attention with its features: each by itself, every pair of values of two, and random calls."""

from __future__ import annotations

import functools
import importlib
import itertools
import random
from typing import Any

import pytest
import torch
from attention_cases import DTYPES, LAYOUTS, Case, call, check
from conftest import Backend
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.backends("reference", "cpu", "triton")
AXES = ["".join(c) for n in range(5) for c in itertools.combinations("bhls", n)]
KINDS = ("bool", "float32", "bfloat16", "float16", "same")
LENGTHS = {"num_queries": 37, "num_keys": 66}

FEATURES = (
    *(Case(**LENGTHS, causal=True, alignment=a) for a in ("top_left", "bottom_right")),
    *(Case((1,), 2, 66, 37, causal=True, alignment=a) for a in ("top_left", "bottom_right")),
    *(
        Case(**LENGTHS, window=window, causal=causal, alignment=alignment)
        for window in ((0, 0), (-1, 0), (5, -1), (3, 4), (0, 40), (200, 300))
        for causal in (False, True)
        for alignment in ("top_left", "bottom_right")
    ),
    Case((1,), 1, 300, 40, window=(8, 8)),  # queries behind the keys see none
    Case((1,), 1, 40, 300, window=(8, 8), alignment="bottom_right"),
    Case((1,), 1, 150, 150, window=(20, 0), alignment="bottom_right", p=0.1),
    *(Case(**LENGTHS, softcap=c) for c in (0.5, 2.0, 50.0)),
    *(
        Case(**LENGTHS, alibi=alibi, alignment=a)
        for alibi in ("h", "bh")
        for a in ("top_left", "bottom_right")
    ),
    *(
        Case(**LENGTHS, sinks=True, causal=causal, p=p)
        for causal in (False, True)
        for p in (0.0, 0.5)
    ),
    *(Case(**LENGTHS, heads=6, key_heads=n, causal=n == 2) for n in (1, 2, 3)),
    *(Case(**LENGTHS, p=p, heads=3) for p in (0.1, 0.5, 1.0)),
    Case((2, 2), 3, 20, 33, p=0.3, alibi="bh"),
    *(Case(**LENGTHS, scale=scale) for scale in (-0.5, 0.0, 1.5)),
)

FACTORS: dict[str, tuple[Any, ...]] = {
    "batch": ((1,), (2,), (), (2, 2)),
    "heads": ((2, 0), (4, 2), (3, 1)),
    "lengths": ((1, 70), (37, 66), (66, 37), (64, 64), (5, 5), (130, 17)),
    "size": ((16, 0), (33, 8), (64, 65), (80, 0)),
    "mask": ("", "bool bhls", "bool bs", "float32 bhls", "same hls", "same bs", "float16 ls"),
    "causal": (False, True),
    "alignment": ("top_left", "bottom_right"),
    "window": (None, (0, 0), (5, -1), (-1, 3), (3, 4)),
    "softcap": (0.0, 1.5),
    "alibi": ("", "h", "bh"),
    "sinks": (False, True),
    "p": (0.0, 0.1, 0.5, 1.0),
    "scale": (None, -0.3),
    "layout": ("contiguous", "tokens first", "last dimension strided", "misaligned"),
    "dtype": DTYPES,
}


def pairwise(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Rows in which every two values of two factors meet: greedy, with a fixed seed."""
    chance = random.Random(5)
    names = list(factors)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rows = []
    while missing:
        best: tuple[int, dict[str, int]] = (0, {})
        for _ in range(40):
            row = {name: chance.randrange(len(values)) for name, values in factors.items()}
            a, i, b, j = min(missing)
            row[a], row[b] = i, j
            new = sum(
                (a, row[a], b, row[b]) in missing for a, b in itertools.combinations(names, 2)
            )
            best = max(best, (new, row), key=lambda pair: pair[0])
        row = best[1]
        missing -= {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}
        rows.append({name: factors[name][i] for name, i in row.items()})
    return rows


def case_of(row: dict[str, Any]) -> tuple[Case, torch.dtype]:
    row = dict(row)
    dtype = row.pop("dtype")
    row["heads"], row["key_heads"] = row["heads"]
    row["num_queries"], row["num_keys"] = row.pop("lengths")
    row["size"], row["value_size"] = row["size"]
    return Case(**row), dtype


PAIRWISE = [case_of(row) for row in pairwise(FACTORS)]


def checked(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    check(call, case, dtype, with_slopes=backend.name == "reference")


def test_pairwise_is_complete() -> None:
    rows = pairwise(FACTORS)
    for a, b in itertools.combinations(FACTORS, 2):
        met = {(str(row[a]), str(row[b])) for row in rows}
        assert len(met) == len(FACTORS[a]) * len(FACTORS[b]), (a, b)
    assert len(rows) < 90


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    checked(backend, case, dtype)


@pytest.mark.parametrize("number", range(len(PAIRWISE)))
def test_pairs_of_features(backend: Backend, number: int) -> None:
    checked(backend, *PAIRWISE[number])


@pytest.mark.parametrize("axes", AXES, ids=lambda axes: axes or "none")
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_every_shape(backend: Backend, kind: str, axes: str) -> None:
    """With their gradient, which is summed over the dimensions of size one."""
    dtype = DTYPES[(KINDS.index(kind) + len(axes)) % 3]
    lengths = ((18, 35), (33, 20), (1, 70))[AXES.index(axes) % 3]
    mask = f"{kind} {axes}" if axes else f"{kind} -"
    checked(backend, Case((2,), 3, *lengths, 16, mask=mask), dtype)
    checked(backend, Case((2,), 4, *lengths, 8, key_heads=2, mask=mask, causal=True, p=0.1), dtype)


SEVERAL_BLOCKS = (
    Case((2,), 4, 70, 100, 24, 40, key_heads=2, causal=True, p=0.2),
    Case((1,), 2, 100, 70, 24, causal=True, alignment="bottom_right", p=0.3, mask="bool bhls"),
    Case((1,), 2, 130, 130, 16, window=(20, 30), softcap=1.5, alibi="h", sinks=True),
    Case((1,), 2, 70, 130, 16, window=(40, -1), alignment="bottom_right", mask="float32 bhls"),
    Case((2,), 2, 70, 66, 16, window=(-1, 35), mask="same hls", p=0.1),
    Case((2,), 2, 66, 70, 16, mask="float32 bs", causal=True),
    Case((1,), 3, 66, 70, 16, key_heads=1, mask="float32 ls", sinks=True),
    Case((1,), 6, 5, 130, 16, key_heads=2, causal=True, alignment="bottom_right", sinks=True),
)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("case", SEVERAL_BLOCKS, ids=str)
def test_several_blocks(backend: Backend, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has large tiles, which most cases fill once; here with those of a GPU."""
    tiles = pytest.importorskip("pyfast.kernels.attention.attention_tiles")
    forward, gradient = tiles.Tiles(64, 32, 4, 1), tiles.GradientTiles
    both = gradient(forward, tiles.Tiles(32, 64, 4, 1))
    dtype = DTYPES[SEVERAL_BLOCKS.index(case) % 3]
    chip = importlib.import_module("pyfast.kernels.common.chips").chip(backend.device, dtype)
    for table, entry in ((tiles.FORWARD, forward), (tiles.BACKWARD, both)):
        monkeypatch.setitem(table, chip, dict.fromkeys((64, 128, 256), entry))
    checked(backend, case, dtype)


@pytest.mark.backends("triton")
def test_autotuning(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopwatch that prefers narrow blocks: each candidate is right, the fastest is kept."""
    tiles = pytest.importorskip("pyfast.kernels.attention.attention_tiles")
    start = tiles.Tiles(64, 32, 4, 1)
    timed = []

    def stopwatch(launch: functools.partial[None]) -> float:
        launch()
        timed.append(launch.args[0])
        return float(timed[-1].block_m + (100 if timed[-1].num_warps != 4 else 0))

    monkeypatch.setattr(tiles, "AUTOTUNE", True)
    monkeypatch.setattr(tiles, "_time_ms", stopwatch)
    monkeypatch.setattr(tiles, "_fastest", {})
    chip = importlib.import_module("pyfast.kernels.common.chips").chip(
        backend.device, torch.float32
    )
    for table, entry in (
        (tiles.FORWARD, start),
        (tiles.BACKWARD, tiles.GradientTiles(start, start)),
    ):
        monkeypatch.setitem(table, chip, dict.fromkeys((64, 128, 256), entry))
    case = Case((1,), 2, 70, 66, causal=True, p=0.1)
    checked(backend, case, torch.float32)
    assert timed == 3 * tiles.neighbours(start)
    assert set(tiles._fastest.values()) == {start._replace(block_m=32)}
    checked(backend, case, torch.float32)
    assert len(timed) == 3 * len(tiles.neighbours(start))


def test_float32_products_follow_torch() -> None:
    """By the older switch and the newer, of which one must not be read after the other is set."""
    triton = pytest.importorskip("pyfast.kernels.attention.attention_triton")
    matmul, x = torch.backends.cuda.matmul, torch.zeros(1)
    before = matmul.fp32_precision
    try:
        for value, expected in (("tf32", "tf32"), ("ieee", "tf32x3")):
            matmul.fp32_precision = value
            assert triton._precision(x) == expected
            assert triton._precision(x.bfloat16()) == "ieee"
    finally:
        matmul.fp32_precision = before


CHIPS = {(8, 0): "large", (8, 6): "small", (9, 0): "hopper", (10, 0): "large", (12, 0): "small"}


@pytest.mark.parametrize("capability", CHIPS)
def test_tiles_fit_the_chip(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = pytest.importorskip("pyfast.kernels.attention.attention_tiles")
    chips = importlib.import_module("pyfast.kernels.common.chips")
    monkeypatch.setattr(chips, "_capability", lambda index: capability)
    device = torch.device("cuda", 0)
    assert chips.chip(device, torch.bfloat16) == CHIPS[capability]
    assert chips.chip(device, torch.float32) == "float32"
    fits = CHIPS[capability] != "small"
    assert tiles.can_differentiate(device, torch.float32, 256) == fits
    assert tiles.can_differentiate(device, torch.float32, 128)
    assert tiles.can_differentiate(device, torch.bfloat16, 256)


def test_autotuning_starts_at_the_tables_entry() -> None:
    tiles = pytest.importorskip("pyfast.kernels.attention.attention_tiles")
    found = tiles.neighbours(tiles.Tiles(128, 32, 8, 4, 64))
    assert found[0] == (128, 32, 8, 4, 64)
    assert {tuple(t) for t in found[1:]} == {
        (64, 32, 8, 4, 64),
        (128, 64, 8, 4, 64),
        (128, 32, 4, 4, 64),
        (128, 32, 8, 3, 64),
    }


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, torch.dtype]:
    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    side = st.integers(-1, 40)
    key_heads = one_of(1, 2, 3)
    case = Case(
        batch=one_of((), (1,), (2,), (3,), (2, 1), (1, 2)),
        heads=key_heads * one_of(1, 2, 3),
        key_heads=key_heads,
        num_queries=draw(st.integers(0, 90)),
        num_keys=draw(st.integers(0, 150)),
        size=draw(st.integers(1, 70)),
        value_size=draw(st.integers(1, 70)),
        mask=one_of("", "", f"{one_of(*KINDS)} {one_of(*AXES) or '-'}"),
        causal=one_of(False, True),
        alignment=one_of("top_left", "bottom_right"),
        window=one_of(None, (draw(side), draw(side))),
        softcap=one_of(0.0, 0.0, 1.0),
        alibi=one_of("", "", "h", "bh"),
        sinks=one_of(False, True),
        p=one_of(0.0, 0.0, 0.2, 0.9),
        scale=one_of(None, 0.3, -1.0),
        layout=one_of(*LAYOUTS) if draw(st.booleans()) else "contiguous",
    )
    return case, one_of(*DTYPES)


@settings(max_examples=30)
@given(drawn=cases())
def test_random_calls(backend: Backend, drawn: tuple[Case, torch.dtype]) -> None:
    case, dtype = drawn
    if case.layout.startswith("expanded") and 0 in (*case.score_shape, case.num_keys):
        return  # nothing to expand
    checked(backend, case, dtype)
