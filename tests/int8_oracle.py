"""What int8 quantization must compute, in numpy, and the checks that hold functions against it.

float32 arithmetic and ``np.rint`` for values and scales, int64 for sums: none of it is shared with
the package. The checks take the function that is checked, so that test_int8_mutants.py can show
what they reject.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from oracle import BITS, assert_bits_equal, nan_memory, normal
from torch import Tensor

import pyfast

Function = Callable[..., Any]
Array = np.ndarray[Any, Any]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def ints(*shape: int, seed: int = 1) -> Tensor:
    """int8 of the whole range."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def as_float32(x: Tensor) -> Array:
    """Rounded to float32 where it is float64; what is beyond becomes Inf."""
    x = x.detach().cpu()
    with np.errstate(over="ignore"):
        return (x if x.dtype == torch.float64 else x.float()).numpy().astype(np.float32)


def quantize(
    x: Array, block: int, symmetric: bool = True, scale: Array | None = None
) -> tuple[Array, Array, Array]:
    """(values, scale, zero point) of the rows of x, in blocks of columns."""
    blocks: list[tuple[Array, Array, Array]] = []
    for begin in range(0, x.shape[1], block):
        part = x[:, begin : begin + block]
        good = np.isfinite(part).all(axis=1)
        part = np.where(good[:, None], part, np.float32(0))
        high = np.maximum(part.max(axis=1), np.float32(0))
        low = np.minimum(part.min(axis=1), np.float32(0))
        if scale is not None:
            step = scale[:, len(blocks)]
        elif symmetric:
            step = np.maximum(high, -low) / np.float32(127)
        else:
            step = (high / np.float32(2) - low / np.float32(2)) / np.float32(127.5)
        step = np.where(step == 0, np.float32(1), step)
        zero = np.zeros_like(step)
        if not symmetric:
            zero = np.clip(np.float32(-128) - np.rint(low / step), -128, 127) * good
        with np.errstate(over="ignore"):
            steps = np.rint(part / step[:, None]) + zero[:, None]  # 0 where not good
        values = np.clip(steps, -127 if symmetric else -128, 127)
        blocks.append((values, np.where(good, step, np.float32(np.nan)), zero))
    values, steps, zeros = zip(*blocks, strict=True)
    return (
        np.concatenate(values, axis=1).astype(np.int8),
        np.stack(steps, axis=1).astype(np.float32),
        np.stack(zeros, axis=1).astype(np.int32),
    )


def quantized(
    x: Tensor,
    granularity: str = "row",
    dim: int = 0,
    block_size: int | None = None,
    symmetric: bool = True,
    scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """What quantize_int8 must return for an x that is not empty, on the CPU."""
    value = as_float32(x)
    shape: tuple[int, ...] = value.shape[:-1]
    if granularity == "tensor":
        rows, shape = value.reshape(1, -1), ()
    elif granularity == "channel":
        moved = np.moveaxis(value, dim, 0)
        rows, shape = moved.reshape(len(moved), -1), (len(moved),)
    else:
        rows = value.reshape(-1, value.shape[-1])
    block = rows.shape[1]
    if granularity == "block":
        assert block_size is not None
        block, shape = block_size, (*shape, -(-block // block_size))
    given = None
    if scale is not None:
        one = scale.numel() == 1
        given = np.full(shape, scale.item(), np.float32) if one else scale.cpu().numpy()
        assert given.shape == shape
        given = given.reshape(len(rows), -1)
    values, new_scale, zero = quantize(rows, block, symmetric, given)
    if granularity == "channel":
        values = np.moveaxis(values.reshape(moved.shape), 0, dim)
    results = (values.reshape(value.shape), new_scale.reshape(shape), zero.reshape(shape))
    return tuple(torch.from_numpy(np.array(r)) for r in results[: 2 if symmetric else 3])


def assert_same(actual: Any, expected: Any, message: str) -> None:
    """Tensors equal to the bit, any NaN equal to any NaN, and of contiguous memory."""
    assert len(actual) == len(expected), f"{message}: {len(actual)} results"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype and a.shape == e.shape, (
            f"{message}, result {i}: {a.dtype} {tuple(a.shape)}, not {e.dtype} {tuple(e.shape)}"
        )
        assert a.is_contiguous(), f"{message}, result {i} has strides {a.stride()}"
        if a.dtype in BITS:
            assert_bits_equal(a, e, f"{message}, result {i}:")
        else:
            wrong = a.cpu() != e
            if wrong.any():
                first = tuple(wrong.nonzero()[0].tolist())
                text = f"{a[first].item()} for {e[first].item()} at {first}"
                raise AssertionError(f"{message}, result {i}: {int(wrong.sum())} differ, {text}")


def check_quantize(function: Function, x: Tensor, message: str = "", **options: Any) -> None:
    """Asserts that ``function(x, **options)`` is ``quantized(x, **options)``."""
    before = x.detach().clone()
    with nan_memory():
        actual = function(x, **options)
    assert_same(actual, quantized(x, **options), f"{message} {tuple(x.shape)} {x.dtype} {options}")
    assert_bits_equal(x, before, "x was written:")


GRANULARITIES: dict[str, dict[str, Any]] = {
    "row": {},
    "tensor": {"granularity": "tensor"},
    "first channel": {"granularity": "channel"},
    "last channel": {"granularity": "channel", "dim": -1},
    "middle channel": {"granularity": "channel", "dim": 1},
    "block of 1": {"granularity": "block", "block_size": 1},
    "block of 16": {"granularity": "block", "block_size": 16},
    "block of 19": {"granularity": "block", "block_size": 19},
    "block of 1000": {"granularity": "block", "block_size": 1000},
}


def halves() -> Tensor:
    """Rows with values exactly between two steps, and values that are nearly there."""
    steps = torch.arange(-126.5, 127)
    exact = torch.cat([torch.full((1,), 127.0), steps]) * 2.0 ** torch.arange(-9.0, 9)[:, None]
    absmax = normal(60, 1).abs() + 0.1
    near = torch.cat([absmax, steps * (absmax / 127)], 1)
    return torch.cat([exact, near])


def one_a_row(n: int, *special: float) -> Tensor:
    """(n, n): row i has a value of its own at column i, beyond the others or not finite."""
    x = normal(n, n) * 0.1
    x.diagonal().copy_(torch.tensor(special).repeat(-(-n // len(special)))[:n])
    return x


def extremes(dtype: torch.dtype) -> Tensor:
    """Rows of zeros, of the largest and the smallest values, and of values beyond float32."""
    finfo = torch.finfo(dtype)
    smallest = finfo.tiny * finfo.eps
    rows = [
        (0.0, 0.0, -0.0),
        (finfo.max, finfo.min, 1.0),
        (finfo.max, finfo.max, 0.0),
        (finfo.min, -finfo.max / 3, finfo.tiny),
        (smallest, 0.0, -smallest),
        (smallest * 100, smallest * 3, -smallest * 41),
        (finfo.tiny, finfo.tiny / 2, -finfo.tiny / 4),
        (1.0, finfo.tiny, smallest),
    ]
    x = torch.tensor(rows, dtype=torch.float64)
    return x.repeat(1, 11)[:, :31].to(dtype)


def check_hard_rows(function: Function, device: Any, dtype: torch.dtype, n: int = 67) -> None:
    """What a wrong rounding, division, reduction or mask would show on."""
    nan, inf = float("nan"), float("inf")
    for x in (halves(), one_a_row(n, 9.0, -9.0), one_a_row(n, nan, inf, 1.0, -inf)):
        x = x.to(dtype).to(device)
        check_quantize(function, x, "hard rows")
        check_quantize(function, x, "hard rows", symmetric=False)
        check_quantize(function, x, "hard rows", granularity="block", block_size=24)
        for scale in (torch.tensor(0.01), torch.rand(len(x)) + 0.01):
            check_quantize(function, x, "hard rows", scale=scale.to(device))


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What int8_linear must return without activation when x is quantized, on the CPU."""
    k = x.shape[-1]
    if x.dtype == torch.int8:
        assert input_scale is not None
        values, scale = x.cpu().numpy().reshape(-1, k), input_scale.cpu().numpy().reshape(-1, 1)
        dtype = dtype or (torch.float32 if bias is None else bias.dtype)
    else:
        rows = as_float32(x).reshape(-1, k)
        if smooth is not None:
            rows = rows * as_float32(smooth)
        given = None
        if input_scale is not None:
            given = np.full((len(rows), 1), input_scale.item(), np.float32)
        values, scale, _ = quantize(rows, k, True, given)
    sums = values.astype(np.int64) @ weight.cpu().numpy().astype(np.int64).T
    with np.errstate(over="ignore", invalid="ignore"):
        y = sums.astype(np.float32) * scale * as_float32(weight_scale)
        if bias is not None:
            y = y + as_float32(bias)
    assert y.dtype == np.float32
    shape = (*x.shape[:-1], len(weight))
    return torch.from_numpy(y.reshape(shape)).to(dtype or x.dtype)


def exact_activation(y: Tensor, activation: str) -> Tensor:
    """In float64."""
    y = y.double()
    if activation == "gelu":
        return y * torch.special.ndtr(y)
    if activation == "gelu_tanh":
        cubic = (2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)
        return y * torch.sigmoid(2 * cubic)
    return y * torch.sigmoid(y) if activation == "silu" else y


def check_linear_activation(function: Function, inputs: list[Tensor], activation: str) -> None:
    """Asserts that a result is the activation of the float32 one, rounded once.

    relu and none are exact. The others are y times a number up to about 1 that is itself a sum with
    one: 4 ulps of float32 of y, and half an ulp of the result.
    """
    dtype = inputs[0].dtype
    with nan_memory():
        actual = function(*inputs, activation=activation)
    y = linear(*inputs, dtype=torch.float32)
    if activation in ("none", "relu"):
        expected = y if activation == "none" else torch.where(y > 0, y, 0.0)
        return assert_same([actual], [expected.to(dtype)], f"{activation} {dtype}")
    exact = exact_activation(y, activation)
    finfo = torch.finfo(dtype)
    allowed = 4 * 2**-23 * y.abs() + finfo.eps / 2 * 1.01 * exact.abs() + finfo.tiny * finfo.eps
    error = (actual.cpu().double() - exact).abs()
    assert actual.dtype == dtype and (error <= allowed).all(), (
        f"{activation} {dtype}: {float(error.max()):.3g} off"
    )


# Around the edges of tiles of 4, 8, 16, 32 and 64, few rows and many.
LINEAR_SHAPES = (
    *((1, 1, 1), (1, 64, 48), (1, 257, 130), (2, 3, 17), (3, 63, 16), (4, 130, 33), (5, 65, 31)),
    *((6, 31, 47), (7, 128, 64), (8, 100, 65), (9, 127, 15), (12, 4, 96), (16, 16, 16)),
    *((17, 33, 63), (31, 5, 32), (33, 129, 80), (48, 34, 49), (65, 70, 97), (100, 66, 18)),
)
SLOW_LINEAR_SHAPES = ((1, 1, 1), (5, 257, 31), (17, 33, 70), (65, 70, 18))


def operands(m: int, k: int, n: int, dtype: torch.dtype, device: Any = "cpu") -> list[Tensor]:
    """x with rows of different sizes, weight, its scale, bias."""
    x = normal(m, k) * 4.0 ** (torch.arange(m) % 5 - 2)[:, None]
    scale = normal(n, 1)[:, 0].abs() * 0.01 + 1e-3
    weight = ints(n, k, seed=2).clamp(min=-127)
    tensors = [x.to(dtype), weight, scale, normal(n + 1)[1:].to(dtype)]
    return [t.to(device) for t in tensors]


def check_linear(
    function: Function,
    dtype: torch.dtype,
    device: Any = "cpu",
    shapes: tuple[tuple[int, int, int], ...] = LINEAR_SHAPES,
) -> None:
    """Asserts that ``function(x, weight, weight_scale, bias, **options)`` is ``linear``."""
    for i, (m, k, n) in enumerate(shapes):
        x, weight, scale, bias = operands(m, k, n, dtype, device)
        smooth = normal(k).abs().to(device) + 0.1
        cases: list[tuple[Tensor | None, dict[str, Any]]] = [
            (None, {}),
            (bias, {}),
            (bias.to(FLOATS[i % 3]), {"dtype": FLOATS[(i + 1) % 3]}),
            (bias, {"smooth": smooth}),
            (bias, {"input_scale": torch.tensor(0.011, device=device)}),
        ]
        for given, options in cases:
            with nan_memory():
                actual = function(x, weight, scale, given, **options)
            expected = linear(x, weight, scale, given, **options)
            assert_same([actual], [expected], f"{(m, k, n)} {dtype} {options}")
        options = {"input_scale": torch.rand(m, device=device) * 0.1, "dtype": dtype}
        values = ints(m, k, seed=3).to(device)
        with nan_memory():
            actual = function(values, weight, scale, bias, **options)
        expected = linear(values, weight, scale, bias, **options)
        assert_same([actual], [expected], f"{(m, k, n)} int8 to {dtype}")


def check_large_sums(function: Function, device: Any = "cpu") -> None:
    """Sums beyond the integers that float32 holds, and a row with NaN among others."""
    x, weight, scale, bias = operands(3, 6100, 17, torch.float32, device)
    x, weight = x.abs() + 1, weight.abs()
    x[1, 6099] = float("nan")
    actual = function(x, weight, scale, bias)
    assert_same([actual], [linear(x, weight, scale, bias)], "large sums and NaN")


MATRICES: dict[str, Callable[[int, int], Tensor]] = {
    "contiguous": lambda r, c: ints(r, c),
    "transposed": lambda r, c: ints(c, r).t(),
    "misaligned": lambda r, c: ints(r * c + 1)[1:].view(r, c),
    "misaligned, transposed": lambda r, c: ints(r * c + 3)[3:].view(c, r).t(),
    "rows with gaps": lambda r, c: ints(r, c + 5)[:, 3 : 3 + c],
    "steps": lambda r, c: ints(2 * r, 3 * c)[::2, 1::3],
    "expanded rows": lambda r, c: ints(1, c).expand(r, c),
    "expanded columns": lambda r, c: ints(r, 1).expand(r, c),
    "all -128": lambda r, c: torch.full((r, c), -128, dtype=torch.int8),
    "all 127": lambda r, c: torch.full((r, c), 127, dtype=torch.int8),
}
EXTREMES = ("all -128", "all 127")


def check_mm(function: Function, a: Tensor, b: Tensor, device: Any = "cpu") -> None:
    """Asserts that ``function(a, b)`` is the product, modulo 2**32."""
    expected = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64)
    with nan_memory():
        actual = function(a.to(device), b.to(device))
    message = f"{tuple(a.shape)} {a.stride()} times {tuple(b.shape)} {b.stride()}"
    assert_same([actual], [torch.from_numpy(expected.astype(np.int32))], message)


def check_products(function: Function, device: Any = "cpu", is_slow: bool = False) -> None:
    """Sizes around multiples of 16, 32 and 64, every layout of both, extremes of many columns."""
    sizes = (1, 2, 15, 16, 17, 31, 33, 63, 65, 130)
    sizes = (1, 17, 33) if is_slow else sizes
    for m, k in product(sizes, sizes):
        n = sizes[(m + k) % len(sizes)]
        check_mm(function, ints(m, k), ints(k, n, seed=2), device)
    names = list(MATRICES)
    for i, (left, right) in enumerate(product(names, names)):
        if not is_slow or i % 9 == 0:
            check_mm(function, MATRICES[left](9, 37), MATRICES[right](37, 21), device)
    for left, right in product(EXTREMES, EXTREMES):
        for k in (70, 300) if is_slow else (257, 1031, 4099):
            check_mm(function, MATRICES[left](3, k), MATRICES[right](k, 18), device)


@contextmanager
def guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Outputs that the ops allocate lie in larger buffers of bytes of 85: (output, buffer)."""
    made: list[tuple[Tensor, Tensor]] = []
    empty = torch.empty

    def guarded(shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        y = empty(shape, dtype=dtype, device=device)
        edge = 128
        size = y.numel() * y.element_size()
        buffer = empty(size + 2 * edge, dtype=torch.uint8, device=device).fill_(85)
        inner = buffer[edge : edge + size].view(dtype).view(y.shape)
        made.append((inner, buffer))
        return inner

    def torch_empty(*shape: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return guarded(sizes, dtype or torch.float32, device)

    def ops_empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
        return guarded(shape, like.dtype, like.device)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", torch_empty)
        for module in (pyfast.ops.int8_linear, pyfast.ops.linear, pyfast.ops.quantize_int8):
            patch.setattr(module, "empty", ops_empty, raising=False)
        yield made


def assert_only_outputs_written(made: list[tuple[Tensor, Tensor]], *outputs: Tensor) -> None:
    """Every output is one of those that were guarded, and the bytes around them are as set."""
    addresses = {inner.data_ptr() for inner, _ in made}
    for y in outputs:
        assert y.data_ptr() in addresses, "an output was allocated in another way"
    for inner, buffer in made:
        size = inner.numel() * inner.element_size()
        edges = torch.cat([buffer[:128], buffer[128 + size :]])
        assert (edges == 85).all(), f"bytes around {tuple(inner.shape)} {inner.dtype} were written"
