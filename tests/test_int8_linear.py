"""int8_linear: quantized rows to the bit, weight-only against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
from conftest import Backend
from int8_oracle import (
    FLOATS,
    LINEAR_SHAPES,
    MATRICES,
    SLOW_LINEAR_SHAPES,
    assert_only_outputs_written,
    assert_same,
    check_large_sums,
    check_linear,
    check_linear_activation,
    guarded_outputs,
    ints,
    linear,
    operands,
)
from oracle import LAYOUTS, assert_bits_equal, nan_memory, normal, poison_recycled_blocks
from test_bias_dropout_add import assert_as_accurate_as_torch
from test_quantize_int8 import signal_to_noise
from torch import Tensor

import pyfast

F = pyfast.nn.functional
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
MODES = pytest.mark.parametrize("weight_only", [False, True], ids=["W8A8", "weight-only"])
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def shapes_of(backend: Backend, dtype: torch.dtype) -> tuple[tuple[int, int, int], ...]:
    if backend.is_slow:
        return SLOW_LINEAR_SHAPES if dtype == torch.float32 else SLOW_LINEAR_SHAPES[1:2]
    return LINEAR_SHAPES


def skip_repetition(backend: Backend, dtype: torch.dtype = torch.float16) -> None:
    if backend.is_slow and dtype == torch.float16:
        pytest.skip("interpreted, and not different from the other dtype or mode")


@each_dtype
def test_matches_oracle(backend: Backend, dtype: torch.dtype) -> None:
    check_linear(F.int8_linear, dtype, backend.device, shapes_of(backend, dtype))


def test_large_sums(backend: Backend) -> None:
    check_large_sums(F.int8_linear, backend.device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_dtype
def test_activation(backend: Backend, dtype: torch.dtype, activation: str) -> None:
    shapes = ((1, 33, 50), (9, 64, 33)) if backend.is_slow else ((1, 33, 50), (37, 64, 49))
    for m, k, n in shapes:
        inputs = operands(m, k, n, dtype, backend.device)
        check_linear_activation(F.int8_linear, inputs, activation)


def float_weight(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.double() * scale.double()[:, None]


@each_dtype
def test_weight_only(backend: Backend, dtype: torch.dtype) -> None:
    """Twice torch's error over all, and for each element the bound of a float32 sum in any order:
    K + 3 roundings of 2**-24 of the terms' magnitudes, and the last one to the dtype."""
    for i, (m, k, n) in enumerate(shapes_of(backend, dtype)):
        inputs = operands(m, k, n, dtype, backend.device)
        x, weight, scale, bias = inputs
        smooth = normal(k).abs().to(backend.device) + 0.1 if i % 2 else None
        with nan_memory():
            y = F.int8_linear(*inputs, weight_only=True, smooth=smooth).cpu()
        x, weight, scale, bias = (t.cpu() for t in inputs)
        exact_x = x.double() if smooth is None else x.double() * smooth.cpu().double()
        exact_weight = float_weight(weight, scale)
        exact = torch_functional.linear(exact_x, exact_weight, bias.double())
        terms = torch_functional.linear(exact_x.abs(), exact_weight.abs(), bias.double().abs())
        finfo = torch.finfo(dtype)
        allowed = (k + 3) * 2**-24 * terms + finfo.eps / 2 * exact.abs() * 1.01 + finfo.tiny
        message = f"{(m, k, n)} {dtype}"
        assert ((y.double() - exact).abs() <= allowed).all(), message
        torchs = torch_functional.linear(exact_x.to(dtype), exact_weight.to(dtype), bias)
        assert_as_accurate_as_torch(y, torchs, exact, message, 1.0, 0.0)


@each_dtype
def test_weight_only_beside_an_outlier(backend: Backend, dtype: torch.dtype) -> None:
    """What one large element of a row may cost the others, whose product alone is asked for."""
    skip_repetition(backend, dtype)
    for m in (2, 9) if backend.is_slow else (1, 2, 5, 9, 16, 40):
        x, weight, scale, _ = operands(m, 70, 33, dtype, backend.device)
        x[:, 3] *= 1e3
        weight[:, 3] = 0
        y = F.int8_linear(x, weight, scale, weight_only=True, dtype=torch.float32).cpu().double()
        x, exact_weight = x.cpu().double(), float_weight(weight.cpu(), scale.cpu())
        exact = torch_functional.linear(x, exact_weight)
        bits = 31 if dtype == torch.float32 else 23
        unit = 2.0**-bits * x.abs().amax(1, keepdim=True) * exact_weight.abs().sum(1)
        terms = torch_functional.linear(x.abs(), exact_weight.abs())
        assert ((y - exact).abs() <= unit + 73 * 2**-24 * terms).all(), f"{m} rows {dtype}"


@each_dtype
def test_weight_only_activation(backend: Backend, dtype: torch.dtype) -> None:
    """That of the float32 result; one that is rounded to the dtype before is further off."""
    inputs = operands(5, 64, 33, dtype, backend.device)
    plain = F.int8_linear(*inputs, weight_only=True, dtype=torch.float32)
    functions = {
        "relu": torch.relu,
        "gelu": torch_functional.gelu,
        "gelu_tanh": lambda t: torch_functional.gelu(t, approximate="tanh"),
        "silu": torch_functional.silu,
    }
    for activation, function in functions.items():
        y = F.int8_linear(*inputs, weight_only=True, activation=activation)
        exact = function(plain.double())
        allowed = torch.finfo(dtype).eps / 2 * 1.01 * exact.abs() + 2**-20 * plain.abs() + 1e-7
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= allowed).all(), activation


@each_dtype
def test_rows_do_not_depend_on_each_other(backend: Backend, dtype: torch.dtype) -> None:
    """A row alone, in batches of any size, at any place, beside NaN and beside huge values."""
    skip_repetition(backend, dtype)
    nan = float("nan")
    for k, n in ((37, 50),) if backend.is_slow else ((37, 50), (64, 64), (130, 17)):
        x, *rest = operands(70, k, n, dtype, backend.device)
        alone = torch.cat([F.int8_linear(x[i : i + 1], *rest) for i in range(0, 70, 7)])
        for m in (2, 70) if backend.is_slow else (*range(2, 18), 33, 64, 70):
            y = F.int8_linear(x[:m], *rest)
            assert_bits_equal(y[::7], alone[: -(-m // 7)], f"batch of {m}")
        for other in (nan, 1e4) if backend.is_slow else (nan, float("inf"), 1e4, 0.0):
            changed = torch.full_like(x, other)
            changed[::7] = x[::7]
            y = F.int8_linear(changed, *rest)
            assert_bits_equal(y[::7], alone, f"beside {other}")
            assert other != other or not y[::7].isnan().any()


@each_dtype
def test_rows_of_digits_do_not_depend_on_each_other(backend: Backend, dtype: torch.dtype) -> None:
    """Weight-only with AMX: up to 16 rows of bfloat16, and any number of the others."""
    if backend.level != "amx":
        pytest.skip("rows have no digits")
    for k, n in ((37, 50), (64, 64), (130, 17)):
        x, *rest = operands(70, k, n, dtype, backend.device)
        exact: dict[str, Any] = {"weight_only": True, "dtype": torch.float32}
        alone = torch.cat([F.int8_linear(row, *rest, **exact) for row in x.split(1)])
        for m in (*range(2, 17), *(() if dtype == torch.bfloat16 else (17, 33, 70))):
            y = F.int8_linear(x[:m], *rest, **exact)
            assert_bits_equal(y, alone[:m], f"batch of {m}")
        changed = torch.full_like(x[:16], float("nan"))
        changed[::5] = x[:16:5]
        y = F.int8_linear(changed, *rest, **exact)
        assert_bits_equal(y[::5], alone[:16:5], "beside NaN")


@MODES
@each_dtype
def test_not_finite_rows(backend: Backend, dtype: torch.dtype, weight_only: bool) -> None:
    """They become NaN, through every activation, and touch no other row. (Weight-only: a row of Inf
    may be Inf or NaN, as in torch.)"""
    skip_repetition(backend, dtype)
    inputs = operands(20, 67, 33, dtype, backend.device)
    bad = {0: float("nan"), 5: float("inf"), 11: float("-inf"), 19: float("nan")}
    x = inputs[0].clone()
    for row, value in bad.items():
        x[row, (row * 13) % 67] = value
    others = [row for row in range(20) if row not in bad]
    one = torch.tensor(0.02, device=backend.device)
    cases = [{}] if weight_only else [{}, {"input_scale": one}]
    for options in cases:
        for activation in ("relu", "gelu") if backend.is_slow else ACTIVATIONS:
            options = {**options, "activation": activation, "weight_only": weight_only}
            y = F.int8_linear(x, *inputs[1:], **options)
            clean = F.int8_linear(*inputs, **options)
            for row, value in bad.items():
                if value != value or not weight_only:
                    assert y[row].isnan().all(), f"row {row} {options}"
            if weight_only:
                assert not y[others].isnan().any()
                torch.testing.assert_close(y[others], clean[others], rtol=0.02, atol=0.02)
            else:
                assert_bits_equal(y[others], clean[others], f"{options}")


@MODES
@each_dtype
def test_zero_rows_give_the_bias(backend: Backend, dtype: torch.dtype, weight_only: bool) -> None:
    skip_repetition(backend, dtype)
    for m in (1, 9, 33):
        x, weight, scale, bias = operands(m, 65, 50, dtype, backend.device)
        x[m // 2] = 0.0
        x[0] = -0.0
        y = F.int8_linear(x, weight, scale, bias, weight_only=weight_only)
        for row in (0, m // 2):
            assert_bits_equal(y[row], bias, f"row {row} of {m}")
        y = F.int8_linear(x, weight, scale, weight_only=weight_only)
        assert not y[0].any() and not y[m // 2].any()


def test_silu_of_large_values(backend: Backend) -> None:
    """It vanishes on the left, to -Inf, where torch gives NaN."""
    x = torch.tensor([[-torch.inf], [-3e38], [-1e38], [-100.0], [-88.0], [100.0], [3e38]])
    one = torch.ones(33, 1, dtype=torch.int8, device=backend.device)
    y = F.int8_linear(
        x.to(backend.device), one, one[:, 0].float(), weight_only=True, activation="silu"
    )
    expected = torch_functional.silu(x.double()).float().expand(7, 33)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-36, equal_nan=True)


@MODES
def test_empty(backend: Backend, weight_only: bool) -> None:
    """No row, no input feature (the bias, in every row), no output feature."""
    shapes = [((0, 8), 5), ((3, 0), 5), ((2, 3, 0), 5), ((0,), 5), ((3, 8), 0), ((0, 0), 0)]
    for shape, n in (*shapes, ((9, 0), 128), ((40, 0), 300)):
        x = normal(*shape).to(backend.device)
        weight, scale = ints(n, shape[-1]).to(backend.device), torch.ones(n, device=backend.device)
        bias = normal(n).to(backend.device)
        with nan_memory():
            y = F.int8_linear(x, weight, scale, bias, weight_only=weight_only, activation="relu")
        assert_bits_equal(y, bias.relu().expand(*shape[:-1], n), f"{shape} to {n}")
        y = F.int8_linear(x, weight, scale, None, weight_only=weight_only, dtype=torch.bfloat16)
        assert_bits_equal(y, torch.zeros(*shape[:-1], n).bfloat16())
    x, one = ints(2, 3, 0).to(backend.device), torch.ones(2, 3, device=backend.device)
    y = F.int8_linear(
        x, weight.new_empty(5, 0), one.new_ones(5), normal(5).to(x.device), input_scale=one
    )
    assert_bits_equal(y, normal(5).expand(2, 3, 5))


@MODES
def test_any_rank(backend: Backend, weight_only: bool) -> None:
    _, *rest = operands(1, 37, 20, torch.float32, backend.device)
    x = normal(2, 3, 4, 37).to(backend.device)
    expected = F.int8_linear(x.view(24, 37), *rest, weight_only=weight_only)
    assert_same(
        [F.int8_linear(x, *rest, weight_only=weight_only)],
        [expected.cpu().view(2, 3, 4, 20)],
        "4-D",
    )
    y = F.int8_linear(x[0, 0, 0], *rest, weight_only=weight_only)
    assert y.shape == (20,)
    if weight_only:
        torch.testing.assert_close(y, expected[0])
    else:
        assert_bits_equal(y, expected[0])
        scale = normal(2, 3, 4).abs().to(backend.device)
        values = ints(2, 3, 4, 37).to(backend.device)
        y = F.int8_linear(values, *rest, input_scale=scale)
        assert_same([y], [linear(values, *rest, input_scale=scale)], "int8, 4-D")
        y = F.int8_linear(values[0, 0, 0], *rest, input_scale=scale[0, 0, 0])
        assert_bits_equal(y, linear(values, *rest, input_scale=scale)[0, 0, 0])


@MODES
@pytest.mark.parametrize(
    "layout", [name for name in LAYOUTS if name not in ("scalar", "long rows with gaps")]
)
def test_noncontiguous(backend: Backend, layout: str, weight_only: bool) -> None:
    """x, weight, and everything that is a vector."""
    if weight_only:
        skip_repetition(backend)
    x = LAYOUTS[layout]().to(backend.device)
    k, n = x.shape[-1], 21
    vector = lambda size: normal(2 * size + 1)[1::2].abs() * 0.1  # noqa: E731
    names = ("transposed", "rows with gaps", "misaligned", "steps")
    for name in names[:1] if backend.is_slow else names:
        weight = MATRICES[name](n, k)
        strided = (x, weight, vector(n), vector(n), vector(k))
        *tensors, smooth = (t.to(backend.device) for t in strided)
        before = [t.clone() for t in tensors]
        y = F.int8_linear(*tensors, smooth=smooth, weight_only=weight_only)
        *plain, smooth = (t.contiguous().clone() for t in (*tensors, smooth))
        expected = F.int8_linear(*plain, smooth=smooth, weight_only=weight_only)
        assert y.is_contiguous()
        if backend.name == "reference":  # torch's float sums depend on strides
            torch.testing.assert_close(y, expected)
        else:
            assert_bits_equal(y, expected)
        if not weight_only:
            assert_bits_equal(y, linear(*plain, smooth=smooth))
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_dtypes(backend: Backend) -> None:
    """Any of x, bias and result."""
    x, weight, scale, bias = operands(7, 33, 18, torch.float32, backend.device)
    for x_dtype in FLOATS:
        for bias_dtype in (*FLOATS, torch.float64):
            for dtype in (None, torch.float16) if backend.is_slow else (None, *FLOATS):
                tensors = (x.to(x_dtype), weight, scale, bias.to(bias_dtype))
                expected = linear(*tensors, dtype=dtype)
                assert_same([F.int8_linear(*tensors, dtype=dtype)], [expected], f"{x_dtype}")
        y = F.int8_linear(*tensors, weight_only=True, dtype=torch.bfloat16)
        assert y.dtype == torch.bfloat16
    values, row_scale = ints(7, 33).to(backend.device), torch.rand(7, device=backend.device)
    for given, dtype in ((None, torch.float32), (bias, torch.float32), (bias.half(), torch.half)):
        y = F.int8_linear(values, weight, scale, given, input_scale=row_scale)
        assert y.dtype == dtype
        assert_bits_equal(y, linear(values, weight, scale, given, input_scale=row_scale))


def test_float64() -> None:
    """No kernel computes in it: served by the reference, refused by a backend that was named."""
    x, weight, scale, bias = operands(7, 33, 18, torch.float64)
    assert_bits_equal(F.int8_linear(x, weight, scale, bias), linear(x, weight, scale, bias))
    y = F.int8_linear(x.float(), weight, scale, dtype=torch.float64)
    assert_bits_equal(y, linear(x.float(), weight, scale, dtype=torch.float64))
    with pyfast.use_backend("cpu"), pytest.raises(RuntimeError, match="int8_linear: the backend"):
        F.int8_linear(x, weight, scale, bias)


@each_dtype
def test_extreme_values(backend: Backend, dtype: torch.dtype) -> None:
    """The largest sums, scales and values; results beyond the dtype are Inf; tiny ones vanish."""
    if dtype not in backend.exact_dtypes:
        pytest.skip(f"{backend.name} has no subnormal values of {dtype} here")
    finfo = torch.finfo(dtype)
    x = torch.ones(6, 600)
    x[1], x[2] = -1.0, finfo.max
    x[3], x[4], x[5] = finfo.tiny, finfo.tiny * finfo.eps * 3, torch.arange(600) % 3 - 1.0
    weight = torch.full((4, 600), 127, dtype=torch.int8)
    weight[1], weight[2, ::2], weight[3] = -128, -127, torch.arange(600) % 5 - 2
    scale = torch.tensor([1.0, 1e-3, 1e30, 1e-30])
    tensors = [t.to(backend.device) for t in (x.to(dtype), weight, scale, normal(4).to(dtype))]
    y = F.int8_linear(*tensors)
    assert_same([y], [linear(*tensors)], f"{dtype}")
    assert y.isinf().any() and not y.isnan().any()


@pytest.mark.backends("reference", "cpu")
@MODES
def test_large(backend: Backend, weight_only: bool) -> None:
    """The memory of the result is recycled, and held NaN before."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = operands(515, 24, 520, dtype)
        poison_recycled_blocks(torch.empty(515, 520, dtype=dtype))
        y = F.int8_linear(*inputs, weight_only=weight_only)
        if weight_only:
            x, weight, scale, bias = inputs
            exact = torch_functional.linear(x.double(), float_weight(weight, scale), bias.double())
            assert ((y - exact).abs() <= 2 * torch.finfo(dtype).eps * exact.abs().max()).all()
        else:
            assert_same([y], [linear(*inputs)], "large")


@pytest.mark.backends("cpu")
@MODES
def test_threads_agree(backend: Backend, weight_only: bool) -> None:
    for m, k, n in ((1, 1024, 500), (4, 2050, 130), (33, 70, 1000), (300, 257, 100)):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = operands(m, k, n, dtype)
            results = []
            for num_threads in (1, 2, 3):
                torch.set_num_threads(num_threads)
                results.append(F.int8_linear(*inputs, weight_only=weight_only, activation="gelu"))
            assert_bits_equal(results[1], results[0], "two threads:")
            assert_bits_equal(results[2], results[0], "three threads:")


@pytest.mark.backends("cpu")
@MODES
def test_writes_only_the_output(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, weight_only: bool
) -> None:
    for m, k, n in LINEAR_SHAPES:
        for dtype in FLOATS:
            inputs = operands(m, k, n, dtype)
            before = [t.clone() for t in inputs]
            with guarded_outputs(monkeypatch) as made:
                y = F.int8_linear(*inputs, weight_only=weight_only)
            assert_only_outputs_written(made, y)
            assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_signal_to_noise(backend: Backend) -> None:
    """Two roundings of about 43 dB each: 3 dB less; weight-only has one of them."""
    x, weight = normal(32, 256).to(backend.device), normal(64, 256).flip(0, 1).to(backend.device)
    values, scale = F.quantize_int8(weight)
    exact = x.double() @ weight.double().t()
    floors: dict[Any, float] = {False: 38.5, True: 41.5}
    for weight_only, floor in floors.items():
        y = F.int8_linear(x, values, scale, weight_only=weight_only)
        assert floor < signal_to_noise(exact, y) < floor + 4
