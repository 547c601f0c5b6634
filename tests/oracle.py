"""What dropout must compute, and helpers that several test files share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

import pyfast

SIZES = (
    *(0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257),
    *(1000, 1021, 4095, 4096, 4097, 2 * 16384 + 5),
)
SMALL_SIZES = (1, 7, 8, 9, 63, 65, 257, 1021)  # where every element is interpreted
BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


RANKS = {  # of the input that each function is for
    "dropout": 2,
    "alpha_dropout": 2,
    "dropout1d": 3,
    "dropout2d": 4,
    "dropout3d": 5,
    "feature_alpha_dropout": 4,
}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


LAYOUTS = {
    "scalar": lambda: normal(),
    "misaligned": lambda: normal(1002)[1:],
    "step": lambda: normal(700)[::3],
    "transposed": lambda: normal(37, 65).t(),
    "permuted": lambda: normal(5, 6, 7, 8).permute(2, 0, 3, 1),
    "step in two dimensions": lambda: normal(40, 70)[::2, 1::3],
    "rows with gaps": lambda: normal(9, 64)[:, :37],
    "long rows with gaps": lambda: normal(3, 5000)[:, 7:4900],
    "channels last": lambda: normal(2, 5, 6, 7).to(memory_format=torch.channels_last),
    "channels last 3d": lambda: normal(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "sizes of one": lambda: normal(1, 9, 1, 33, 1).transpose(1, 3),
    "expanded rows": lambda: normal(1, 33).expand(9, 33),
    "expanded columns": lambda: normal(17, 1).expand(17, 67),
}


@cache
def keep_mask(shape: tuple[int, ...], p: float, seed: int, stream: int = 1) -> Tensor:
    """``pyfast.dropout_mask``, once for all backends; test_random.py proves it."""
    return pyfast.dropout_mask(shape, p, seed, stream=stream)


def drop_scale(p: float) -> float:
    """One over the true keep rate of ``p``."""
    threshold = round(p * 65536)
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def extreme_values(
    n: int, dtype: torch.dtype, device: torch.device | str = "cpu", subnormals: bool = True
) -> Tensor:
    """n random values, NaN, Inf, both zeros, subnormal and largest ones among them."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    finfo = torch.finfo(dtype)
    smallest = finfo.tiny / 4 if subnormals else finfo.tiny
    infinity = float("inf")
    kinds = (float("nan"), infinity, -infinity, -0.0, 0.0, smallest, finfo.max, finfo.min)
    for i, kind in enumerate(kinds * 5):
        if n > 8:
            x[(7919 * (i + 1)) % n] = kind
    return x.to(device)


def assert_bits_equal(actual: Tensor, expected: Tensor, message: str = "") -> None:
    """Equal to the bit, but that any NaN equals any NaN."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, message
    a, e = (t.detach().cpu().reshape(-1).contiguous() for t in (actual, expected))
    wrong = (a.view(BITS[a.dtype]) != e.view(BITS[e.dtype])) & ~(a.isnan() & e.isnan())
    if wrong.any():
        first = int(wrong.nonzero()[0])
        values = f"{a[first].item()} for {e[first].item()}"
        raise AssertionError(
            f"{message} {int(wrong.sum())} of {wrong.numel()} differ, first [{first}]: {values}"
        )


def assert_dropped(y: Tensor, x: Tensor, mask: Tensor, p: float, message: str = "") -> None:
    """y is x scaled where the mask is True and +0 elsewhere, whatever x holds.

    float32 must equal the float32 product to the bit. The other dtypes are held against float64:
    one rounding of the true product is within half a unit in the last place (ulp); a product in
    float32 that is rounded again to 16 bits stays within one.
    """
    assert y.dtype == x.dtype and y.shape == x.shape, message
    y, x = y.detach().cpu(), x.detach().cpu()
    mask = mask.expand(x.shape)
    if x.dtype == torch.float32:
        expected = torch.where(mask, x * torch.tensor(drop_scale(p)), 0.0)
        return assert_bits_equal(y, expected, message)
    exact = torch.where(mask, x.double() * drop_scale(p), 0.0)
    finfo = torch.finfo(x.dtype)
    exponent = torch.frexp(exact).exponent.double() - 1
    ulp = (finfo.eps * 2**exponent).clamp_min(finfo.tiny * finfo.eps)
    close = (
        (y == exact.to(x.dtype)) | ((y.double() - exact).abs() <= ulp) | (y.isnan() & exact.isnan())
    )
    good = close & (mask | ((y == 0) & ~y.signbit()))
    if not good.all():
        first = tuple((~good).nonzero()[0].tolist())
        text = f"{y[first].item()} for {exact[first].item()} at {first}"
        raise AssertionError(f"{message} {int((~good).sum())} of {good.numel()} wrong: {text}")


@contextmanager
def nan_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def poison_recycled_blocks(like: Tensor) -> None:
    """Leaves NaN in the memory that the next large CPU output of ``like``'s size gets."""
    if like.is_cpu and pyfast._backend.native is not None:
        block = pyfast._backend.native.empty_like(like)
        if block is not None:
            block.fill_(float("nan"))


def check_dropout(
    function: Callable[[Tensor, float, int], Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    sizes: tuple[int, ...] = SIZES,
    subnormals: bool = True,
) -> None:
    """Asserts that ``function(x, p, seed)`` is dropout, on contiguous x of every size."""
    for i, n in enumerate(sizes):
        p, seed = (0.1, 0.3, 0.5, 0.9)[i % 4], 1234567 + (i << 33)
        x = extreme_values(n, dtype, device, subnormals)
        with nan_memory():
            poison_recycled_blocks(x)
            y = function(x.clone(), p, seed)
        assert_dropped(y, x, keep_mask((n,), p, seed), p, f"n={n} p={p} {dtype}:")


def run_python(
    code: str, timeout_s: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own; where it hangs, it and its children are killed."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYFAST_")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, **environment},
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
