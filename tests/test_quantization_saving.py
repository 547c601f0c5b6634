"""Quantized models on their way: copied, pickled, saved, loaded, moved, sharded, and read from the
files of other libraries."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_optim_distributed import in_two_processes
from test_quantization import Model, tokens
from torch import Tensor, nn

import pyfast
from pyfast import quantization

CONFIG = quantization.Int8WeightOnly(embeddings=True)


def quantized(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model().eval()
    quantization.quantize_(model, CONFIG)
    return model


def special(kind: str, seed: int = 0) -> nn.Module:
    """A layer whose state has what others have not."""
    torch.manual_seed(seed)
    linear = nn.Linear(12, 6)
    calibration = quantization.calibrate(linear, [torch.randn(5, 12)])
    config: Any = quantization.Int8StaticActivationInt8Weight(calibration)
    if kind == "smooth":
        config = quantization.SmoothQuant(calibration)
    quantization.quantize_(linear, config)
    return linear


def through_bytes(state: Any, **options: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


def by_state(model: Model) -> nn.Module:
    other = quantized(seed=1)
    state = through_bytes(model.state_dict(), weights_only=True)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    return other


def by_assignment_onto_meta(model: Model) -> nn.Module:
    with torch.device("meta"):
        other = Model().eval()
    quantization.quantize_(other, CONFIG)
    assert all(p.is_meta for p in (*other.parameters(), *other.buffers()))
    other.load_state_dict(through_bytes(model.state_dict(), weights_only=True), assign=True)
    return other.to("cpu")


def by_to_empty(model: Model) -> nn.Module:
    with torch.device("meta"):
        other = Model().eval()
    quantization.quantize_(other, CONFIG)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    return other


def by_safetensors(model: Model) -> nn.Module:
    safetensors = pytest.importorskip("safetensors.torch")
    other = quantized(seed=1)
    other.load_state_dict(safetensors.load(safetensors.save(model.state_dict())))
    return other


ROUTES: dict[str, Callable[[Model], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "whole model": lambda model: through_bytes(model, weights_only=False),
    "state": by_state,
    "assign onto meta": by_assignment_onto_meta,
    "to_empty": by_to_empty,
    "safetensors": by_safetensors,
}


@pytest.mark.parametrize("route", ROUTES)
def test_round_trip(route: str) -> None:
    model, x = quantized(), tokens()
    other = ROUTES[route](model)
    assert torch.equal(other(x), model(x))
    assert other.state_dict().keys() == model.state_dict().keys()
    for module, copied in zip(model.modules(), other.modules(), strict=True):
        assert type(module) is type(copied)
    for name, p in other.named_parameters():
        assert p.requires_grad == (p.dtype != torch.int8), name
        assert p.data_ptr() != model.get_parameter(name).data_ptr()
    quantization.dequantize_(other)
    assert other(x).dtype == torch.float32


def test_state_is_plain_tensors() -> None:
    state = quantized().state_dict()
    assert all(type(t) is Tensor for t in state.values())
    linear = {k.removeprefix("up."): t for k, t in state.items() if k.startswith("up.")}
    assert {name: (t.shape, t.dtype) for name, t in linear.items()} == {
        "weight": ((64, 16), torch.int8),
        "weight_scale": ((64,), torch.float32),
        "bias": ((64,), torch.float32),
    }
    assert state["attention.in_proj_weight_scale"].shape == (48,)
    assert set(special("static").state_dict()) == {*linear, "input_scale"}
    assert set(special("smooth").state_dict()) == {*linear, "smooth"}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["static", "smooth"])
def test_a_state_brings_its_scales_along(kind: str, assign: bool) -> None:
    module, x = special(kind), torch.randn(4, 12)
    other = pyfast.nn.Int8Linear(12, 6, mode="dynamic", device="meta" if assign else None)
    other.load_state_dict(module.state_dict(), assign=assign)
    assert other.mode == ("static" if kind == "static" else "dynamic")
    assert torch.equal(other(x), module(x))
    same = special(kind, seed=1)
    same.load_state_dict(module.state_dict())
    assert torch.equal(same(x), module(x))
    without = {k: v for k, v in module.state_dict().items() if k not in ("smooth", "input_scale")}
    with pytest.raises(RuntimeError, match="Missing key"):
        same.load_state_dict(without)
    weight_only = pyfast.nn.Int8Linear(12, 6)
    if kind == "static":
        with pytest.raises(RuntimeError, match=r"Unexpected key.*input_scale"):
            weight_only.load_state_dict(module.state_dict())


def test_refuses_weights_that_are_not_int8() -> None:
    """Copied, they would be cut to zeros."""
    model = quantized()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = Model().state_dict()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"up\.weight must be int8, got torch\.float32"):
            model.load_state_dict(state, strict=strict)
        for name in ("up.weight", "attention.in_proj_weight", "conv.weight", "embedding.weight"):
            assert torch.equal(model.state_dict()[name], before[name])
    half = {k: v.half() if v.dtype == torch.float32 else v for k, v in before.items()}
    model.load_state_dict(half, assign=True)
    assert model.up.weight_scale.dtype == torch.float32 and model.up.bias.dtype == torch.float16


CONVERSIONS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "bfloat16": (nn.Module.bfloat16, torch.bfloat16),
    "half": (nn.Module.half, torch.float16),
    "double": (nn.Module.double, torch.float64),
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to device": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "share_memory": (nn.Module.share_memory, torch.float32),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_scales_stay_float32(conversion: str) -> None:
    """Biases and results follow the model; it comes back as it was, up to its float parameters."""
    convert, dtype = CONVERSIONS[conversion]
    model = quantized()
    model.add_module("static", special("static"))
    model.add_module("smooth", special("smooth"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    converted = convert(model)
    assert converted is model and model(tokens()).dtype == dtype
    for name, t in model.state_dict().items():
        is_scale = "scale" in name or name == "smooth.smooth"
        assert t.dtype == (torch.int8 if before[name].dtype == torch.int8 else dtype) or is_scale
        if is_scale:
            assert t.dtype == torch.float32 and torch.equal(t, before[name]), name
    quantization.dequantize_(model)
    assert all(p.dtype == dtype for p in model.parameters())


def test_moves_to_meta() -> None:
    model = quantized().to("meta")
    assert all(t.is_meta for t in model.state_dict().values())
    assert model.up.weight_scale.dtype == torch.float32


def bitsandbytes_state(linear: nn.Linear, weight_format: Any = None) -> dict[str, Any]:
    absmax = linear.weight.detach().abs().amax(1)
    values = (linear.weight.detach() * (127 / absmax)[:, None]).round().to(torch.int8)
    state = {"0.weight": values, "0.SCB": absmax, "0.bias": linear.bias.detach()}
    weight_format = torch.tensor(0, dtype=torch.uint8) if weight_format is None else weight_format
    return {**state, "0.weight_format": weight_format, "1.weight": torch.ones(2)}


def test_bitsandbytes() -> None:
    linear, x = nn.Linear(16, 8), torch.randn(3, 16)
    for weight_format in (None, "row"):
        state = quantization.from_bitsandbytes(bitsandbytes_state(linear, weight_format))
        assert state.keys() == {"0.weight", "0.weight_scale", "0.bias", "1.weight"}
        model = nn.Sequential(pyfast.nn.Int8Linear(16, 8))
        model.load_state_dict({k: v for k, v in state.items() if k[0] == "0"})
        error = (model(x) - linear(x)).norm() / linear(x).norm()
        assert error < 0.01  # absmax taken for the scale would be 127 times too much
    state = bitsandbytes_state(linear)
    for change, message in (
        ({"0.weight_format": torch.tensor(1, dtype=torch.uint8)}, r"must be 0 \(row\)"),
        ({"0.weight": linear.weight}, r"\(8, in_features\) int8, got \(8, 16\) torch.float32"),
        ({"0.SCB": torch.ones(7)}, r"must be \(7, in_features\) int8"),
    ):
        with pytest.raises(ValueError, match=message):
            quantization.from_bitsandbytes({**state, **change})
    del state["0.SCB"]
    with pytest.raises(ValueError, match=r"no '0\.SCB'"):
        quantization.from_bitsandbytes(state)


def torchao_parts(linear: nn.Linear, **more: Any) -> dict[str, Any]:
    """What torchao's Int8Tensor holds: -128..127 with a scale of absmax / 127.5."""
    scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127.5
    values = (linear.weight.detach() / scale).round().clamp(-128, 127).to(torch.int8)
    zero_point = torch.zeros_like(scale, dtype=torch.int8)
    return {"qdata": values, "scale": scale, "zero_point": zero_point, **more}


def as_affine_tensor(parts: dict[str, Any]) -> SimpleNamespace:
    """What the versions before had: AffineQuantizedTensor with a plain layout."""
    members = {**parts, "int_data": parts["qdata"]}
    del members["qdata"]
    return SimpleNamespace(tensor_impl=SimpleNamespace(**members), shape=parts["qdata"].shape)


LAYOUTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "Int8Tensor": lambda parts: {"0.weight": SimpleNamespace(**parts)},
    "AffineQuantizedTensor": lambda parts: {"0.weight": as_affine_tensor(parts)},
    "LinearActivationQuantizedTensor": lambda parts: {
        "0.weight": SimpleNamespace(original_weight_tensor=as_affine_tensor(parts))
    },
    "safetensors": lambda parts: {f"0._weight_{k}": v for k, v in parts.items() if v is not None},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torchao(layout: str) -> None:
    linear, x = nn.Linear(16, 8), torch.randn(3, 16)
    parts = torchao_parts(linear)
    state = quantization.from_torchao({**LAYOUTS[layout](parts), "0.bias": linear.bias.detach()})
    model = nn.Sequential(pyfast.nn.Int8Linear(16, 8))
    model.load_state_dict(state)
    weight = parts["qdata"].float() * parts["scale"]
    expected = nn.functional.linear(x, weight, linear.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert state["0.weight_scale"].dtype == torch.float32


def test_torchao_with_scales_of_inputs() -> None:
    linear = nn.Linear(16, 8)
    more = {"act_quant_scale": torch.full((1, 1), 0.05), "act_pre_scale": torch.rand(16).bfloat16()}
    parts = torchao_parts(linear, **more)
    for layout in ("Int8Tensor", "safetensors"):
        state = quantization.from_torchao(LAYOUTS[layout](parts))
        model = nn.Sequential(pyfast.nn.Int8Linear(16, 8, bias=False, mode="dynamic"))
        model.load_state_dict(state)
        assert model[0].mode == "static" and model[0].input_scale == torch.tensor(0.05)
        assert torch.equal(model[0].smooth, more["act_pre_scale"].float())
    one = {**parts, "scale": torch.full((1, 1), 0.02)}
    state = quantization.from_torchao(LAYOUTS["Int8Tensor"](one))
    assert torch.equal(state["0.weight_scale"], torch.full((8,), 0.02))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.ones(8, 2)}, r"a scale a row \(8\) or one, got \(8, 2\)"),
        ({"zero_point": torch.ones(8, 1)}, "zero_point .* must be 0"),
        ({"act_quant_zero_point": torch.ones(1)}, "act_quant_zero_point .* must be 0"),
        ({"act_quant_scale": torch.ones(2)}, "must be one number"),
        ({"qdata": torch.ones(2, 8, 16, dtype=torch.int8)}, "must be an int8 matrix"),
        ({"scale": None}, "with scale"),
    ],
)
def test_torchao_that_means_something_else(change: dict[str, Any], message: str) -> None:
    parts = torchao_parts(nn.Linear(16, 8), **change)
    for layout in ("Int8Tensor", "safetensors"):
        with pytest.raises(ValueError, match=message):
            quantization.from_torchao(LAYOUTS[layout](parts))


class Adapted(nn.Module):
    """An int8 layer of odd sizes, which ranks hold unequal shards of, with an adapter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.base, self.adapter = nn.Linear(9, 7), nn.Linear(9, 7, bias=False)
        quantization.quantize_(
            self, quantization.Int8DynamicActivationInt8Weight(), lambda m, path: path == "base"
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.adapter(x)
        return y


def check_fsdp(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    for dtype in (None, torch.bfloat16):
        net, alone = Adapted(), Adapted()
        fully_shard(net, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        weight = net.base.weight
        assert isinstance(weight, DTensor) and weight.dtype == torch.int8
        assert weight.to_local().shape[0] == (4, 3)[rank]
        y, expected = net(x), alone.to(dtype)(x.to(dtype))
        assert net.base.weight_scale.dtype == torch.float32
        torch.testing.assert_close(y, expected, rtol=0.02 if dtype else 1e-5, atol=1e-2)
        y.float().square().sum().backward()
        assert isinstance(net.adapter.weight.grad, DTensor) and net.base.weight.grad is None
        state = net.state_dict()
        full = state["base.weight"].full_tensor()
        assert torch.equal(full, alone.base.weight)
        other = Adapted()
        fully_shard(other, mesh=mesh)
        other.load_state_dict(state)
        assert torch.equal(other.base.weight.full_tensor(), full)


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
def test_fully_sharded(tmp_path: Path) -> None:
    in_two_processes(check_fsdp, tmp_path)
