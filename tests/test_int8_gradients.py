"""int8_linear and fake_quantize in training: gradients, torch.compile, export, transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
from conftest import Backend
from int8_oracle import FLOATS, Function, exact_activation, ints, linear, operands
from oracle import assert_bits_equal, nan_memory, normal
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pyfast

F = pyfast.nn.functional
pytestmark = pytest.mark.backends("reference", "cpu", "triton")
MODES = pytest.mark.parametrize("weight_only", [False, True], ids=["W8A8", "weight-only"])
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def straight_through(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, smooth: Tensor | None, y: Tensor
) -> Tensor:
    """In the dtype of x: the value y, with the derivatives of the product that is not rounded."""
    full_weight = weight.to(x.dtype) * scale.to(x.dtype)[:, None]
    smoothed = x if smooth is None else x * smooth.to(x.dtype)
    plain = torch_functional.linear(smoothed, full_weight, bias.to(x.dtype))
    return plain + (y.to(x.dtype) - plain).detach()


def inputs_of(backend: Backend, dtype: torch.dtype, m: int = 9, n: int = 33) -> list[Tensor]:
    inputs = operands(m, 40, n, dtype, backend.device)
    return [t.requires_grad_() if t.dtype == dtype and t.dim() != 1 else t for t in inputs[:3]] + [
        inputs[3].requires_grad_()
    ]


@MODES
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients(backend: Backend, dtype: torch.dtype, smoothed: bool, weight_only: bool) -> None:
    """Of x and bias, against float64: twice torch's own error, in the sizes of a trained model:
    weights of 0.02 (a step of 6e-4), gradients of 1e-3."""
    x, weight, _, bias = inputs_of(backend, dtype)
    scale = normal(33).abs().to(backend.device) * 3e-4 + 5e-4
    smooth = normal(40).abs().to(backend.device) + 0.1 if smoothed else None
    grad = (normal(9, 33) * 1e-3).to(dtype).to(backend.device)
    with nan_memory():
        y = F.int8_linear(x, weight, scale, bias, smooth=smooth, weight_only=weight_only)
        actual = torch.autograd.grad(y, (x, bias), grad)
    results = []
    for wide in (torch.float64, dtype):
        tensors = [t.detach().cpu().to(wide).requires_grad_() for t in (x, bias)]
        cpu_smooth = None if smooth is None else smooth.cpu()
        z = straight_through(
            tensors[0], weight.cpu(), scale.cpu(), tensors[1], cpu_smooth, y.detach().cpu()
        )
        results.append(torch.autograd.grad(z, tensors, grad.cpu().to(wide)))
    finfo = torch.finfo(dtype)
    for ours, exact, torchs in zip(actual, *results, strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        error = (ours.cpu().double() - exact).abs().max()
        of_torch = (torchs.double() - exact).abs().max()
        allowed = 2 * of_torch + finfo.eps * exact.abs().max() + finfo.tiny * finfo.eps
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@MODES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_gradients(backend: Backend, activation: str, weight_only: bool) -> None:
    """First and second derivatives, taken at the value that was computed."""
    x, weight, scale, bias = inputs_of(backend, torch.float32)
    scale = scale / 8  # values of a size where the activations bend
    options: dict[str, Any] = {"weight_only": weight_only, "activation": activation}
    y = F.int8_linear(x, weight, scale, bias, **options)
    plain = F.int8_linear(x, weight, scale, bias, weight_only=weight_only).detach()
    with torch.no_grad():
        torch.testing.assert_close(F.int8_linear(x, weight, scale, bias, **options), y)

    def derivatives(y: Tensor, x: Tensor, bias: Tensor) -> list[Tensor]:
        grad = normal(9, 33).to(y.device).to(y.dtype).requires_grad_()
        first = torch.autograd.grad(y, (x, bias), grad, create_graph=True)
        total = sum((g * g.detach().cos()).sum() for g in first)
        second = torch.autograd.grad(total, (x, bias, grad), materialize_grads=True)
        return [t.detach().double().cpu() for t in (y, *first, *second)]

    wide = [t.detach().cpu().double().requires_grad_() for t in (x, bias)]
    z = straight_through(wide[0], weight.cpu(), scale.cpu(), wide[1], None, plain.cpu())
    z = z.relu() if activation == "relu" else exact_activation(z, activation)
    actual, expected = derivatives(y, x, bias), derivatives(z, *wide)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * float(e.abs().max() + 1e-3))
    assert activation in ("none", "relu") or all(t.any() for t in expected)


@MODES
def test_value_does_not_depend_on_gradients(backend: Backend, weight_only: bool) -> None:
    """Without activation to the bit; with one it is a pass of its own on the rounded result."""
    inputs = inputs_of(backend, torch.bfloat16)
    y = F.int8_linear(*inputs, weight_only=weight_only)
    with torch.no_grad():
        assert_bits_equal(F.int8_linear(*inputs, weight_only=weight_only), y)
    assert y.requires_grad


def test_what_gets_a_gradient(backend: Backend) -> None:
    """x, bias, both or none; a static scale too; the weights never."""
    x, weight, scale, bias = inputs_of(backend, torch.float32)
    one = torch.tensor(0.02, device=backend.device)
    for tensors in ((x, None), (x.detach(), bias), (x, bias)):
        for options in ({}, {"input_scale": one}, {"weight_only": True}):
            y = F.int8_linear(tensors[0], weight, scale, tensors[1], **options)
            for t in (x, bias):
                t.grad = None
            y.sum().backward()
            if tensors[0] is x:
                expected = (weight.float() * scale[:, None]).sum(0).expand(9, 40)
                torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
            else:
                assert x.grad is None
            if tensors[1] is None:
                assert bias.grad is None
            else:
                assert bias.grad is not None and (bias.grad == 9).all()
    assert not F.int8_linear(x.detach(), weight, scale, bias.detach()).requires_grad


def test_gradient_shapes(backend: Backend) -> None:
    """Of no rows, one dimension, expanded and strided x, and mixed dtypes."""
    _, weight, scale, bias = inputs_of(backend, torch.bfloat16)
    for x in (normal(0, 40), normal(40), normal(2, 3, 40), normal(1, 40).expand(5, 40)):
        x = x.to(backend.device).requires_grad_()
        y = F.int8_linear(x, weight, scale, bias, dtype=torch.float32)
        x_grad, bias_grad = torch.autograd.grad(y.sum(), (x, bias))
        assert x_grad.shape == x.shape and x_grad.dtype == torch.float32
        assert bias_grad.shape == bias.shape and bias_grad.dtype == torch.bfloat16
        assert (bias_grad == y.shape[:-1].numel()).all()


CALLS: dict[str, Function] = {
    "W8A8": lambda x, *t: F.int8_linear(x, *t, activation="gelu"),
    "weight-only": lambda x, *t: F.int8_linear(x, *t, weight_only=True, dtype=torch.bfloat16),
    "rows": lambda x, *t: F.dequantize_int8(*F.quantize_int8(x)),
    "asymmetric tensor": lambda x, *t: F.dequantize_int8(
        *F.quantize_int8(x, granularity="tensor", symmetric=False), granularity="tensor"
    ),
    "channels": lambda x, *t: F.quantize_int8(x, granularity="channel", dim=1)[0],
    "blocks": lambda x, *t: F.quantize_int8(x, granularity="block", block_size=7)[1],
    "fake quantize": lambda x, *t: F.fake_quantize(x, granularity="block", block_size=7),
    "given scale": lambda x, w, s, b: F.fake_quantize(x, scale=s[:1]),
    "product": lambda x, weight, *t: F.int8_mm(F.quantize_int8(x)[0], weight.t()),
    "quantized before": lambda x, w, s, b: F.int8_linear(
        F.quantize_int8(x)[0], w, s, b, input_scale=F.quantize_int8(x)[1]
    ),
}
DIFFERENTIABLE = ("W8A8", "weight-only", "fake quantize", "given scale")


@pytest.mark.parametrize("call", CALLS)
def test_compiles_fullgraph(call: str) -> None:
    """For any number of rows in one graph, with the bits and gradients of eager mode."""
    function = CALLS[call]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (9, 12):
        inputs = [t.requires_grad_(t.is_floating_point()) for t in operands(m, 40, 33, FLOATS[0])]
        inputs[2].requires_grad_(False)
        results = []
        for f in (function, compiled):
            y = f(*inputs)
            grads: tuple[Tensor, ...] = ()
            if call in DIFFERENTIABLE:
                wanted = [t for t in inputs if t.requires_grad]
                wanted = wanted if call in ("W8A8", "weight-only") else wanted[:1]
                grads = torch.autograd.grad(y.float().square().sum(), wanted)
            results.append((y.detach(), *grads))
        for eager, other in zip(*results, strict=True):
            assert eager.dtype == other.dtype and torch.equal(eager, other)


class Layer(torch.nn.Module):
    def __init__(self, weight_only: bool) -> None:
        super().__init__()
        _, weight, scale, bias = operands(1, 40, 33, torch.float32)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.weight_only = weight_only

    def forward(self, x: Tensor) -> Tensor:
        tensors = (x, self.weight, self.scale, self.bias)
        return F.int8_linear(*tensors, weight_only=self.weight_only, activation="silu")


@MODES
def test_exports(weight_only: bool) -> None:
    layer = Layer(weight_only)
    rows = ({0: torch.export.Dim("n")},)
    exported = torch.export.export(layer, (normal(4, 40),), dynamic_shapes=rows).module()
    for m in (4, 7):
        assert_bits_equal(exported(normal(m, 40)), layer(normal(m, 40)))


@pytest.mark.parametrize("call", CALLS)
def test_fake_results_are_like_real_ones(call: str) -> None:
    inputs = operands(9, 40, 33, torch.float32)
    layouts = (inputs[0], inputs[0].t().contiguous().t(), inputs[0][:, :40:1].expand(9, 40))
    for x in layouts:
        with FakeTensorMode() as mode:
            fake = CALLS[call](*(mode.from_tensor(t) for t in (x, *inputs[1:])))
        y = CALLS[call](x, *inputs[1:])
        assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)


@pytest.mark.parametrize("call", [name for name in CALLS if name != "channels"])
def test_vmap(backend: Backend, call: str) -> None:
    """Over x, and a gradient of each sample."""
    x, *rest = (t.detach() for t in inputs_of(backend, torch.float32, 12))
    x = x.view(3, 4, 40)
    function = lambda x: CALLS[call](x, *rest)  # noqa: E731
    expected = torch.stack([function(sample) for sample in x])
    assert torch.equal(torch.func.vmap(function)(x), expected)
    if call in DIFFERENTIABLE:
        loss = lambda x: function(x).float().square().sum()  # noqa: E731
        gradients = []
        for sample in x:
            sample = sample.clone().requires_grad_()
            loss(sample).backward()
            gradients.append(sample.grad)
        actual = torch.func.vmap(torch.func.grad(loss))(x)
        torch.testing.assert_close(actual, torch.stack(gradients))


def test_vmap_over_weights(backend: Backend) -> None:
    x = normal(5, 40).to(backend.device)
    weights, scales = ints(3, 33, 40).to(backend.device), normal(3, 33).abs().to(backend.device)
    y = torch.func.vmap(F.int8_linear, (None, 0, 0))(x, weights, scales)
    for i in range(3):
        assert_bits_equal(y[i], linear(x, weights[i], scales[i]))


@MODES
def test_forward_mode(backend: Backend, weight_only: bool) -> None:
    """A tangent goes the way of the gradient: through the weights, as if x was not rounded."""
    x, weight, scale, bias = (t.detach() for t in inputs_of(backend, torch.float32))
    tangent = normal(9, 41)[:, 1:].to(backend.device)
    function = lambda x: F.int8_linear(x, weight, scale, bias, weight_only=weight_only)  # noqa: E731
    y, actual = torch.func.jvp(function, (x,), (tangent,))
    expected = tangent.double() @ (weight.double() * scale.double()[:, None]).t()
    torch.testing.assert_close(y, function(x), rtol=1e-4, atol=1e-4)  # sums in another order
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    x, weight, scale, bias = operands(9, 40, 33, torch.float32)
    x = x.requires_grad_(requires_grad)
    ops = torch.ops.pyfast
    for weight_only in (False, True):
        arguments = (x, weight, scale, bias, None, None, weight_only, "none", torch.bfloat16)
        torch.library.opcheck(ops.int8_linear, arguments)
    x = x.detach()
    torch.library.opcheck(ops.int8_mm, (weight, weight.t()))
    for symmetric in (True, False):
        torch.library.opcheck(ops.quantize_int8, (x, None, None, 7, symmetric))


def test_lazy_negation(backend: Backend) -> None:
    """The imaginary part of a conjugate is a view that torch negates on reading."""
    _, *rest = (t.detach() for t in inputs_of(backend, torch.float32))
    x = torch.complex(normal(9, 40), normal(9, 40)).to(backend.device).conj().imag
    assert x.is_neg()
    for function in (lambda x: F.int8_linear(x, *rest), lambda x: F.quantize_int8(x)[1]):
        assert_bits_equal(function(x), function(x.resolve_neg().clone()))


def test_tensor_subclasses(backend: Backend) -> None:
    class Named(torch.Tensor):
        pass

    x, *rest = (t.detach() for t in inputs_of(backend, torch.float32))
    for function in (lambda x: F.int8_linear(x, *rest), F.fake_quantize):
        y = function(x.as_subclass(Named))
        assert type(y) is Named
        assert_bits_equal(y.as_subclass(Tensor), function(x))
