"""Ranges of inputs, static quantization, SmoothQuant, and training with the errors of int8."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_quantization import Model, assert_same, relative_error, snapshot, tokens
from torch import Tensor, nn

import pyfast
from pyfast import quantization


def test_records_the_magnitudes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.tensor([[1.0, -5.0, 2.0], [-3.0, 4.0, 0.5]])
    calibration = quantization.calibrate(model, [x[:1], (x[1:],), {"input": x[:1] / 2}])
    assert calibration.inputs.keys() == {"0", "2"} and not calibration.norms
    seen = calibration.inputs["0"]
    assert seen.limit == 5.0 and seen.channel_absmax.tolist() == [3.0, 5.0, 2.0]
    hidden = model[:2](torch.cat([x, x[:1] / 2])).detach()
    torch.testing.assert_close(calibration.inputs["2"].channel_absmax, hidden.amax(0))
    keywords = nn.Sequential(nn.Linear(3, 2))
    assert quantization.calibrate(keywords, iter([{"input": x}])).inputs["0"].limit == 5.0


def test_percentile() -> None:
    """Up to a bin: 1/128 of the value. The cut into batches does not matter."""
    linear, x = nn.Linear(50, 2), torch.randn(400, 50)
    x[3, 7] = 1e6
    for percentile in (50.0, 99.0, 99.99, 100.0):
        observer = quantization.PercentileObserver(percentile)
        limits = {
            quantization.calibrate(linear, x.split(size), observer).inputs[""].limit
            for size in (400, 150)
        }
        (limit,) = limits
        ordered = x.abs().flatten().sort()[0]
        exact = ordered[max(0, round(percentile / 100 * len(ordered)) - 1)].item()
        assert exact * 0.999 <= limit <= exact * (1 + 1 / 128)
    assert limit == 1e6
    zeros = quantization.calibrate(linear, [x * 0], quantization.PercentileObserver(1.0))
    assert zeros.inputs[""].limit == 0.0
    for wrong in (0.0, 100.1, float("nan")):
        with pytest.raises(ValueError, match="percentile must be in"):
            quantization.PercentileObserver(wrong)


class Fragile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 3:
            raise KeyError("three")
        y: Tensor = self.dropout(self.norm(self.linear(x)))
        return y


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = Fragile()
    model.dropout.eval()
    x = torch.randn(5, 4)
    before, state = snapshot(model), torch.get_rng_state()
    quantization.calibrate(model, [x])
    assert_same(before, snapshot(model))
    for batches, error in (([x, x[:3]], KeyError), ([x, x * float("nan")], ValueError)):
        with pytest.raises(error):
            quantization.calibrate(model, batches)
        assert_same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_calibration_errors() -> None:
    model: Any = nn.Linear(4, 4)
    for batches in ([], iter(()), (x for x in ())):
        with pytest.raises(ValueError, match="at least one batch, got none"):
            quantization.calibrate(model, batches)
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="input of '0' holds NaN or Inf"):
        quantization.calibrate(nn.Sequential(model), [x / 0])
    with pytest.raises(ValueError, match="no Linear was called"):
        quantization.calibrate(nn.Sequential(nn.ReLU()), [x])
    with pytest.raises(ValueError, match="no Linear was called"):
        quantization.calibrate(model, [x[:0]])
    with pytest.raises(TypeError, match="got str"):
        quantization.calibrate("model", [x])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got float"):
        quantization.calibrate(model, [x], 99.9)  # type: ignore[arg-type]


def test_static() -> None:
    model, x = Model().eval(), tokens()
    with torch.no_grad():
        expected = model(x)
        calibration = quantization.calibrate(model, [x])
        report = quantization.quantize_(
            model, quantization.Int8StaticActivationInt8Weight(calibration)
        )
        assert 0 < relative_error(model(x), expected) < 0.05
    head, limit = model.head, calibration.inputs["head"].limit
    assert head.mode == "static" and head.input_scale == torch.tensor(limit) / 127
    assert {e.path: e.reason for e in report}[
        "attention"
    ] == "dynamic: its inputs are not calibrated"
    unused = nn.Linear(4, 2)
    seen = quantization.calibrate(unused, [torch.zeros(3, 4)])
    quantization.quantize_(unused, quantization.Int8StaticActivationInt8Weight(seen))
    assert unused.input_scale == 1 and torch.equal(unused(torch.zeros(1, 4))[0], unused.bias)


class Block(nn.Module):
    """A norm whose output two layers read: with channels that are a hundred times the others."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm(32)
        self.gate, self.up = nn.Linear(32, 48), nn.Linear(32, 48)
        with torch.no_grad():
            for parameter in self.norm.parameters():  # LayerNorm's bias too
                parameter.copy_(torch.rand(32) + 0.5)
                parameter[[3, 17]] *= 100

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.sigmoid(self.gate(y) / 40) * self.up(y)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_smoothing_helps_where_channels_stand_out(norm: Any) -> None:
    model, x = Block(norm), torch.randn(64, 32)
    calibration = quantization.calibrate(model, [x])
    fold = {"norm": ["gate", "up"]}
    configs = {
        "plain": quantization.Int8DynamicActivationInt8Weight(),
        "smooth": quantization.SmoothQuant(calibration),
        "folded": quantization.SmoothQuant(calibration, fold=fold),
    }
    errors, models = {}, {}
    with torch.no_grad():
        expected = model(x)
        for name, config in configs.items():
            models[name] = copy.deepcopy(model)
            report = quantization.quantize_(models[name], config)
            errors[name] = relative_error(models[name](x), expected)
    assert errors["smooth"] < 0.7 * errors["plain"] and errors["folded"] < 0.7 * errors["plain"]
    assert models["smooth"].up.smooth is not None and models["folded"].up.smooth is None
    assert torch.equal(models["smooth"].norm.weight, model.norm.weight)
    assert "SmoothQuant" in report.entries[0].reason and report.entries[0].path == "norm"
    # The factors by the formula, of both readers together.
    largest = torch.stack([m.weight.detach().abs().amax(0) for m in (model.gate, model.up)]).amax(0)
    factors = (calibration.inputs["up"].channel_absmax / largest).sqrt()
    for name, parameter in models["folded"].norm.named_parameters():
        torch.testing.assert_close(parameter, model.norm.get_parameter(name) / factors)
    # Nothing but rounding: the weights that the int8 ones stand for are the former ones.
    for smoothed in ("smooth", "folded"):
        quantization.dequantize_(models[smoothed])
        assert relative_error(models[smoothed](x), expected) < 0.02


def test_alpha_one_moves_everything_into_the_weights() -> None:
    linear, x = nn.Linear(8, 4), torch.randn(20, 8)
    quantization.quantize_(
        linear, quantization.SmoothQuant(quantization.calibrate(linear, [x]), alpha=1.0)
    )
    torch.testing.assert_close((x * linear.smooth).abs().amax(0), torch.ones(8))


@pytest.mark.parametrize("quantize_input", [False, True])
def test_training_with_the_errors_of_int8(quantize_input: bool) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    weights = list(model.parameters())
    x = torch.randn(256, 8)
    target = (x[:, :1] * x[:, 1:2]).tanh()
    report = quantization.quantize_(model, quantization.Int8QAT(quantize_input))
    assert len(report.changed) == 2 and type(model[0]) is quantization.Int8QATLinear
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    with torch.no_grad():
        expected = model(x)
        rounded = pyfast.nn.functional.fake_quantize(model[0].weight)
        report = quantization.convert(model)
        assert len(report.changed) == 2 and type(model[0]) is pyfast.nn.Int8Linear
        assert model[0].mode == ("dynamic" if quantize_input else "weight_only")
        # The same int8 values and scales; sums are rounded elsewhere. A value that lies between
        # two steps may go to the other one behind the first layer.
        assert torch.equal(model[0].dequantize().weight, rounded)
        close = (model(x) - expected).abs() <= 1e-5 + 1e-5 * expected.abs()
        assert close.float().mean() > (0.5 if quantize_input else 0.999)
        assert relative_error(model(x), expected) < 0.01


def test_qat_that_is_given_up() -> None:
    model = Model()
    state = copy.deepcopy(model.state_dict())
    quantization.quantize_(model, quantization.Int8QAT())
    assert "already" not in str(quantization.quantize_(model, quantization.Int8WeightOnly()))
    assert type(model.up) is quantization.Int8QATLinear
    quantization.dequantize_(model)
    assert type(model.up) is nn.Linear and "quantize_input" not in model.up.__dict__
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(model.up.weight, state["up.weight"])


def test_convert_leaves_a_failure_unchanged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantization.quantize_(model, quantization.Int8QAT())
    with torch.no_grad():
        model[1].weight[2, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"convert: 1\.weight must be finite"):
        quantization.convert(model)
    assert_same(before, snapshot(model))
    model[1].weight = model[0].weight
    report = quantization.convert(model)
    assert not report.changed and report.entries[0].reason == "its weight is also that of 1"
