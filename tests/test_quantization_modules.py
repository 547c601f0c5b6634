"""pyfast's modules with int8 weights: what they compute and whose gradient they have. The oracle is
torch's module with the weights that the int8 ones stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyfast
import pyfast.nn.int8_conv
from pyfast import quantization

MODES = ("weight_only", "dynamic", "static")
ACTIVATIONS = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda y: nn.functional.gelu(y, approximate="tanh"),
    "silu": nn.functional.silu,
}


def of_linear(mode: str, linear: nn.Linear, **options: Any) -> Any:
    if mode == "static":
        options["input_scale"] = torch.tensor(3.0 / 127)
    return pyfast.nn.Int8Linear.from_linear(linear, mode, **options)


def rounded(mode: str, module: Any, x: Tensor) -> Tensor:
    """x as the module multiplies it."""
    if module.smooth is not None:
        x = x * module.smooth
    if mode == "weight_only":
        return x
    scale = module.input_scale
    options = {} if scale is None else {"granularity": "tensor", "scale": scale}
    return pyfast.nn.functional.fake_quantize(x, **options)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_linear_matches_torch(mode: str, smooth: bool) -> None:
    linear, x = nn.Linear(40, 24), torch.randn(2, 5, 40)
    options = {"smooth": torch.rand(40) + 0.5} if smooth else {}
    module = of_linear(mode, linear, **options)
    weight = module.weight.double() * module.weight_scale.double()[:, None]
    expected = rounded(mode, module, x).double() @ weight.t() + linear.bias.double()
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)
    inverse = module.dequantize()
    assert type(inverse) is nn.Linear and inverse.bias is linear.bias
    # Half a step of the row, which smoothing makes larger: the factors are at most 3.
    error = (inverse.weight - linear.weight).abs().amax(1)
    assert bool((error <= 1.5 * module.weight_scale).all()) and bool(error.any())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_activation(activation: str) -> None:
    linear, x = nn.Linear(16, 8), torch.randn(3, 16, requires_grad=True)
    plain, fused = (of_linear("dynamic", linear, activation=a) for a in ("none", activation))
    expected = ACTIVATIONS[activation](plain(x))
    torch.testing.assert_close(fused(x), expected)
    assert f"activation={activation}" in repr(fused) and "activation" not in repr(plain)
    (grad,) = torch.autograd.grad(fused(x).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


def test_constructed_as_torchs() -> None:
    torch.manual_seed(1)
    linear = nn.Linear(12, 7)
    torch.manual_seed(1)
    module = pyfast.nn.Int8Linear(12, 7, mode="static", dtype=torch.float32)
    assert torch.equal(module.bias, linear.bias)
    values, scale = pyfast.nn.functional.quantize_int8(linear.weight)
    assert torch.equal(module.weight, values) and torch.equal(module.weight_scale, scale)
    assert module.input_scale is not None and module.input_scale == 1
    assert isinstance(module, nn.Linear) and not module.weight.requires_grad
    for kind in (pyfast.nn.Int8Linear, pyfast.nn.Int8MultiheadAttention):
        with pytest.raises(ValueError, match="got 'int4'"):
            kind(4, 2, mode="int4")
    scale = torch.tensor(0.1)
    for options, message in (
        ({"mode": "static"}, "got None with 'static'"),
        ({"mode": "dynamic", "input_scale": scale}, "got a tensor with 'dynamic'"),
        ({"mode": "static", "input_scale": scale.double()}, "float64"),
        ({"mode": "static", "input_scale": scale * 0}, "positive and finite"),
        ({"smooth": torch.ones(5)}, r"smooth \(12,\) float32, got \(5,\)"),
        ({"smooth": torch.full((12,), float("nan"))}, "positive and finite"),
    ):
        with pytest.raises(ValueError, match=message):
            pyfast.nn.Int8Linear.from_linear(linear, **options)  # type: ignore[arg-type]


class LoRA(nn.Module):
    """An adapter beside a frozen layer, as peft has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        device = base.weight.device
        self.down = nn.Linear(base.in_features, 4, bias=False, device=device)
        self.up = nn.Linear(4, base.out_features, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


@pytest.mark.parametrize("mode", MODES)
def test_gradients_and_adapters(mode: str) -> None:
    """The input's gradient goes through two frozen layers, to the adapters and to x."""
    layers = [of_linear(mode, nn.Linear(16, 16)) for _ in range(2)]
    model = nn.Sequential(*(LoRA(layer) for layer in layers))
    weights = [layer.weight.clone() for layer in layers]
    oracle = copy.deepcopy(model)
    for module in oracle:
        module.base = module.base.dequantize()
    x, target = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
    grads = [
        torch.autograd.grad(
            nn.functional.mse_loss(m(x), target), [x, *(p for a in m for p in a.up.parameters())]
        )
        for m in (model, oracle)
    ]
    for grad, expected in zip(*grads, strict=True):
        assert (grad - expected).norm() < 0.05 * expected.norm()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 6  # two adapters, and the biases
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x.detach()), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(a.weight, b) for a, b in zip(layers, weights, strict=True))


@pytest.mark.parametrize("mode", ["weight_only", "dynamic"])
def test_autocast_and_other_dtypes(mode: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), pyfast.nn.MultiheadAttention(16, 2))
    quantization.quantize_(model[0], quantization.Int8DynamicActivationInt8Weight())
    attention = pyfast.nn.Int8MultiheadAttention.from_attention(model[1], mode)
    x = torch.randn(3, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = model[0](x)
        z = attention(x, x, x)[0]
    assert y.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model[0](x), rtol=0.01, atol=0.01)
    torch.testing.assert_close(z.float(), attention(x, x, x)[0], rtol=0.05, atol=0.02)
    assert model[0](x.bfloat16()).dtype == torch.bfloat16
    assert attention(*(x.bfloat16(),) * 3)[0].dtype == torch.bfloat16


def attention_cases() -> dict[str, tuple[dict[str, Any], tuple[int, int], dict[str, Any]]]:
    causal = torch.ones(5, 5).triu(1).bool()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    return {
        "self": ({}, (16, 16), {}),
        "no bias": ({"bias": False}, (16, 16), {"need_weights": False}),
        "weights": ({}, (16, 16), {"average_attn_weights": False, "attn_mask": causal}),
        "causal": ({}, (16, 16), {"attn_mask": causal, "is_causal": True, "need_weights": False}),
        "padding": ({}, (16, 16), {"key_padding_mask": padding, "need_weights": False}),
        "float mask": ({}, (16, 16), {"attn_mask": torch.randn(4, 5, 5)}),
        "more keys": ({"add_bias_kv": True, "add_zero_attn": True}, (16, 16), {}),
        "separate": ({"kdim": 12, "vdim": 8}, (12, 8), {}),
        "separate no bias": ({"kdim": 12, "vdim": 8, "bias": False}, (12, 8), {}),
    }


@pytest.mark.parametrize("source", [nn.MultiheadAttention, pyfast.nn.MultiheadAttention])
@pytest.mark.parametrize("case", attention_cases())
def test_attention_matches_torch(case: str, source: Any) -> None:
    options, (kdim, vdim), call = attention_cases()[case]
    layer = source(16, 2, batch_first=True, **options).eval()
    query = torch.randn(2, 5, 16)
    key = query if case == "self" else torch.randn(2, 5, kdim)
    value = key if vdim == kdim else torch.randn(2, 5, vdim)
    module = copy.deepcopy(layer)
    quantization.quantize_(module, quantization.Int8WeightOnly())
    assert type(module) is pyfast.nn.Int8MultiheadAttention
    oracle = module.dequantize()
    assert type(oracle) is nn.MultiheadAttention
    for actual, expected in zip(
        module(query, key, value, **call), oracle(query, key, value, **call), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    dynamic = pyfast.nn.Int8MultiheadAttention.from_attention(layer, "dynamic")
    y, expected = dynamic(query, key, value, **call)[0], layer(query, key, value, **call)[0]
    assert 0 < (y - expected).norm() < 0.05 * expected.norm()


def test_attention_of_three_tensors_and_torchs_errors() -> None:
    module = pyfast.nn.Int8MultiheadAttention(16, 2).eval()
    q, k, v = (torch.randn(5, 2, 16) for _ in range(3))
    torch.testing.assert_close(module(q, k, v)[0], module.dequantize()(q, k, v)[0])
    with pytest.raises(AssertionError, match="expecting embedding dimension of 16, but got 12"):
        module(torch.randn(5, 2, 12), k, v)
    bias = module.in_proj_bias  # shared with what torch was handed to find the error
    module(q, q, q)[0].sum().backward()
    assert bias.grad is not None and bool(bias.grad[32:].any())  # of the values


def encoder(norm_first: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_fast_paths_are_off(norm_first: bool, patched: bool) -> None:
    """They would hand int8 weights to a kernel that takes them for floats."""
    model, x = encoder(norm_first), torch.randn(3, 6, 16)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[2, 4:] = True
    if patched:
        pyfast.patch(model)
    switches = [m.__dict__.get("activation_relu_or_gelu") for m in model.layers]
    nested = model.use_nested_tensor
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
        report = quantization.quantize_(model, quantization.Int8WeightOnly())
        assert len(report.changed) == 6
        off = [e.path for e in report if "fast path" in e.reason]
        assert off == (["(root)"] if nested else []) + ["layers.0", "layers.1"]
        actual = model(x, src_key_padding_mask=padding)[~padding]
        again = copy.deepcopy(model)(x, src_key_padding_mask=padding)[~padding]
        quantization.dequantize_(model)
        expected = model(x, src_key_padding_mask=padding)[~padding]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(actual, again)
    assert 0 < (actual - before[~padding]).norm() < 0.05 * actual.norm()
    assert model.use_nested_tensor == nested
    assert [m.__dict__.get("activation_relu_or_gelu") for m in model.layers] == switches


def test_decoder() -> None:
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True).eval()
    x, memory = torch.randn(2, 4, 16), torch.randn(2, 6, 16)
    with torch.no_grad():
        expected = layer(x, memory)
        assert len(quantization.quantize_(layer, quantization.Int8WeightOnly()).changed) == 4
        assert 0 < (layer(x, memory) - expected).norm() < 0.05 * expected.norm()


CONVS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": ({"kernel_size": 3}, (2, 6, 9)),
    "unbatched": ({"kernel_size": 3, "bias": False}, (6, 9)),
    "groups": ({"kernel_size": 2, "groups": 3, "stride": 2}, (2, 6, 9, 8)),
    "depthwise": ({"kernel_size": 3, "groups": 6, "padding": "same"}, (2, 6, 9, 8)),
    "reflect": ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (2, 6, 9, 8)),
    "dilated": ({"kernel_size": (3, 1), "dilation": 2, "padding": (2, 0)}, (6, 9, 8)),
}


# Of 40 weights: two channels of 18, one group of 48, four groups of 18 weights each.
NUM_BLOCKS = {"plain": 6, "unbatched": 6, "groups": 3, "depthwise": 3, "reflect": 12, "dilated": 6}


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
@pytest.mark.parametrize("case", CONVS)
def test_conv_matches_torch(case: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many output channels, or groups, are dequantized at a time."""
    monkeypatch.setattr(pyfast.nn.int8_conv, "_BLOCK_SIZE", block)
    options, shape = CONVS[case]
    one = case in ("plain", "unbatched")
    conv = (nn.Conv1d if one else nn.Conv2d)(6, 12, **options)
    x = torch.randn(shape, requires_grad=True)
    module = (pyfast.nn.Int8Conv1d if one else pyfast.nn.Int8Conv2d).from_conv(conv)
    oracle = module.dequantize()
    most = 12 if conv.groups == 1 else conv.groups
    assert len(list(module._blocks())) == {1: most, 40: NUM_BLOCKS[case], 1 << 20: 1}[block]
    actual, expected = module(x), oracle(x)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected)]
    torch.testing.assert_close(*grads)
    scale = pyfast.nn.functional.quantize_int8(conv.weight, granularity="channel")[1]
    assert torch.equal(module.weight_scale, scale)
    assert module(x.detach().bfloat16() if conv.bias is None else x).shape == actual.shape


def test_embedding() -> None:
    embedding = nn.Embedding(20, 12, padding_idx=4, dtype=torch.bfloat16)
    module = pyfast.nn.Int8Embedding.from_embedding(embedding)
    index = torch.tensor([[0, 4], [19, 7]])
    y = module(index)
    assert y.dtype == torch.bfloat16 and not y[0, 1].any() and module.padding_idx == 4
    assert torch.equal(y, module.dequantize()(index))
    torch.testing.assert_close(y, embedding(index), rtol=0, atol=0.05)
    assert module.float()(index).dtype == torch.float32
    assert torch.equal(pyfast.nn.Int8Embedding(20, 12, 4)(torch.tensor([4])), torch.zeros(1, 12))
    with pytest.raises(IndexError):
        module(torch.tensor([20]))
    with pytest.raises(ValueError, match=r"max_norm must be None, got 1\.0"):
        pyfast.nn.Int8Embedding.from_embedding(nn.Embedding(3, 2, max_norm=1.0))


@pytest.mark.parametrize("mode", MODES)
def test_compiles_fullgraph(mode: str) -> None:
    module = of_linear(mode, nn.Linear(16, 8))
    x = torch.randn(3, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_traced_by_fx() -> None:
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 4))
    quantization.quantize_(model, quantization.Int8WeightOnly(embeddings=True))
    graph = torch.fx.symbolic_trace(model)
    assert [n.op for n in graph.graph.nodes][1:-1] == ["call_module"] * 2
    assert torch.equal(graph(torch.tensor([3])), model(torch.tensor([3])))
