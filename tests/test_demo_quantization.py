"""The demo's last act: int8 copies of the trained model, their checks, and cached generation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_demo import CONTEXT, LAYERS, SIZES, WIDTH, read_json, run_demo
from torch import Tensor

import pyfast.quantization
from pyfast.demo import quantization
from pyfast.demo import run as course
from pyfast.demo.data import Corpus
from pyfast.demo.generation import Decoder, generate, readable
from pyfast.demo.model import GPT
from pyfast.demo.options import Options
from pyfast.demo.quantization import (
    CACHES,
    FLOAT,
    MAX_CHANGE,
    ROUNDING_NOISE,
    SMOOTH,
    W8A8,
    WEIGHT_ONLY,
    Variant,
    judge,
)

NAMES = [FLOAT, WEIGHT_ONLY, W8A8, SMOOTH]
Trained = tuple[GPT, Corpus, Options, bytes]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_bytes(Path(torch.overrides.__file__).read_bytes()[:20_000])
    return path


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    """The folder of a run, and what its last act was given."""
    folder = tmp_path_factory.mktemp("demo")
    given: list[Trained] = []

    def keep(*arguments: Any) -> Any:
        given.append(arguments)
        return quantization.quantize(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(course, "quantize", keep)
        assert run_demo(text=text, out=folder, **SIZES) == 0
    return folder, given[0]


def test_figures_are_those_of_the_windows(finished: tuple[Path, Trained]) -> None:
    content = read_json(finished[0])
    found = content["quantization"]
    variants = found["variants"]
    assert list(variants) == NAMES and found["problems"] == [] and content["passed"] is True
    assert variants[FLOAT]["held_out_losses"] == content["curves"]["patched"]["held_out_loss"]
    for name, variant in variants.items():
        losses = variant["held_out_losses"]
        loss = sum(losses) / len(losses)
        assert variant["held_out_loss"] == pytest.approx(loss)
        assert variant["bits_per_byte"] == pytest.approx(loss / math.log(2))
        assert list(variant["tokens_per_second"]) == list(CACHES)
        assert all(rate > 0 for rate in variant["tokens_per_second"].values())
        if name != FLOAT:
            change = loss / variants[FLOAT]["held_out_loss"] - 1
            assert found["changes"][name] == pytest.approx(change, abs=1e-12) and change != 0
    pairs = zip(variants[SMOOTH]["held_out_losses"], variants[W8A8]["held_out_losses"], strict=True)
    differences = [a - b for a, b in pairs]
    assert found["difference"] == pytest.approx(sum(differences) / len(differences), abs=1e-12)
    assert found["difference"] <= found["bound"] and any(differences)


def test_weights_are_int8_with_a_scale_a_row(finished: tuple[Path, Trained]) -> None:
    variants = read_json(finished[0])["quantization"]["variants"]
    rows = LAYERS * (3 + 1 + 4 + 1) * WIDTH + 256
    weights = LAYERS * (3 + 1 + 4 + 4) * WIDTH**2 + 256 * WIDTH
    before = variants[FLOAT]["weight_bytes"]
    assert before == 4 * sum(p.numel() for p in finished[1][0].parameters())
    for name in (WEIGHT_ONLY, W8A8):
        assert variants[name]["weight_bytes"] == before - 3 * weights + 4 * rows
        assert variants[name]["num_quantized"] == 4 * LAYERS + 1
    smooth = variants[SMOOTH]["weight_bytes"] - variants[W8A8]["weight_bytes"]
    assert smooth == 4 * (LAYERS * (1 + 4) * WIDTH + WIDTH)  # of linear1, linear2 and the head


def test_reports_show_the_table(finished: tuple[Path, Trained]) -> None:
    folder = finished[0]
    variants = read_json(folder)["quantization"]["variants"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"<th>{name}</th>" in page
        assert f"<td>{variants[name]['held_out_loss']:.4f}</td>" in page
        assert f"<td>{variants[name]['bits_per_byte']:.4f}</td>" in page
    assert "tokens/s, int8 cache" in page and "smaller in int8" in page
    assert f"{SMOOTH} no worse than {W8A8}: " in page


def test_trained_model_stays_as_it_is(finished: tuple[Path, Trained]) -> None:
    model = finished[1][0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not [m for m in model.modules() if type(m).__name__.startswith("Int8")]


def _each_scale(change: Callable[[Tensor], Tensor]) -> Callable[[GPT], None]:
    def spoil(model: GPT) -> None:
        for name, buffer in model.named_buffers():
            if name.endswith("weight_scale"):
                buffer.copy_(change(buffer))

    return spoil


def _zero_head(model: GPT) -> None:
    model.head.weight.zero_()


def _other_rows(model: GPT) -> None:
    model.head.weight.copy_(model.head.weight.roll(1, 0))


def _nan_bias(model: GPT) -> None:
    with torch.no_grad():
        model.norm.bias[0] = math.nan


SPOILED: dict[str, Callable[[GPT], None]] = {
    "half the scale": _each_scale(lambda t: t / 2),
    "other rows": _other_rows,
    "no head": _zero_head,
    "NaN": _nan_bias,
}


def _spoil(patch: pytest.MonkeyPatch, spoil: Callable[[GPT], None], kinds: tuple[str, ...]) -> None:
    """Spoil what quantize_ does, with these configurations."""
    whole = pyfast.quantization.quantize_

    def spoiled(model: GPT, config: Any) -> Any:
        report = whole(model, config)
        if type(config).__name__ in kinds:
            spoil(model)
        return report

    patch.setattr(pyfast.quantization, "quantize_", spoiled)


CONFIGS = {
    WEIGHT_ONLY: "Int8WeightOnly",
    W8A8: "Int8DynamicActivationInt8Weight",
    SMOOTH: "SmoothQuant",
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("how", SPOILED)
def test_spoiled_quantization_is_a_problem(
    name: str, how: str, finished: tuple[Path, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = finished[1][0]
    _spoil(monkeypatch, SPOILED[how], (CONFIGS[name],))
    problems = quantization.quantize(copy.deepcopy(model), *finished[1][1:]).problems
    # What W8A8 loses, SmoothQuant is measured by; NaN compares with nothing.
    assert problems[0].startswith(f"{name}: the held-out loss "), problems
    assert len(problems) == (2 if (name, how) == (W8A8, "NaN") else 1), problems


def test_nothing_quantized_is_a_problem(
    finished: tuple[Path, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyfast.quantization, "quantize_", lambda model, config: None)
    problems = quantization.quantize(*finished[1]).problems
    text = "no weight is int8, or they take no less memory"
    assert problems == tuple(f"{name}: {text}" for name in NAMES[1:])


def test_spoiled_quantization_fails_the_demo(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _spoil(monkeypatch, _zero_head, tuple(CONFIGS.values()))
    assert run_demo(text=text, out=tmp_path, **SIZES) == 1
    content = read_json(tmp_path)
    assert content["passed"] is False and content["comparison"]["problems"] == []
    problems = content["quantization"]["problems"]
    assert [problem.partition(":")[0] for problem in problems] == [WEIGHT_ONLY, W8A8]
    output = " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for problem in problems:
        assert f"FAILED: {problem}" in output and problem in page
    assert '<b class="failed">failed</b>' in page


def test_model_that_did_not_learn_is_not_quantized(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyfast.nn.Dropout, "forward", lambda self, input: input * math.nan)
    assert run_demo(text=text, out=tmp_path, **SIZES | {"steps": 5}) == 1
    assert read_json(tmp_path)["quantization"] is None
    assert "smaller in int8" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def variants(**shifts: float) -> list[Variant]:
    """Figures whose losses are 2 and 4, shifted."""
    names = {"weight_only": WEIGHT_ONLY, "w8a8": W8A8, "smooth": SMOOTH}
    losses = torch.tensor([2.0, 4.0], dtype=torch.float64)
    found = [Variant(FLOAT, losses, 400, 0, {})]
    return found + [
        Variant(name, losses + shifts.get(key, 0.0), 100, 5, {}) for key, name in names.items()
    ]


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("key", ["weight_only", "w8a8"])
def test_change_is_a_share_of_the_loss_and_two_sided(key: str, sign: int) -> None:
    most = 3.0 * MAX_CHANGE[WEIGHT_ONLY if key == "weight_only" else W8A8]
    for factor, count in ((0.99, 0), (1.01, 1)):
        shift = sign * factor * most
        found = judge(variants(**{"smooth": -1.0, key: shift}))
        assert len(found.problems) == count, found.problems
    assert (MAX_CHANGE[WEIGHT_ONLY], MAX_CHANGE[W8A8]) == (0.005, 0.02)


def test_smoothquant_may_be_better_but_not_worse() -> None:
    bound = 3 * math.sqrt(2) * ROUNDING_NOISE
    for shift, count in ((-1.0, 0), (0.99 * bound, 0), (1.01 * bound, 1)):
        found = judge(variants(smooth=shift))
        assert found.bound == pytest.approx(bound)
        assert len(found.problems) == count, found.problems
    assert len(judge(variants(smooth=math.nan)).problems) == 1
    losses = torch.tensor([2.0, 4.01], dtype=torch.float64)
    found = judge([*variants()[:3], Variant(SMOOTH, losses, 100, 5, {})])
    assert found.difference == pytest.approx(0.005)
    assert found.standard_error == pytest.approx(0.005)  # of 0 and 0.01
    expected = 3 * math.sqrt(0.005**2 + 2 * ROUNDING_NOISE**2)
    assert found.bound == pytest.approx(expected)


def test_weights_that_take_no_less_memory_are_a_problem() -> None:
    found = variants()
    found[2] = Variant(W8A8, found[2].held_out_losses, 400, 5, {})
    assert judge(found).problems[0].startswith("W8A8: no weight is int8, or they take no less")


@pytest.fixture(scope="module", params=["stock", "patched", WEIGHT_ONLY, W8A8])
def model(request: pytest.FixtureRequest) -> GPT:
    torch.manual_seed(0)
    model = GPT(layers=2, width=32, heads=2, context=CONTEXT).eval()
    if request.param != "stock":
        pyfast.patch(model)
    if request.param in CONFIGS:
        config = getattr(pyfast.quantization, CONFIGS[request.param])()
        pyfast.quantization.quantize_(model, config)
    return model


@pytest.mark.parametrize("cache", CACHES)
@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_text(model: GPT, cache: str) -> None:
    text = torch.randint(256, (CONTEXT,), generator=torch.Generator().manual_seed(1))
    expected = model(text[None])[0]
    decoder = Decoder(model, CACHES[cache])
    found, end = [decoder.read(text[:5].tolist())], 5
    for count in (1, 1, 3, *[1] * (CONTEXT - 10)):
        found.append(decoder.read(text[end : end + count].tolist()))
        end += count
    places = torch.tensor([4, 5, 6, *range(9, CONTEXT)])
    error = (torch.stack(found) - expected[places]).norm() / expected[places].norm()
    # An int8 cache rounds to 127 steps; W8A8 may, where sums in another order are at a half.
    is_exact = cache == "float32" and getattr(model.head, "mode", "") != "dynamic"
    assert decoder.length == end == CONTEXT
    assert error < (1e-5 if is_exact else 0.01)
    assert error > 0 or cache == "float32"


@torch.no_grad()
def test_text_goes_on_behind_a_full_cache(model: GPT) -> None:
    prompt = b"def f(x):"
    text = generate(model, prompt, 30, seed=0)
    assert len(text) == len(prompt) + 30 and text.startswith(prompt)
    assert text == generate(model, prompt, 30, seed=0) != generate(model, prompt, 30, seed=1)
    # The cache is full at 16 bytes; the 17th is read behind the last 7 of those.
    for length in (CONTEXT, CONTEXT + 1, CONTEXT + 5):
        begin = 0 if length <= CONTEXT else CONTEXT + 1 - CONTEXT // 2
        expected = model(torch.tensor([list(text[begin:length])]))[0, -1]
        state = _draws(len(prompt), length, text, model)
        torch.testing.assert_close(state, expected, rtol=0.02, atol=0.02)


def _draws(start: int, length: int, text: bytes, model: GPT) -> Tensor:
    """The logits that the byte at ``length`` was drawn with."""
    seen: list[Tensor] = []
    read = Decoder.read

    def record(self: Decoder, part: list[int]) -> Tensor:
        seen.append(read(self, part))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "read", record)
        assert generate(model, text[:start], length + 1 - start, seed=0) == text[: length + 1]
    return seen[-1]


@pytest.mark.parametrize("context", [1, 2, 3])
def test_short_contexts_and_long_prompts(context: int) -> None:
    model = GPT(layers=1, width=8, heads=2, context=context).eval()
    assert len(generate(model, b"12345", 7, seed=0)) == 12


def test_generation_stops_at_nan() -> None:
    model = GPT(layers=1, width=8, heads=2, context=8)
    torch.nn.init.constant_(model.head.bias, math.nan)
    assert generate(model, b"ab", 7, seed=0) == b"ab"


def test_text_is_readable() -> None:
    assert readable(b"a\nb\x00\xff\x1b[0m") == "a\nb\N{REPLACEMENT CHARACTER}" + (
        "\N{REPLACEMENT CHARACTER}" * 2 + "[0m"
    )
