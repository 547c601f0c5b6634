"""``linear``: few rows by the kernel, everything else by torch."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as torch_F
from conftest import Backend
from int8_oracle import assert_only_outputs_written, guarded_outputs
from oracle import LAYOUTS, nan_memory, normal
from torch import Tensor, nn

import pyfast

F = pyfast.nn.functional
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
on_kernel = pytest.mark.backends("cpu")
SHAPES = (
    *((1, 1, 1), (1, 64, 48), (1, 257, 130), (2, 3, 17), (3, 63, 16), (4, 130, 33), (5, 65, 31)),
    *((6, 31, 47), (7, 128, 64), (8, 100, 65), (9, 127, 15), (12, 4, 96), (16, 32, 32)),
    *((17, 33, 63), (31, 5, 32), (32, 129, 80), (32, 1000, 97), (1, 5000, 3)),
    *((33, 64, 48), (48, 95, 31), (64, 33, 130), (81, 32, 33), (127, 70, 16), (128, 257, 65)),
)


def operands(m: int, k: int, n: int, dtype: torch.dtype) -> list[Tensor]:
    x = normal(m, k) * 4.0 ** (torch.arange(m) % 5 - 2)[:, None]
    return [x.to(dtype), normal(n, k).flip(0).to(dtype), normal(n + 1)[1:].to(dtype)]


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The product and the sum of its terms' magnitudes, in float64 by numpy."""
    a, b = (t.double().numpy() for t in (x, weight))
    c = np.zeros(len(b)) if bias is None else bias.double().numpy()
    return a @ b.T + c, np.abs(a) @ np.abs(b).T + np.abs(c)


def assert_right(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, message: str = ""
) -> None:
    """The bound of a float32 sum in any order, K + 3 roundings, and one to the dtype."""
    expected, terms = exact(x, weight, bias)
    finfo = torch.finfo(x.dtype)
    allowed = (x.shape[-1] + 3) * 2.0**-24 * terms + finfo.eps / 2 * 1.01 * np.abs(expected)
    error = np.abs(y.double().numpy() - expected)
    assert y.dtype == x.dtype and y.is_contiguous()
    assert (error <= allowed + finfo.tiny).all(), f"{message}: {error.max():.3g} off"


def served_by(*arguments: Any) -> str:
    (served,) = pyfast.explain("linear", *arguments)
    return served.backend


@on_kernel
@each_dtype
def test_matches_oracle(backend: Backend, dtype: torch.dtype) -> None:
    for m, k, n in SHAPES:
        x, weight, bias = operands(m, k, n, dtype)
        for given in (bias, None):
            with nan_memory():
                y = F.linear(x, weight, given)
            assert_right(y, x, weight, given, f"{(m, k, n)} {dtype}")
        assert served_by(x, weight, bias) == "cpu"


def wrong(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if name == "bias left out":
        return torch_F.linear(x, weight)
    if name == "tail of K dropped":
        return torch_F.linear(x[:, :-1], weight[:, :-1], bias)
    if name == "rows of weights turned":
        return torch_F.linear(x, weight.roll(1, 0), bias)
    return torch_F.linear(x.to(torch.float8_e5m2).to(x.dtype), weight, bias)


@each_dtype
@pytest.mark.parametrize(
    "name", ["bias left out", "tail of K dropped", "rows of weights turned", "x rounded"]
)
def test_oracle_rejects(name: str, dtype: torch.dtype) -> None:
    x, weight, bias = operands(4, 130, 33, dtype)
    assert_right(torch_F.linear(x.float(), weight.float(), bias.float()).to(dtype), x, weight, bias)
    with pytest.raises(AssertionError):
        assert_right(wrong(name, x, weight, bias), x, weight, bias)


@on_kernel
@each_dtype
def test_not_finite(backend: Backend, dtype: torch.dtype) -> None:
    """NaN and Inf in x, the weight and the bias reach what they are a term of, and nothing else: a
    block is padded with zeros, not with its neighbours."""
    nan, inf = float("nan"), float("inf")
    for m, k, n in ((3, 33, 35), (20, 70, 33)):
        x, weight, bias = operands(m, k, n, dtype)
        x[1, k - 1], weight[n - 1, 0], weight[4, 7], bias[2] = nan, inf, nan, -inf
        weight[5, k - 1] = 0.0
        y = F.linear(x, weight, bias)
        expected = torch_F.linear(x.double(), weight.double(), bias.double())
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())


@on_kernel
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if LAYOUTS[name]().dim() in (2, 3)])
def test_strides(backend: Backend, layout: str) -> None:
    x = LAYOUTS[layout]()
    if x.numel() // x.shape[-1] > 32:
        x = x[:2]
    x = x if x.dim() == 2 or x.shape[0] * x.shape[1] <= 32 else x[0]
    k = x.shape[-1]
    weight = normal(2 * k + 1, 21).t()[:, 1::2]
    bias = normal(42)[::2]
    y = F.linear(x, weight, bias)
    flat = x.reshape(-1, k)
    assert served_by(x, weight, bias) == "cpu" and y.shape == (*x.shape[:-1], 21)
    assert_right(y.reshape(-1, 21), flat, weight, bias, layout)
    for negative in (x.neg(), torch._neg_view(x)):
        y = F.linear(negative, weight)
        assert_right(y.reshape(-1, 21), -flat, weight, None, f"negative {layout}")


@on_kernel
def test_rows_and_threads_do_not_matter(backend: Backend) -> None:
    """To the bit, up to the rows that the kernel serves."""
    for dtype in DTYPES:
        x, weight, bias = operands(16, 257, 500, dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(F.linear(x, weight, bias))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        for m in (3, 8):
            assert torch.equal(F.linear(x[:m], weight, bias), results[0][:m])


@on_kernel
def test_writes_only_the_output(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    for m, k, n in SHAPES:
        for dtype in DTYPES:
            inputs = operands(m, k, n, dtype)
            before = [t.clone() for t in inputs]
            with guarded_outputs(monkeypatch) as made:
                y = F.linear(*inputs)
            assert_only_outputs_written(made, y)
            assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_the_choice() -> None:
    """Few rows, where they were measured to be faster; a forced backend serves what it can."""
    native = pyfast._backend.native
    if native is None or native.selected_isa() == "generic":
        pytest.skip("no kernel is chosen here")
    weight = normal(9, 20)
    expected = {torch.float32: {3: "cpu", 8: "cpu", 2: "torch", 1: "torch"}}
    for dtype in (torch.bfloat16, torch.float16):
        expected[dtype] = {1: "cpu", 8: "cpu", 129: "torch", 0: "torch"}
    expected[torch.float64] = {4: "torch"}
    for dtype, rows in expected.items():
        for m, backend in rows.items():
            assert served_by(normal(m, 20).to(dtype), weight.to(dtype)) == backend
    with pyfast.use_backend("cpu"):
        assert served_by(normal(1, 20), weight) == "cpu"
        assert served_by(normal(128, 20), weight) == "cpu"
        assert served_by(normal(129, 20), weight) == "torch"
    with pyfast.use_backend("reference"):
        assert served_by(normal(4, 20), weight) == "torch"


def test_everything_else_is_torchs() -> None:
    x, weight, bias = operands(4, 20, 9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, weight, bias).dtype == torch.bfloat16
    parameter = nn.Parameter(weight.clone())
    F.linear(x, parameter, bias).sum().backward()
    assert parameter.grad is not None
    native = pyfast._backend.native
    has_kernel = native is not None and native.selected_isa() != "generic"
    assert served_by(x, parameter, bias) == "torch"
    with torch.no_grad():
        assert served_by(x, parameter, bias) == ("cpu" if has_kernel else "torch")
    torch.testing.assert_close(F.linear(x, weight[0]), torch_F.linear(x, weight[0]))
    mapped = torch.func.vmap(lambda row: F.linear(row, weight, bias))(x[:, None])
    torch.testing.assert_close(mapped[:, 0], torch_F.linear(x, weight, bias))
    _, tangent = torch.func.jvp(lambda t: F.linear(t, weight, bias), (x,), (x,))
    torch.testing.assert_close(tangent, torch_F.linear(x, weight))
    assert F.linear(x.to("meta"), weight.to("meta")).shape == (4, 9)
    assert F.linear(x.to_sparse(), weight).shape == (4, 9)
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([x, x[:3]], layout=layout)
        for given, expected in zip(F.linear(nested, weight).unbind(), (x, x[:3]), strict=True):
            torch.testing.assert_close(given, torch_F.linear(expected, weight))


@pytest.mark.parametrize(
    "arguments",
    [
        (normal(4, 20), normal(9, 21)),
        (normal(4, 20), normal(9, 20).bfloat16()),
        (normal(4, 20), normal(9, 20), normal(8)),
        (normal(4, 20), normal(9, 20), normal(9).bfloat16()),
        (normal(4, 20), normal(2, 9, 20)),
    ],
)
def test_errors_are_torchs(arguments: tuple[Tensor, ...]) -> None:
    with pytest.raises(RuntimeError) as torchs:
        torch_F.linear(*arguments)
    with pytest.raises(RuntimeError) as ours:
        F.linear(*arguments)
    assert str(ours.value) == str(torchs.value)


def test_native_refuses() -> None:
    native = pyfast._backend.native
    if native is None:
        pytest.skip(pyfast._backend.native_error)
    x, weight, bias = operands(4, 20, 9, torch.float32)
    y = torch.full((4, 9), 7.0)
    for bad in (
        (x[:, :-1], weight, bias, y),
        (x.double(), weight, bias, y),
        (x, weight.bfloat16(), bias, y),
        (x, weight.t(), bias, y),
        (x, weight, bias[:-1], y),
        (x, weight, bias, y[:, :-1]),
        (normal(129, 20), weight, bias, normal(129, 9)),
    ):
        with pytest.raises(ValueError, match="linear"):
            native.linear(*bad, 2)
    assert (y == 7).all()


def test_module() -> None:
    torch.manual_seed(0)
    theirs, ours = nn.Linear(20, 9), pyfast.nn.Linear(20, 9)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = normal(4, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))
    traced = torch.fx.symbolic_trace(nn.Sequential(ours, nn.ReLU()))
    calls = [node.op for node in traced.graph.nodes][1:-1]
    assert calls == ["call_module", "call_module"]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), theirs(x))


def test_patch_replaces_linear_where_asked() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 8), nn.Dropout(0.5), nn.MultiheadAttention(8, 2)).eval()

    assert type(model()[0]) is nn.Linear
    kept, swapped = model(), model()
    assert type(kept[0]) is nn.Linear and len(pyfast.patch(kept)) == 2
    report = pyfast.patch(swapped, linear=True)
    assert [e.path for e in report.swapped] == ["0", "1", "2"] and len(report) == 3
    assert type(swapped[0]) is pyfast.nn.Linear and type(kept[0]) is nn.Linear
    assert "pyfast.nn.Linear" in str(report)
    report.undo()
    assert type(swapped[0]) is nn.Linear
    both = pyfast.patch(swapped, linear=True, int8=pyfast.quantization.Int8WeightOnly())
    assert both.int8 is not None and isinstance(swapped[0], pyfast.nn.Int8Linear)


def test_quantization_takes_it() -> None:
    model = nn.Sequential(nn.LayerNorm(20), pyfast.nn.Linear(20, 8)).eval()
    x = normal(6, 20)
    calibration = pyfast.quantization.calibrate(model, [x])
    assert list(calibration.inputs) == ["1"]
    expected = model(x)
    pyfast.quantization.quantize_(
        model, pyfast.quantization.SmoothQuant(calibration, fold={"0": ["1"]})
    )
    assert type(model[1]) is pyfast.nn.Int8Linear
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)
