"""quantize_int8, dequantize_int8 and fake_quantize against numpy: values, scales, zero points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_oracle import (
    GRANULARITIES,
    as_float32,
    assert_only_outputs_written,
    assert_same,
    check_hard_rows,
    check_quantize,
    extremes,
    guarded_outputs,
    ints,
    quantized,
)
from oracle import LAYOUTS, assert_bits_equal, normal
from torch import Tensor

import pyfast

F = pyfast.nn.functional
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
# What shares a scale is one thing, how a value is read another: rows and blocks in every dtype.
COMBINATIONS = [
    (granularity, dtype)
    for granularity in GRANULARITIES
    for dtype in DTYPES
    if dtype == torch.float32 or granularity in ("row", "block of 19")
]
each_combination = pytest.mark.parametrize(("granularity", "dtype"), COMBINATIONS, ids=str)


def skip_other_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not compute in {dtype}")


def scale_for(x: Tensor, options: dict[str, Any]) -> Tensor:
    """A scale for every row, channel or block, that clamps some values."""
    shape = quantized(x, **options)[1].shape
    return (normal(2, *shape)[1].abs() * 0.01 + 0.003).to(x.device)


@each_combination
def test_matches_oracle(backend: Backend, granularity: str, dtype: torch.dtype) -> None:
    skip_other_dtypes(backend, dtype)
    options = GRANULARITIES[granularity]
    shapes = ((1, 1, 1), (3, 5, 37), (2, 1, 64), (2, 3, 130))
    for shape in shapes[1:2] if backend.is_slow else shapes:
        x = normal(*shape).to(dtype).to(backend.device)
        check_quantize(F.quantize_int8, x, **options)
        check_quantize(F.quantize_int8, x - 0.5, symmetric=False, **options)
        check_quantize(F.quantize_int8, x, scale=scale_for(x, options), **options)
        one = torch.full((1,), 0.013, device=backend.device)
        for scale in (one, one[0], one.view(1, 1, 1, 1, 1)):
            check_quantize(F.quantize_int8, x, scale=scale, **options)


@each_dtype
def test_every_row_length(backend: Backend, dtype: torch.dtype) -> None:
    """Tails of vectors; rows of one dimension; blocks of which the last is shorter."""
    skip_other_dtypes(backend, dtype)
    for n in (1, 17, 70) if backend.is_slow else range(1, 71):
        x = normal(n % 4 + 1, n).to(dtype).to(backend.device)
        check_quantize(F.quantize_int8, x)
        check_quantize(F.quantize_int8, x, symmetric=False)
        check_quantize(F.quantize_int8, x, granularity="block", block_size=n // 3 + 1)
        check_quantize(F.quantize_int8, x[0])


@each_dtype
def test_hard_rows(backend: Backend, dtype: torch.dtype) -> None:
    """Halves, the largest value, NaN and Inf in every column."""
    skip_other_dtypes(backend, dtype)
    check_hard_rows(F.quantize_int8, backend.device, dtype, 20 if backend.is_slow else 67)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_quotient(backend: Backend, dtype: torch.dtype) -> None:
    """Every significand of a row's largest value under every one of the others, down to 0.49."""
    steps = round(1 / torch.finfo(dtype).eps)
    significands = 1 + torch.arange(steps, dtype=torch.float64) / steps
    binades = 0.5 ** torch.arange(9, dtype=torch.float64)
    values = (significands[:, None] * binades).flatten()
    largest = significands[:: 1 if backend.name == "cpu" else steps // 8]
    x = torch.minimum(values, largest[:, None]).to(dtype)
    check_quantize(F.quantize_int8, x.to(backend.device))


@each_dtype
def test_extreme_values(backend: Backend, dtype: torch.dtype) -> None:
    """Zeros, the largest differences, subnormal scales and those that vanish, beyond float32."""
    if dtype not in backend.exact_dtypes:
        pytest.skip(f"{backend.name} has no subnormal values of {dtype} here")
    x = extremes(dtype).to(backend.device)
    for symmetric in (True, False):
        check_quantize(F.quantize_int8, x, symmetric=symmetric)
        for block_size in (1, 2, 31):
            options = {"granularity": "block", "block_size": block_size}
            check_quantize(F.quantize_int8, x, symmetric=symmetric, **options)
    for scale in (1e-38, 1e-30, 1.0, 3e38):
        check_quantize(F.quantize_int8, x, scale=torch.tensor(scale, device=backend.device))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "scalar"])
def test_noncontiguous(backend: Backend, layout: str) -> None:
    x = LAYOUTS[layout]().to(backend.device)
    for view in (x, x.half().expand(2, *x.shape)):
        for granularity in (
            ("row",) if backend.is_slow else ("row", "middle channel", "block of 19")
        ):
            if granularity != "middle channel" or view.dim() > 1:
                check_quantize(F.quantize_int8, view, **GRANULARITIES[granularity])
        check_quantize(F.quantize_int8, view, granularity="tensor", symmetric=False)


@settings(max_examples=40)
@given(data=st.data())
def test_any_call(backend: Backend, data: st.DataObject) -> None:
    shape = [*data.draw(st.lists(st.integers(1, 5), max_size=2)), data.draw(st.integers(1, 150))]
    x = normal(data.draw(st.integers(0, 3)) + 1, *shape)[-1] * 2.0 ** data.draw(st.integers(-9, 9))
    x = x.to(data.draw(st.sampled_from(backend.dtypes)))
    x = x.permute(data.draw(st.permutations(range(x.dim())))).to(backend.device)
    options: dict[str, Any] = {
        "granularity": data.draw(st.sampled_from(["row", "tensor", "channel", "block"]))
    }
    if options["granularity"] == "block":
        options["block_size"] = data.draw(st.integers(1, 160))
    if options["granularity"] == "channel":
        options["dim"] = data.draw(st.integers(-x.dim(), x.dim() - 1))
    kind = data.draw(st.sampled_from(["symmetric", "asymmetric", "scaled"]))
    if kind == "scaled":
        options["scale"] = scale_for(x, options)
    check_quantize(F.quantize_int8, x, symmetric=kind != "asymmetric", **options)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (4, 0), (2, 0, 3), (0, 0)], ids=str)
@each_granularity
def test_empty(backend: Backend, granularity: str, shape: tuple[int, ...]) -> None:
    options = GRANULARITIES[granularity]
    x = torch.empty(shape, device=backend.device)
    if options.get("dim") == 1 and x.dim() == 1:
        pytest.skip("there is no second dimension")
    blocks = -(-shape[-1] // options.get("block_size", 1))
    expected = {
        "row": shape[:-1],
        "tensor": (),
        "channel": (shape[options.get("dim", 0)],),
        "block": (*shape[:-1], blocks),
    }[options.get("granularity", "row")]
    values, scale, zero_point = F.quantize_int8(x, symmetric=False, **options)
    assert values.shape == shape and values.dtype == torch.int8
    assert scale.shape == expected and (scale == 1).all() and scale.dtype == torch.float32
    assert zero_point.shape == expected and not zero_point.any()
    assert zero_point.dtype == torch.int32
    on_cpu = values.cpu(), scale.cpu()
    assert_same(F.quantize_int8(x, **options), on_cpu, "symmetric")
    given = torch.full(expected, 0.5)
    results = F.quantize_int8(x, scale=given.to(x.device), **options)
    assert_same(results, (on_cpu[0], given), "a given scale")
    back = F.dequantize_int8(values, scale, zero_point, **options)
    assert back.shape == shape and back.dtype == torch.float32


def test_long_rows(backend: Backend) -> None:
    """Longer than what a block of GPU threads holds at once: 16384 elements, and an odd tail."""
    x = normal(2, 20011).to(backend.device)
    for dtype in backend.exact_dtypes:
        for symmetric in (True, False):
            check_quantize(F.quantize_int8, x.to(dtype), symmetric=symmetric)
    x[0, 20010], x[1, 8192] = -7.0, float("inf")
    check_quantize(F.quantize_int8, x)
    check_quantize(F.quantize_int8, x, symmetric=False)
    check_quantize(F.quantize_int8, x, granularity="block", block_size=19000)
    check_quantize(F.quantize_int8, x, scale=torch.tensor([0.01, 0.02], device=backend.device))


@each_dtype
def test_smooth(backend: Backend, dtype: torch.dtype) -> None:
    """The op multiplies a vector to the rows first, in float32."""
    skip_other_dtypes(backend, dtype)
    smooth = normal(37).abs() + 0.1
    for shape in ((5, 37), (2, 3, 37), (37,)):
        x = normal(*shape).to(dtype).to(backend.device)
        for block_size, symmetric in ((37, True), (37, False), (8, True)):
            op = pyfast.ops.quantize_int8.quantize_int8_op
            values, scale, zero = op(x, None, smooth.to(x.device), block_size, symmetric)
            options = {"granularity": "block", "block_size": block_size, "symmetric": symmetric}
            expected = quantized(torch.from_numpy(as_float32(x)) * smooth, **options)
            assert_same((values, scale, zero)[: len(expected)], expected, f"{dtype} {options}")


@pytest.mark.backends("reference", "cpu", "cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large(backend: Backend, dtype: torch.dtype) -> None:
    """One row for several threads, whose largest value, NaN or Inf may be in any part."""
    n = 2**18 + 7
    x = normal(n).to(dtype).to(backend.device)
    check_quantize(F.quantize_int8, x[:-1].view(2, -1), granularity="tensor")
    for symmetric in (True, False):
        options = {"granularity": "block", "block_size": 1000, "symmetric": symmetric}
        check_quantize(F.quantize_int8, x[1:], "many blocks", **options)
    values = (50.0, -50.0, float("nan"), float("-inf"))
    for i, position in enumerate((n - 1, n // 2, 0, n - 1)):
        y = x.clone()
        y[position] = values[i]
        check_quantize(F.quantize_int8, y, f"[{position}]", symmetric=i % 2 == 0)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_past_the_cache(backend: Backend, dtype: torch.dtype) -> None:
    """Results of large matrices are written past the cache: the same as those of small ones."""
    x = torch.randn(4096, 4096 if dtype == torch.bfloat16 else 2048).to(dtype)
    for options in ({}, {"granularity": "block", "block_size": 192}):
        whole = F.quantize_int8(x, **options)
        parts = [F.quantize_int8(part, **options) for part in x.split(512)]
        for i in range(2):
            assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


@pytest.mark.backends("cpu")
def test_threads_agree(backend: Backend) -> None:
    """Whatever the work is cut into: one row, few rows, many short ones, blocks."""
    cases = [(normal(2**18 + 7), {}), (normal(3, 200003), {}), (normal(50001, 7), {})]
    cases += [(cases[1][0], {"granularity": "block", "block_size": 70})]
    for x, options in cases:
        for symmetric in (True, False):
            results = []
            for num_threads in (1, 2, 3):
                torch.set_num_threads(num_threads)
                results.append(F.quantize_int8(x, symmetric=symmetric, **options))
            assert_same(results[1], results[0], "two threads")
            assert_same(results[2], results[0], "three threads")


@pytest.mark.backends("cpu", "cuda")
def test_writes_only_the_outputs(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in (1, 2, 15, 16, 17, 63, 64, 65, 1000, 2**18 + 1):
        for dtype in DTYPES:
            x = normal(3 if n < 5000 else 1, n).to(dtype).to(backend.device)
            for options in ({}, {"symmetric": False}, {"granularity": "block", "block_size": 48}):
                with guarded_outputs(monkeypatch) as made:
                    results = F.quantize_int8(x, **options)
                assert_only_outputs_written(made, *results)


@each_combination
def test_round_trip(backend: Backend, granularity: str, dtype: torch.dtype) -> None:
    """Half a step at most. The quotient is below 256 and rounded to 24 bits, the product once more:
    2**-15 of a step; and the result is rounded to its dtype."""
    skip_other_dtypes(backend, dtype)
    options = GRANULARITIES[granularity]
    x = normal(3, 5, 37).to(dtype).to(backend.device)
    for symmetric in (True, False):
        result = F.quantize_int8(x, symmetric=symmetric, **options)
        y = F.dequantize_int8(*result, dtype=dtype, **options)
        step = F.dequantize_int8(torch.ones_like(result[0]), result[1], **options).double()
        allowed = step * (0.5 + 2**-15) + torch.finfo(dtype).eps * x.double().abs()
        assert y.dtype == dtype and ((y.double() - x.double()).abs() <= allowed).all()


def signal_to_noise(x: Tensor, y: Tensor) -> float:
    """In decibel."""
    x, y = x.double(), y.double()
    return float(10 * torch.log10(x.square().sum() / (x - y).square().sum()))


def test_signal_to_noise(backend: Backend) -> None:
    """The error of rounding is uniform, step / sqrt(12); the largest of 256 normal values is about
    2.8 of their deviation, the largest of 16384 about 4: 20 log10(127 sqrt(12) / 2.8) = 44 dB."""
    x = normal(64, 256).to(backend.device)
    for granularity, floor in (("row", 43.0), ("tensor", 40.0), ("channel", 43.0)):
        for symmetric in (True, False):
            y = F.fake_quantize(x, granularity=granularity, symmetric=symmetric)
            assert floor < signal_to_noise(x, y) < floor + 4
    assert signal_to_noise(x, F.fake_quantize(x, granularity="block", block_size=16)) > 46


@each_granularity
def test_dequantize(granularity: str) -> None:
    """Every value with every granularity, exactly: a difference of integers, one product."""
    options = GRANULARITIES[granularity]
    values = torch.arange(-128, 128, dtype=torch.int8).repeat(6).view(4, 12, 32)
    shape = quantized(values.float(), **options)[1].shape
    scale = normal(*shape).abs() + 0.001
    zero = torch.randint(-128, 128, shape, dtype=torch.int32)

    def spread(t: Tensor) -> np.ndarray[Any, Any]:
        if granularity in ("tensor", "last channel"):
            return t.numpy()
        if granularity == "first channel":
            return t.numpy()[:, None, None]
        if granularity in ("row", "middle channel"):
            return t.numpy()[..., None]
        return np.repeat(t.numpy(), options["block_size"], axis=-1)[..., :32]

    for zero_point in (None, zero):
        steps = values.numpy().astype(np.int64)
        steps = steps if zero_point is None else steps - spread(zero_point)
        expected = torch.from_numpy(steps.astype(np.float32) * spread(scale))
        for dtype in DTYPES:
            actual = F.dequantize_int8(values, scale, zero_point, dtype=dtype, **options)
            assert_bits_equal(actual, expected.to(dtype), f"{dtype}")
            turned = values.transpose(0, 2).contiguous().transpose(0, 2)
            turned = F.dequantize_int8(turned, scale, zero_point, dtype=dtype, **options)
            assert_bits_equal(turned, actual)


def test_dequantize_shows_nan(backend: Backend) -> None:
    x = normal(3, 8).to(backend.device)
    x[1, 5] = float("nan")
    y = F.dequantize_int8(*F.quantize_int8(x))
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


@each_combination
def test_fake_quantize(backend: Backend, granularity: str, dtype: torch.dtype) -> None:
    """Forward to the bit; the gradient is passed through, but not where x is beyond the scale."""
    skip_other_dtypes(backend, dtype)
    options = GRANULARITIES[granularity]
    x = (normal(2, 4, 37) + 0.2).to(dtype).to(backend.device).requires_grad_()
    grad = normal(37)[torch.arange(37).flip(0)].to(dtype).to(backend.device).expand(x.shape)
    for extra in ({}, {"symmetric": False}, {"scale": scale_for(x.detach(), options)}):
        y = F.fake_quantize(x, **extra, **options)
        expected = quantized(x, **extra, **options)
        expected = F.dequantize_int8(*expected, dtype=dtype, **options)
        assert_bits_equal(y, expected, f"{extra}")
        (x_grad,) = torch.autograd.grad(y, x, grad)
        if "scale" in extra:
            largest = torch.full(x.shape, 127, dtype=torch.int8)
            limit = F.dequantize_int8(largest, extra["scale"].cpu(), **options)
            inside = x.detach().cpu().abs() <= limit
            assert 0 < inside.sum() < x.numel()
            assert_bits_equal(x_grad, torch.where(inside, grad.cpu(), 0.0))
        else:
            assert_bits_equal(x_grad, grad)


def test_fake_quantize_at_the_limit(backend: Backend) -> None:
    """127 steps are inside; a value just beyond is not."""
    limit = torch.tensor(127.0, device=backend.device)
    x = torch.stack([limit, -limit, torch.nextafter(limit, limit * 2), limit * 3]).requires_grad_()
    y = F.fake_quantize(x, scale=limit / 127)
    assert y.tolist() == [127.0, -127.0, 127.0, 127.0]
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_results_have_no_gradient(backend: Backend) -> None:
    x = normal(3, 8).to(backend.device).requires_grad_()
    assert not any(t.requires_grad for t in F.quantize_int8(x))
    assert F.fake_quantize(x).requires_grad


def test_quantizes_weights_once(backend: Backend) -> None:
    """What is an integer already stays as it is, with a scale that is a power of two."""
    values = ints(5, 64).clamp(min=-127)
    values[:, 0] = 127
    x = values.float().to(backend.device) * 2.0**-7
    again, scale = F.quantize_int8(x)
    assert torch.equal(again.cpu(), values) and (scale == 2.0**-7).all()
