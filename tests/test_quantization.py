"""``pyfast.quantization.quantize_``: what is changed, what is left alone and why, how much memory
it saves, and that a failure changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import pyfast
from pyfast import quantization

CONFIGS = {
    "weight_only": quantization.Int8WeightOnly(),
    "dynamic": quantization.Int8DynamicActivationInt8Weight(),
}


class Model(nn.Module):
    """One of everything that is quantized, and what surrounds it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16, padding_idx=3)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16, bias=False)
        self.head = nn.Linear(16, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        y: Tensor = self.head(x)
        return y


def tokens() -> Tensor:
    return torch.randint(0, 40, (3, 9))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm()).item()


def snapshot(model: nn.Module) -> Any:
    """Everything that a failed call must leave as it was."""
    return [
        (
            type(module),
            {k: (id(v), None if v is None else v.clone()) for k, v in module._parameters.items()},
            {k: (id(v), None if v is None else v.clone()) for k, v in module._buffers.items()},
            sorted(module.__dict__),
            module.training,
            (len(module._forward_hooks), len(module._forward_pre_hooks)),
        )
        for module in model.modules()
    ]


def assert_same(before: Any, after: Any) -> None:
    for (kind, *first), (other_kind, *second) in zip(before, after, strict=True):
        assert kind is other_kind and first[2:] == second[2:]
        for old, new in zip(first[:2], second[:2], strict=True):
            assert old.keys() == new.keys()
            for name, (identity, value) in old.items():
                assert identity == new[name][0]
                if value is not None:
                    torch.testing.assert_close(new[name][1], value, rtol=0, atol=0, equal_nan=True)


def test_reports_what_it_did() -> None:
    model = Model()
    everything = sum(t.nbytes for t in model.state_dict().values())
    report = quantization.quantize_(model, quantization.Int8WeightOnly())
    changed = {entry.path: entry.target for entry in report.changed}
    assert changed == {
        "conv": pyfast.nn.Int8Conv1d,
        "attention": pyfast.nn.Int8MultiheadAttention,
        "up": pyfast.nn.Int8Linear,
        "down": pyfast.nn.Int8Linear,
        "head": pyfast.nn.Int8Linear,
    }
    assert all(type(model.get_submodule(path)) is kind for path, kind in changed.items())
    (left,) = report.skipped
    assert left.path == "embedding" and "embeddings=True" in left.reason
    assert report.bytes_before == everything
    assert report.bytes_after == sum(t.nbytes for t in model.state_dict().values())
    lines = str(report).splitlines()
    assert len(lines) == 8 and "5 of 6 modules changed" in lines[-1]
    assert lines[4].split() == ["up", "torch.nn.Linear", "pyfast.nn.Int8Linear"]
    again = quantization.quantize_(model, quantization.Int8WeightOnly())
    assert not again.changed and {e.reason for e in again.skipped} >= {"already int8"}


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (quantization.Int8WeightOnly(embeddings=True), "embedding conv attention up down head"),
        (quantization.Int8DynamicActivationInt8Weight(), "attention up down head"),
        (quantization.Int8QAT(), "up down head"),
    ],
    ids=["weight_only", "dynamic", "qat"],
)
def test_what_a_configuration_quantizes(config: Any, kinds: str) -> None:
    report = quantization.quantize_(Model(), config)
    assert [entry.path for entry in report.changed] == kinds.split()
    assert all(entry.reason for entry in report.skipped)


def test_memory() -> None:
    """An int8 weight and a float32 scale for 256 of them."""
    for dtype, most in ((torch.float32, 0.27), (torch.bfloat16, 0.52)):
        model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256)).to(dtype)
        for config in CONFIGS.values():
            report = quantization.quantize_(copy.deepcopy(model), config)
            assert report.bytes_after <= most * report.bytes_before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", CONFIGS)
def test_close_to_the_model_before(mode: str, dtype: torch.dtype) -> None:
    model = Model().eval().to(dtype)
    x = tokens()
    with torch.no_grad():
        expected = model(x)
        quantization.quantize_(model, CONFIGS[mode])
        actual = model(x)
        assert actual.dtype == dtype
        # 8 bits leave a hundredth of a uniform value's norm: 1 / (127 sqrt(3)) of the absmax.
        assert 1e-4 < relative_error(actual, expected) < 0.03
        quantization.dequantize_(model)
        # The same weights: what is left is the rounding of inputs, and of sums.
        limit = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
        assert relative_error(model(x), actual) < (limit if mode == "weight_only" else 0.03)


def test_dequantize_gives_torchs_modules_back() -> None:
    model = Model()
    kinds = [type(m) for m in model.modules()]
    keys, attributes = list(model.state_dict()), [sorted(m.__dict__) for m in model.modules()]
    quantization.quantize_(model, quantization.Int8WeightOnly(embeddings=True))
    int8 = {name: p for name, p in model.named_parameters() if p.dtype == torch.int8}
    assert len(int8) == 7
    report = quantization.dequantize_(model, torch.bfloat16)
    assert len(report.changed) == 6 and report.bytes_before < report.bytes_after
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == keys
    assert [sorted(m.__dict__) for m in model.modules()] == attributes
    for name, p in model.named_parameters():
        assert p.requires_grad
        assert p.dtype == (torch.float32 if name.startswith("norm") else torch.bfloat16)
    with pytest.raises(ValueError, match="activation must be 'none', got 'relu'"):
        quantization.dequantize_(pyfast.nn.Int8Linear(2, 2, activation="relu"))


def test_modules_and_hooks_stay() -> None:
    model, calls = Model(), []
    modules, bias = list(model.modules()), model.up.bias
    model.up.register_forward_hook(lambda *_: calls.append("up"))
    model.up.register_buffer("mine", torch.ones(2))
    model.up.note = "kept"
    model.eval()
    state = torch.get_rng_state()
    quantization.quantize_(model, quantization.Int8WeightOnly())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert model.up.bias is bias and model.up.note == "kept" and "mine" in model.up._buffers
    assert not any(m.training for m in model.modules())
    model(tokens())
    assert calls == ["up"]


def test_filter() -> None:
    seen = []

    def choose(module: nn.Module, path: str) -> bool:
        seen.append((type(module), path))
        return path != "head"

    model = Model()
    report = quantization.quantize_(model, quantization.Int8DynamicActivationInt8Weight(), choose)
    assert type(model.head) is nn.Linear and type(model.up) is pyfast.nn.Int8Linear
    assert {e.path: e.reason for e in report.skipped}["head"] == "left out by filter_fn"
    assert (nn.Linear, "head") in seen and (nn.MultiheadAttention, "attention") in seen
    root = nn.Linear(3, 2)
    quantization.quantize_(root, quantization.Int8WeightOnly(), lambda module, path: path == "")
    assert type(root) is pyfast.nn.Int8Linear


class Subclass(nn.Linear):
    pass


def test_leaves_alone_what_it_does_not_know() -> None:
    model = nn.Module()
    model.subclass = Subclass(2, 2)
    model.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    model.pruned = nn.Linear(2, 2)
    prune.identity(model.pruned, "weight")
    model.overridden = nn.Linear(2, 2)
    model.overridden.forward = lambda x: x
    model.scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    model.normed = nn.Embedding(3, 2, max_norm=1.0)
    model.pruned_attention = prune.identity(nn.MultiheadAttention(2, 1), "in_proj_weight")
    model.out = nn.MultiheadAttention(2, 1)
    model.out.out_proj = nn.Linear(2, 2)
    before = [type(m) for m in model.modules()]
    config = quantization.Int8WeightOnly(embeddings=True)
    report = quantization.quantize_(model, config, lambda m, path: path != "out.out_proj")
    assert not report.changed and [type(m) for m in model.modules()] == before
    reasons = {entry.path: entry.reason for entry in report}
    expected = {
        "subclass": "a subclass of Linear",
        "parametrized": "a subclass of Linear",
        "pruned": "its weight is not a parameter",
        "overridden": "overridden on the instance",
        "scripted": "a ScriptModule",
        "normed": "max_norm",
        "pruned_attention": "its in_proj_weight is not a parameter",
        "out": "its out_proj is a Linear",
        "out.out_proj": "left out by filter_fn",
    }
    assert reasons.keys() == expected.keys()
    for path, reason in expected.items():
        assert reason in reasons[path]


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"embedding": nn.Embedding(30, 8), "head": nn.Linear(8, 30, bias=False)})
    model["head"].weight = model["embedding"].weight
    return model


def test_tied_weights_stay_tied() -> None:
    model = tied()
    float_bytes = quantization.quantize_(model, quantization.Int8WeightOnly()).bytes_after
    assert model["head"].weight is model["embedding"].weight
    assert type(model["head"]) is nn.Linear  # because the embedding was not asked for
    report = quantization.quantize_(model, quantization.Int8WeightOnly(embeddings=True))
    assert len(report.changed) == 2
    assert model["head"].weight is model["embedding"].weight
    assert model["head"].weight.dtype == torch.int8
    assert report.bytes_after == float_bytes // 4 + 2 * 30 * 4
    quantization.dequantize_(model)
    assert model["head"].weight is model["embedding"].weight


def test_a_tie_that_cannot_be_shared_is_left_alone() -> None:
    model = tied()
    calibration = quantization.calibrate(model["head"], [torch.randn(2, 8)])
    calibration = quantization.Calibration({"head": calibration.inputs[""]}, {})
    config = quantization.SmoothQuant(calibration, embeddings=True)
    assert not quantization.quantize_(model, config).changed
    other = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Subclass(4, 4), "c": nn.Linear(4, 4)})
    other["b"].weight = other["a"].weight
    report = quantization.quantize_(other, quantization.Int8WeightOnly())
    assert [entry.path for entry in report.changed] == ["c"]
    assert report.entries[0].reason == "its weight is also that of b"


def with_weight(value: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Model()
        if isinstance(value, float):
            with torch.no_grad():
                model.head.weight[7, 3] = value
        else:
            model.head.weight = nn.Parameter(value, requires_grad=value.is_floating_point())
        return model

    return make


def calibrated(*without: str, **options: Any) -> Any:
    calibration = quantization.calibrate(Model(), [tokens()])
    inputs = {path: r for path, r in calibration.inputs.items() if path not in without}
    return quantization.SmoothQuant(quantization.Calibration(inputs, calibration.norms), **options)


FAILURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "nan": (with_weight(float("nan")), quantization.Int8WeightOnly, "head.weight .* row 7"),
    "inf": (with_weight(float("inf")), quantization.Int8WeightOnly, "got NaN or Inf in row 7"),
    "empty": (with_weight(torch.empty(0, 16)), quantization.Int8WeightOnly, "must not be empty"),
    "integers": (
        with_weight(torch.ones(40, 16, dtype=torch.int32)),
        quantization.Int8DynamicActivationInt8Weight,
        "got torch.int32",
    ),
    "uncalibrated": (
        Model,
        lambda: quantization.Int8StaticActivationInt8Weight(calibrated("head").calibration),
        "input of 'head', which no batch reached",
    ),
    "unsmoothed": (Model, lambda: calibrated("head"), "input of 'head'"),
    "fold no norm": (Model, lambda: calibrated(fold={"up": ["down"]}), "got Linear"),
    "fold nothing": (Model, lambda: calibrated(fold={"norm": []}), "list of paths"),
    "fold no linear": (Model, lambda: calibrated(fold={"norm": ["x"]}), "'x' must be an nn.Linear"),
    "fold others": (Model, lambda: calibrated(fold={"norm": ["head"]}), "does not read"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_changes_nothing(failure: str) -> None:
    make, config, message = FAILURES[failure]
    model, options = make(), config()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        quantization.quantize_(model, options)
    assert_same(before, snapshot(model))


def test_a_filter_that_fails_changes_nothing() -> None:
    def fails_late(module: nn.Module, path: str) -> bool:
        if path == "head":
            raise KeyError(path)
        return True

    model = Model()
    before = snapshot(model)
    with pytest.raises(KeyError):
        quantization.quantize_(model, quantization.Int8WeightOnly(), fails_late)
    assert_same(before, snapshot(model))


def test_rejects_other_types() -> None:
    config: Any = quantization.Int8WeightOnly
    with pytest.raises(TypeError, match="the class Int8WeightOnly"):
        quantization.quantize_(nn.Linear(2, 2), config)
    with pytest.raises(TypeError, match="got the class Linear"):
        quantization.quantize_(nn.Linear, config())  # type: ignore[arg-type]
    for function in (quantization.dequantize_, quantization.convert):
        with pytest.raises(TypeError, match="got int"):
            function(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got float"):
        quantization.SmoothQuant(0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got dict"):
        quantization.Int8StaticActivationInt8Weight({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha must be in"):
        calibrated(alpha=1.5)
    with pytest.raises(ValueError, match="prepared, got none"):
        quantization.convert(Model())
