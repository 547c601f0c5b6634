"""What the int8 functions refuse: ValueError with function, argument, expectation and what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import CPU_LEVELS
from int8_oracle import ints
from oracle import normal, run_python
from torch import Tensor

import pyfast

F = pyfast.nn.functional
X, VALUES, ROWS, BIAS = normal(4, 6), ints(4, 6), torch.ones(4), torch.ones(5)
WEIGHT, SCALE, ONE = ints(5, 6, seed=2), torch.ones(5), torch.tensor(0.1)
NAN, INF = float("nan"), float("inf")
Options = dict[str, Any]

# Arguments other than those of a right call, and what the message says.
LAYOUT: dict[str, tuple[Options, str]] = {
    "granularity": ({"granularity": "column"}, "granularity must be .*block, got 'column'"),
    "no granularity": ({"granularity": None}, "granularity must be .*block, got None"),
    "dim too large": ({"granularity": "channel", "dim": 2}, r"dim must be .*\[-2, 1\], got 2"),
    "dim too small": ({"granularity": "channel", "dim": -3}, r"dim must be .*\[-2, 1\], got -3"),
    "dim of rows": ({"dim": 5}, r"dim must be .*\[-2, 1\], got 5"),
    "no block size": ({"granularity": "block"}, "block_size goes with .*'block'.*, got None"),
    "block size of rows": ({"block_size": 4}, "block_size goes with .*'block'.*, got 4"),
    "block size 0": ({"granularity": "block", "block_size": 0}, "block_size must be.* 1, got 0"),
    "block size -1": ({"granularity": "block", "block_size": -1}, "block_size must be.* got -1"),
}
QUANTIZE: dict[str, tuple[Options, str]] = {
    **LAYOUT,
    "integers": ({"x": X.long()}, r"x must be .*floating.*, got \(4, 6\) torch.int64"),
    "complex": ({"x": X.cfloat()}, r"x must be .*floating.*, got \(4, 6\) torch.complex64"),
    "no dimension": ({"x": ONE}, r"x must be .*one dimension, got \(\) torch.float32"),
    "scale's dtype": (
        {"scale": ROWS.double()},
        r"scale must be \(4,\) float32 .*got .*float64",
    ),
    "scale's shape": ({"scale": torch.ones(6)}, r"scale must be \(4,\) float32 .*got \(6,\)"),
    "scale's rank": (
        {"scale": ROWS[:, None]},
        r"scale must be \(4,\) float32 .*got \(4, 1\)",
    ),
    "scale's device": ({"scale": ROWS.to("meta")}, "scale must be .* on cpu, got .*meta"),
    "scale of channels": (
        {"granularity": "channel", "dim": 1, "scale": ROWS},
        r"scale must be \(6,\) float32 .*got \(4,\)",
    ),
    "scale of blocks": (
        {"granularity": "block", "block_size": 4, "scale": torch.ones(4, 1)},
        r"scale must be \(4, 2\) float32 .*got \(4, 1\)",
    ),
    "asymmetric scale": ({"scale": ONE, "symmetric": False}, "scale goes with symmetric=True"),
    **{
        f"scale of {wrong}": ({"scale": torch.tensor([1.0, wrong, 1.0, 1.0])}, f".*got {wrong}$")
        for wrong in (0.0, -0.0, -1.0, NAN, INF)
    },
}
DEQUANTIZE: dict[str, tuple[Options, str]] = {
    **LAYOUT,
    "floats": ({"values": X}, r"values must be int8.*, got \(4, 6\) torch.float32"),
    "uint8": ({"values": VALUES.byte()}, "values must be int8.*, got .*uint8"),
    "no dimension": ({"values": VALUES[0, 0]}, r"values must be .*one dimension, got \(\)"),
    "result": ({"dtype": torch.int32}, "dtype must be floating point, got torch.int32"),
    "scale's dtype": (
        {"scale": ROWS.half()},
        r"scale must be \(4,\) float32 .*got .*float16",
    ),
    "scale's shape": ({"scale": torch.ones(3)}, r"scale must be \(4,\) float32 .*got \(3,\)"),
    "scale's device": ({"scale": ROWS.to("meta")}, "scale must be .* on cpu, got .*meta"),
    "zero point's dtype": (
        {"zero_point": ROWS.long()},
        r"zero_point must be \(4,\) int32 .*got \(4,\) torch.int64",
    ),
    "zero point's shape": (
        {"zero_point": ROWS[:3].int()},
        r"zero_point must be \(4,\) int32 .*got \(3,\)",
    ),
    "zero point's device": (
        {"zero_point": ROWS.int().to("meta")},
        "zero_point must be .* on cpu, got .*meta",
    ),
}
PRODUCT: dict[str, tuple[Options, str]] = {
    "a's dtype": ({"a": X}, r"a and b must be int8 matrices, got \(4, 6\) torch.float32 and"),
    "b's dtype": ({"b": WEIGHT.byte().t()}, r"must be int8 matrices, got .* \(6, 5\) torch.uint8"),
    "a's rank": ({"a": VALUES[None]}, r"must be int8 matrices, got \(1, 4, 6\)"),
    "b's rank": ({"b": WEIGHT[0]}, r"must be int8 matrices, got .* and \(6,\)"),
    "shape": ({"b": WEIGHT}, r"b must be \(6, N\).*, got \(5, 6\)"),
    "device": ({"b": WEIGHT.t().to("meta")}, "b must be .* on cpu, got .* on meta"),
}
LINEAR: dict[str, tuple[Options, str]] = {
    "x's dtype": ({"x": X.long()}, r"x must be .*floating point or int8.*, got .*int64"),
    "x's shape": ({"x": X[:, :5]}, r"x must be \(..., 6\).*, got \(4, 5\)"),
    "x's rank": ({"x": ONE}, r"x must be \(..., 6\).*, got \(\)"),
    "weight's dtype": ({"weight": WEIGHT.float()}, "weight must be .*int8.*, got .*float32"),
    "weight's rank": ({"weight": WEIGHT[0]}, r"weight must be \(out.*, in.*\) int8.*, got \(6,\)"),
    "weight's device": ({"weight": WEIGHT.to("meta")}, "weight must be .*cpu, got .*meta"),
    "weight_scale's dtype": (
        {"weight_scale": SCALE.half()},
        r"weight_scale must be \(5,\) float32.*, got \(5,\) torch.float16",
    ),
    "weight_scale's shape": (
        {"weight_scale": SCALE[:, None]},
        r"weight_scale must be \(5,\) float32.*, got \(5, 1\)",
    ),
    "weight_scale's device": ({"weight_scale": SCALE.to("meta")}, "weight_scale must .*got .*meta"),
    "bias's dtype": ({"bias": BIAS.int()}, r"bias must be \(5,\) floating point.*, got .*int32"),
    "bias's shape": ({"bias": BIAS[:4]}, r"bias must be \(5,\).*, got \(4,\)"),
    "bias's device": ({"bias": BIAS.to("meta")}, "bias must be .*cpu, got .*meta"),
    "smooth's dtype": ({"smooth": X[0].half()}, r"smooth must be \(6,\) float32.*, got .*float16"),
    "smooth's shape": ({"smooth": BIAS}, r"smooth must be \(6,\) float32.*, got \(5,\)"),
    "smooth's device": ({"smooth": X[0].to("meta")}, "smooth must be .*cpu, got .*meta"),
    "input_scale's dtype": ({"input_scale": ONE.half()}, r"input_scale must be \(\).*float16"),
    "input_scale's shape": ({"input_scale": ROWS}, r"input_scale must be \(\).*, got \(4,\)"),
    "input_scale's device": ({"input_scale": ONE.to("meta")}, "input_scale must .*got .*meta"),
    "scale of int8 rows": (
        {"x": VALUES, "input_scale": torch.ones(3)},
        r"input_scale must be \(4,\) float32.*, got \(3,\)",
    ),
    "int8 without scale": ({"x": VALUES}, "input_scale must be given with int8 x, got None"),
    "int8, weight-only": (
        {"x": VALUES, "input_scale": ROWS, "weight_only": True},
        "x must be floating point with weight_only or smooth, got int8",
    ),
    "int8, smooth": (
        {"x": VALUES, "input_scale": ROWS, "smooth": X[0]},
        "x must be floating point with weight_only or smooth, got int8",
    ),
    "scale, weight-only": (
        {"input_scale": ONE, "weight_only": True},
        "input_scale must be None with weight_only, got a tensor",
    ),
    "activation": ({"activation": "tanh"}, "activation must be one of none, .*, got 'tanh'"),
    "no activation": ({"activation": None}, "activation must be one of none, .*, got None"),
    "result": ({"dtype": torch.int32}, "dtype must be floating point, got torch.int32"),
}
RIGHT: dict[str, Options] = {
    "quantize_int8": {"x": X},
    "fake_quantize": {"x": X},
    "dequantize_int8": {"values": VALUES, "scale": ROWS},
    "int8_mm": {"a": VALUES, "b": WEIGHT.t()},
    "int8_linear": {"x": X, "weight": WEIGHT, "weight_scale": SCALE, "bias": BIAS},
}
WRONG = {
    "quantize_int8": QUANTIZE,
    "fake_quantize": QUANTIZE,
    "dequantize_int8": DEQUANTIZE,
    "int8_mm": PRODUCT,
    "int8_linear": LINEAR,
}


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in WRONG.items() for case in cases]
)
def test_rejects(name: str, case: str) -> None:
    changed, text = WRONG[name][case]
    arguments = {**RIGHT[name], **changed}
    tensors = [t for t in arguments.values() if isinstance(t, Tensor) and not t.is_meta]
    before = [t.clone() for t in tensors]
    with pyfast.use_backend("reference"):
        with pytest.raises(ValueError) as caught:
            call(name, arguments)
        call(name, RIGHT[name])
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and re.search(text, message), message
    torch.testing.assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)


def call(name: str, arguments: Options) -> Any:
    """The tensors without a default are given by position."""
    positional = [arguments[key] for key in RIGHT[name]]
    options = {key: value for key, value in arguments.items() if key not in RIGHT[name]}
    return getattr(F, name)(*positional, **options)


def test_every_argument_is_refused_in_some_way() -> None:
    """The tables leave none out."""
    import inspect

    not_checked = {"symmetric", "weight_only"}  # any value is true or false
    for name, cases in WRONG.items():
        parameters = set(inspect.signature(getattr(F, name)).parameters)
        changed = {key for options, _ in cases.values() for key in options}
        assert parameters - changed <= not_checked, name


@pytest.mark.skipif(pyfast._backend.native is None, reason=pyfast._backend.native_error or "-")
def test_reads_only_the_operands() -> None:
    """Every operand ends where the next page is forbidden: a load past its end is a fault."""
    code = f"""
import ctypes, mmap, torch, pyfast
from pyfast.nn.functional import int8_linear, int8_mm, quantize_int8
native = pyfast._backend.native

def at_the_end(t):
    size = t.numel() * t.element_size()
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, length + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + length), mmap.PAGESIZE, 0)
    whole = torch.frombuffer(pages, dtype=torch.uint8, count=length)
    return whole[length - size :].view(t.dtype).view(t.shape).copy_(t)

levels, info = {CPU_LEVELS!r}, native.build_info()
levels = levels[: levels.index(info["isa_detected"]) + 1]
levels = [level for level in levels if level in info["isa_compiled"]]
sizes = (1, 1, 1), (1, 67, 33), (2, 16, 17), (5, 63, 31), (9, 100, 65), (17, 33, 15), (33, 130, 50)
for m, k, n in sizes:
    weight, b = (at_the_end(torch.ones(s, dtype=torch.int8)) for s in ((n, k), (k, n)))
    scale, bias, smooth = (at_the_end(torch.ones(s)) for s in (n, n, k))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = at_the_end(torch.ones(m, k).to(dtype))
        for level in levels:
            native.set_selected_isa(level)
            with pyfast.use_backend("cpu"):
                for symmetric in (True, False):
                    quantize_int8(x, symmetric=symmetric)
                    quantize_int8(x, granularity="block", block_size=24, symmetric=symmetric)
                values = at_the_end(quantize_int8(x)[0])
                int8_mm(values, weight.t())
                int8_mm(values, b)
                if dtype != torch.float64:
                    for weight_only in (True, False):
                        int8_linear(x, weight, scale, bias.to(dtype), weight_only=weight_only)
                        int8_linear(x, weight, scale, smooth=smooth, weight_only=weight_only)
print("done")
"""
    result = run_python(code)
    assert result.stdout.strip() == "done", result.stderr
