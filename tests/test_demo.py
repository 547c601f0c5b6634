"""``python -m pyfast demo``: tiny runs in this process, its checks, and what it refuses."""

from __future__ import annotations

import argparse
import base64
import html.parser
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

import pyfast
from pyfast import demo
from pyfast.demo import run as course
from pyfast.demo import training
from pyfast.demo.comparison import TRAINING_NOISE, compare
from pyfast.demo.data import Corpus, load_corpus, random_windows, spaced_windows
from pyfast.demo.model import GPT
from pyfast.demo.options import Options
from pyfast.demo.training import Run, make_run

STEPS, LAYERS, WIDTH, CONTEXT, BATCH = 30, 2, 32, 16, 4
SIZES = {
    "steps": STEPS,
    "layers": LAYERS,
    "width": WIDTH,
    "heads": 2,
    "context": CONTEXT,
    "batch": BATCH,
}


def run_demo(**options: object) -> int:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in options.items())
    return demo.main(parser.parse_args([word for pair in pairs for word in pair]))


def read_json(folder: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"report.json holds {constant}, which is not JSON")

    text = (folder / "report.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return content


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_bytes(Path(argparse.__file__).read_bytes()[:20_000])
    return path


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "new" / "report"
    assert run_demo(text=text, out=folder, **SIZES) == 0
    return folder


def test_losses_fall_and_are_finite(finished: Path) -> None:
    curves = read_json(finished)["curves"]
    assert set(curves) == {"stock", "patched"}
    for curve in curves.values():
        losses = curve["training_loss"]
        assert len(losses) == len(curve["step_seconds"]) == STEPS
        assert all(map(math.isfinite, losses + curve["held_out_loss"]))
        assert abs(losses[0] - math.log(256)) < 0.7
        assert fmean(losses[-5:]) < losses[0] - 0.2  # of 64 bytes each: noisy
        assert fmean(curve["held_out_loss"]) < losses[0] - 0.4
    assert curves["stock"]["training_loss"] != curves["patched"]["training_loss"]


def test_comparison_is_that_of_the_curves(finished: Path) -> None:
    content = read_json(finished)
    figures, curves = content["comparison"], content["curves"]
    warmup = figures["warmup_steps"]
    times = [sorted(curves[name]["step_seconds"][warmup:]) for name in ("stock", "patched")]
    middles = [(t[(len(t) - 1) // 2] + t[len(t) // 2]) / 2 for t in times]
    assert figures["speedup"] == pytest.approx(middles[0] / middles[1])
    assert figures["pairwise_speedup"] > 0
    for name in ("stock", "patched"):
        held_out = curves[name]["held_out_loss"]
        assert figures[name]["held_out_loss"] == pytest.approx(sum(held_out) / len(held_out))
        last = curves[name]["training_loss"][-figures["last_steps"] :]
        assert figures[name]["training_loss"] == pytest.approx(sum(last) / len(last))
    assert abs(figures["difference"]) <= figures["bound"]
    assert content["passed"] is True
    assert figures["problems"] == []


def test_stock_saves_a_float_mask_for_every_dropout_and_patched_none(finished: Path) -> None:
    figures = read_json(finished)["comparison"]
    floats = BATCH * CONTEXT * WIDTH * (1 + LAYERS * (1 + 4 + 1))
    weights = LAYERS * BATCH * SIZES["heads"] * CONTEXT**2  # of the softmax, kept by attention
    saved = figures["stock"]["saved_bytes"] - figures["patched"]["saved_bytes"]
    assert saved > 4 * (floats + weights)
    assert figures["stock"]["peak_bytes"] is None


def test_patched_modules_are_listed(finished: Path) -> None:
    entries = read_json(finished)["patch"]
    swapped = [entry["path"] for entry in entries if entry["to"] == "pyfast.nn.Dropout"]
    names = ("dropout", "dropout1", "dropout2")
    blocks = [f"blocks.{layer}.{name}" for layer in range(LAYERS) for name in names]
    assert swapped == ["dropout", *blocks]
    attention = [e["path"] for e in entries if e["to"] == "pyfast.nn.MultiheadAttention"]
    assert attention == [f"blocks.{layer}.self_attn" for layer in range(LAYERS)]
    layers = [e["path"] for e in entries if e["to"] == "pyfast.nn.TransformerEncoderLayer"]
    assert layers == [f"blocks.{layer}" for layer in range(LAYERS)]
    assert not [entry for entry in entries if entry["to"] is None]


def test_optimizers_are_named(finished: Path) -> None:
    names = {"stock": "torch.optim.AdamW", "patched": "pyfast.optim.AdamW"}
    assert read_json(finished)["optimizers"] == names
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "Optimizer: stock torch.optim.AdamW, patched pyfast.optim.AdamW.</p>" in page
    assert "pyfast.patch(model), pyfast.patch_optimizer(optimizer)" in page


@pytest.mark.parametrize(("name", "dtype"), [("int8", torch.uint8), ("bfloat16", torch.bfloat16)])
def test_state_dtype(
    name: str, dtype: torch.dtype, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Run] = []
    monkeypatch.setattr(course, "compare", lambda *a: runs.extend(a[:2]) or compare(*a))
    assert run_demo(text=text, out=tmp_path, state_dtype=name, **SIZES) == 0
    found = [{state["exp_avg"].dtype for state in run.optimizer.state.values()} for run in runs]
    assert found == [{torch.float32}, {dtype}]
    assert f"--state-dtype {name}" in read_json(tmp_path)["command"]
    assert f"AdamW with {name} states" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_broken_optimizer_fails(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyfast.optim.AdamW, "step", lambda self: None)
    assert run_demo(text=text, out=tmp_path, **SIZES) == 1
    assert "held-out losses differ" in read_json(tmp_path)["comparison"]["problems"][-1]
    losses = [read_json(f)["curves"]["stock"]["training_loss"] for f in (tmp_path, finished)]
    assert losses[0] == losses[1]


def test_report_repeats_the_command_and_names_the_machine(finished: Path, text: Path) -> None:
    content = read_json(finished)
    assert content["command"].startswith("python -m pyfast demo --steps 30 --layers 2 --width 32")
    assert f"--text {text} --out {finished}" in content["command"]
    assert "--device" not in content["command"]
    environment = content["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["pyfast"] == pyfast.__version__
    assert environment["threads"] == str(torch.get_num_threads())
    assert any("dropout" in key and "reference usable" in environment[key] for key in environment)


class References(html.parser.HTMLParser):
    """What a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


def test_html_is_self_contained(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    references = References()
    references.feed(page)
    assert len(references.found) == references.tags.count("img") == 2
    for reference in references.found:
        kind, _, data = reference.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    assert not {"script", "link", "iframe"}.intersection(references.tags)
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert "pyfast.nn.Dropout" in page and "held-out loss" in page


def test_html_escapes_what_it_did_not_write(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "<b>.txt"
    path.write_bytes(text.read_bytes())
    assert run_demo(text=path, out=tmp_path / "out", **SIZES | {"steps": 5}) in (0, 1)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<b>.txt" not in page and "&lt;b&gt;.txt" in page


def test_same_seed_same_losses(finished: Path, text: Path, tmp_path: Path) -> None:
    first = read_json(finished)
    torch.manual_seed(12345)
    assert run_demo(text=text, out=tmp_path / "again", **SIZES) == 0
    second = read_json(tmp_path / "again")
    for name in ("stock", "patched"):
        for curve in ("training_loss", "held_out_loss"):
            assert first["curves"][name][curve] == second["curves"][name][curve]
    assert first["sample"] == second["sample"]
    run_demo(text=text, out=tmp_path / "other", seed=1, **SIZES)
    other = read_json(tmp_path / "other")["curves"]["stock"]["training_loss"]
    assert other != first["curves"]["stock"]["training_loss"]


def test_random_state_of_the_caller_is_kept(text: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run_demo(text=text, out=tmp_path, **SIZES | {"steps": 5})
    assert torch.equal(torch.get_rng_state(), before)


def test_broken_dropout_fails_and_does_not_touch_stock(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyfast.nn.Dropout, "forward", lambda self, input: input * math.nan)
    assert run_demo(text=text, out=tmp_path, **SIZES) == 1
    content = read_json(tmp_path)
    assert content["passed"] is False
    assert content["comparison"]["problems"] == ["patched: a loss is not finite"]
    assert content["curves"]["patched"]["training_loss"] == [None] * STEPS
    expected = read_json(finished)["curves"]["stock"]["training_loss"]
    assert content["curves"]["stock"]["training_loss"] == expected


def test_disagreement_fails(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pyfast.nn.Dropout, "forward", lambda self, input: input * 0)
    assert run_demo(text=text, out=tmp_path, **SIZES | {"steps": 60}) == 1
    (problem,) = read_json(tmp_path)["comparison"]["problems"]
    assert problem.startswith("the held-out losses differ by ")
    assert "FAILED" in capsys.readouterr().out
    assert "do not agree" in (tmp_path / "report.html").read_text(encoding="utf-8")


def fake_run(name: str, losses: list[float], held_out: list[float]) -> Run:
    model = GPT(layers=1, width=8, heads=2, context=8)
    run = make_run(name, model)
    run.losses = losses
    run.step_seconds = [1.0 if name == "stock" else 0.5] * len(losses)
    run.held_out_losses = torch.tensor(held_out, dtype=torch.float64)
    return run


FALLING = [5.0 - 0.1 * step for step in range(10)]


def test_bound_is_the_noise_of_sequences_and_masks() -> None:
    stock = fake_run("stock", FALLING, [2.0, 3.0, 4.0, 5.0])
    patched = fake_run("patched", FALLING, [2.01, 3.03, 4.01, 5.03])
    comparison = compare(stock, patched, Options(steps=10))
    assert comparison.difference == pytest.approx(0.02)
    standard_error = math.sqrt(4 * 0.01**2 / 3) / 2
    assert comparison.standard_error == pytest.approx(standard_error)
    expected = 3 * math.sqrt(standard_error**2 + 2 * TRAINING_NOISE**2)
    assert comparison.bound == pytest.approx(expected)
    assert comparison.speedup == comparison.pairwise_speedup == 2.0


@pytest.mark.parametrize("sign", [-1, 1])
def test_agreement_is_two_sided(sign: int) -> None:
    bound = 3 * math.sqrt(2) * TRAINING_NOISE
    stock = fake_run("stock", FALLING, [3.0, 4.0])
    for factor, count in ((0.9, 0), (1.1, 1)):
        shift = sign * factor * bound
        patched = fake_run("patched", FALLING, [3.0 + shift, 4.0 + shift])
        assert len(compare(stock, patched, Options(steps=10)).problems) == count


def test_bound_grows_with_runs_longer_than_measured() -> None:
    run = fake_run("stock", FALLING, [3.0])
    bounds = [compare(run, run, Options(steps=steps)).bound for steps in (10, 2000, 8000)]
    assert bounds == pytest.approx([3 * math.sqrt(2) * TRAINING_NOISE * k for k in (1, 1, 2)])


def test_loss_that_does_not_fall_is_a_problem() -> None:
    good = fake_run("stock", FALLING, [3.0])
    flat = fake_run("patched", FALLING[::-1], [3.0])
    assert compare(good, good, Options(steps=10)).problems == ()
    problems = compare(good, flat, Options(steps=10)).problems
    assert problems == ("patched: the loss did not fall (4.100, 5.000)",)


def test_models_take_turns_on_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[int]]] = []
    monkeypatch.setattr(
        training, "_train_step", lambda run, windows, _: calls.append((run.name, windows.tolist()))
    )
    data = torch.randint(256, (1000,), dtype=torch.uint8)
    options = Options(steps=4, context=CONTEXT, batch=BATCH)
    runs = fake_run("stock", [], []), fake_run("patched", [], [])
    training.train(runs, Corpus("", data, data), options, lambda: None)
    order = [name for name, _ in calls]
    assert order == ["patched", "stock", "stock", "patched"] * 2
    batches = [batch for _, batch in calls]
    assert all(batches[i] == batches[i + 1] for i in range(0, 8, 2))
    assert batches[0] != batches[2]


def test_bfloat16_runs(text: Path, tmp_path: Path) -> None:
    assert run_demo(text=text, out=tmp_path, dtype="bfloat16", **SIZES) == 0
    assert read_json(tmp_path)["options"]["dtype"] == "bfloat16"


def test_model_is_causal_in_both_modes() -> None:
    model = GPT(layers=2, width=16, heads=2, context=8, dropout=0.0)
    x = torch.randint(256, (2, 8))
    changed = x.clone()
    changed[:, 5:] = 0
    slow = model(x)
    with torch.no_grad():
        fast = model.eval()(x)
        torch.testing.assert_close(fast, slow)
        assert torch.equal(model(changed)[:, :5], fast[:, :5])
        assert not torch.equal(model(changed)[:, 5:], fast[:, 5:])


def test_default_text_is_the_standard_library() -> None:
    corpus = load_corpus(None, 128)
    assert "standard library" in corpus.source
    assert len(corpus.train) > 2_000_000
    whole = len(corpus.train) + len(corpus.held_out)
    assert len(corpus.held_out) == pytest.approx(0.1 * whole, rel=0.01)


def test_windows_stay_in_the_text() -> None:
    data = torch.arange(20, dtype=torch.uint8)
    drawn = random_windows(data, 500, 9, torch.Generator().manual_seed(0))
    assert (drawn[:, 0].min(), drawn[:, -1].max()) == (0, 19)
    assert torch.equal(drawn - drawn[:, :1], torch.arange(10).expand(500, 10))
    spaced = spaced_windows(data, 100, 9)
    assert spaced[:, 0].tolist() == [0, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "missing.txt"}, "--text must be a file that can be read, got missing.txt: No"),
        ({"text": "."}, "--text must be a file that can be read, got .: Is a directory"),
        ({"text": "short"}, "--text must have at least 34 bytes for --context 16, got short with"),
        ({"width": 33}, "--width must be a multiple of --heads (2), got 33"),
        ({"steps": 1}, "--steps must be at least 5, got 1"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"device": "tpu"}, "--device must be cpu or cuda, got tpu"),
        ({"dtype": "float16"}, "--dtype must be float32 or bfloat16, got float16"),
        ({"state_dtype": "int4"}, "--state-dtype must be float32, bfloat16 or int8, got int4"),
        ({"out": "short"}, "--out must be a folder that can be written, got short"),
        ({"out": "short/report"}, "--out must be a folder that can be written, got short/report"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(
    options: dict[str, object],
    message: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short").write_bytes(b"x" * 33)
    assert run_demo(**{"text": text, "out": "report", **SIZES, **options}) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"pyfast demo: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["short"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(device="cuda") == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda(text: Path, tmp_path: Path) -> None:
    assert run_demo(text=text, out=tmp_path, device="cuda", **SIZES) == 0
    assert read_json(tmp_path)["comparison"]["patched"]["peak_bytes"] > 0


@pytest.mark.parametrize("name", ["rich", "matplotlib"])
def test_missing_package_is_one_line_and_status_2(name: str) -> None:
    code = (
        f"import sys; sys.modules[{name!r}] = None\n"
        "import argparse, pyfast.demo as demo; parser = argparse.ArgumentParser()\n"
        "demo.add_arguments(parser); sys.exit(demo.main(parser.parse_args([])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"pyfast demo: {name} not found: pip install 'pyfast[demo]'\n"
