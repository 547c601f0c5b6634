"""Attention at its edges: threads, memory, what is written, extreme and infinite values, seeds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import (
    DTYPES,
    SEED,
    Case,
    F,
    Inputs,
    assert_accurate,
    call,
    check,
    dense,
    expected,
    make,
    results_of,
)
from conftest import Backend
from oracle import assert_bits_equal, nan_memory, normal, poison_recycled_blocks, run_python
from torch import Tensor

import pyfast.ops.attention as attention_module

pytestmark = pytest.mark.backends("reference", "cpu", "triton")
torch_attention = torch.nn.functional.scaled_dot_product_attention
INFINITY = float("inf")

DETERMINISTIC = (
    Case((2,), 4, 200, 190, 40, key_heads=2, mask="float32 ls", sinks=True, p=0.1),
    Case((1,), 1, 300, 300, 64, 16, causal=True, mask="float32 bhls"),
    Case((3,), 2, 1, 1500, 33, 80, p=0.3, mask="float32 bs"),
    Case((1,), 6, 150, 90, 16, key_heads=1, window=(20, 5), alibi="h", mask="same h"),
)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_deterministic(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """The same bits with one thread and with two, and in every call."""
    inputs, grads = make(case, dtype)
    every = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        every.append(results_of(call, case, inputs, grads, with_slopes=False))
    assert_accurate(every[0], expected(case, dtype), str(case))
    for other in every[1:]:
        for name, value in every[0].items():
            assert_bits_equal(other[name], value, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writes_all_of_large_outputs(backend: Backend, dtype: torch.dtype) -> None:
    """Those come from recycled memory, which holds NaN here."""
    q = normal(1, 4, 1100, 64).to(dtype)
    k, v = normal(2, 1, 4, 5, 64).to(dtype)
    exact = torch_attention(*(t.double() for t in (q, k, v)))
    q, k, v = (t.to(backend.device) for t in (q.clone(), k, v))
    q.requires_grad_()
    for _ in range(2):
        q.grad = None
        poison_recycled_blocks(q)
        out = F.scaled_dot_product_attention(q, k, v)
        poison_recycled_blocks(q)
        out.backward(torch.ones_like(out))
        assert q.grad is not None and q.grad.isfinite().all()
        assert (out.cpu() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case((2,), 2, 17, 33, 20, 12, mask="float32 bhls", sinks=True),
        Case((1,), 4, 65, 70, 64, key_heads=2, p=0.1, causal=True),
        Case((1,), 1, 1, 300, 7, 3, mask="same ls"),
    ],
    ids=str,
)
def test_keeps_to_its_outputs(
    backend: Backend, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guard zones around every output and scratch tensor, which start as NaN; inputs stay."""
    new_tensor = torch.full
    buffers: list[Tensor] = []

    def guarded(shape: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        number = torch.Size([shape] if isinstance(shape, int) else shape).numel()
        buffer = new_tensor((number + 128,), 12345.0, dtype=dtype or torch.float32)
        inside = buffer[64 : 64 + number]
        if inside.is_floating_point():
            inside.fill_(float("nan"))
        buffers.append(buffer)
        return inside.view(shape)

    inputs, grads = make(case, dtype)
    before = inputs.map(Tensor.clone)
    with monkeypatch.context() as patch:
        like = lambda t, **k: guarded(t.shape, dtype=t.dtype)  # noqa: E731
        patch.setattr(attention_module, "empty", lambda s, like: guarded(s, dtype=like.dtype))
        patch.setattr(torch, "empty", guarded)
        patch.setattr(torch, "empty_like", like)
        actual = results_of(call, case, inputs, grads)
    assert_accurate(actual, expected(case, dtype), str(case))
    assert len(buffers) >= 6
    for buffer in buffers:
        assert (buffer[:64] == 12345).all() and (buffer[-64:] == 12345).all()
    for a, b in zip(inputs, before, strict=True):
        if a is not None and a.is_floating_point():
            assert_bits_equal(a, b)


AT_THE_END_OF_MEMORY = """
import ctypes, mmap, torch
import pyfast.nn.functional as F

def operand(*shape, dtype):
    size = torch.Size(shape).numel() * dtype.itemsize
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length + mmap.PAGESIZE)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + length
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), mmap.PAGESIZE, 0) == 0
    number = size // dtype.itemsize
    values = torch.frombuffer(memory, dtype=dtype, count=number, offset=length - size)
    return values.view(shape).normal_()

for dtype in (torch.bfloat16, torch.float32):
    for size in (16, 33, 64, 72):
        for queries, keys in ((1, 300), (2, 70), (33, 17), (70, 45)):
            shapes = (2, queries, size), (2, keys, size), (2, keys, size)
            q, k, v = (operand(1, *shape, dtype=dtype).requires_grad_() for shape in shapes)
            out = F.scaled_dot_product_attention(q, k, v)
            out.backward(operand(*out.shape, dtype=dtype))
            assert all(bool(t.grad.isfinite().all()) for t in (q, k, v))
"""


@pytest.mark.backends("cpu")
def test_reads_nothing_behind_its_operands(backend: Backend) -> None:
    """The page that follows each of them must not be touched; tiles read rows by the dozen."""
    done = run_python(AT_THE_END_OF_MEMORY, PYFAST_CPU_ISA=str(backend.level))
    assert done.returncode == 0, done.stderr


def test_the_page_behind_is_forbidden() -> None:
    operand = AT_THE_END_OF_MEMORY.partition("for dtype")[0]
    read = "x = operand(8, dtype=torch.float32); ctypes.string_at(x.data_ptr(), x.nbytes + {})"
    assert run_python(operand + read.format(0)).returncode == 0
    assert run_python(operand + read.format(1)).returncode < 0


def close_to_dense(case: Case, inputs: Inputs, dtype: torch.dtype, relative: float) -> None:
    """No error above this part of the largest element."""
    grad = normal(*case.score_shape[:-1], inputs.v.shape[-1])
    grads = grad, grad[..., 0].contiguous()
    inputs = inputs.map(lambda t: t.to(dtype))
    with nan_memory():
        actual = results_of(call, case, inputs, grads)
    exact = results_of(dense, case, inputs.map(Tensor.double), grads)
    for name, value in actual.items():
        error, size = (value - exact[name]).abs().max(), exact[name].abs().max()
        assert error <= relative * size + 1e-6, f"{case}, {name}: {error:.3g} of {size:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(backend: Backend, dtype: torch.dtype) -> None:
    """Scores of tens of thousands, of integers, so that they are exact; all equal; one huge.

    The error of a weight that is computed as exp(score - lse) is the rounding of lse.
    """
    eps, case = torch.finfo(dtype).eps + 2.0**-23, Case((1,), num_queries=21, num_keys=21)
    q, k = normal(2, 1, 2, 21, 16).round()
    v = normal(1, 2, 21, 16)
    for scale in (1.0, 1024.0, -4096.0):
        relative = 4 * eps + 19 * abs(scale) * 2.0**-23
        close_to_dense(replace(case, scale=scale), Inputs(q, k, v), dtype, relative)
    close_to_dense(case, Inputs(q * 0, k, v), dtype, 4 * eps)
    huge = q * 0
    huge[:, :, :, 0], k[:, :, :, 0], k[:, :, 7, 0] = 128, 0, 128
    close_to_dense(case, Inputs(huge, k, v), dtype, 16 * eps)
    # Products of 60000 and more overflow float16, but not the sums that they are in.
    q = torch.full((1, 1, 5, 64), 120.0).to(dtype)
    out, lse = F.scaled_dot_product_attention(q, q, q, return_lse=True)
    assert (out - 120).abs().max() <= 120 * eps
    torch.testing.assert_close(lse, torch.full((1, 1, 5), 8 * 14400 + math.log(5)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inf_and_nan_that_are_visible(backend: Backend, dtype: torch.dtype) -> None:
    """As torch has them."""
    for place, value in (("k", INFINITY), ("k", -INFINITY), ("k", float("nan")), ("q", INFINITY)):
        q, k, v = (t.to(dtype) for t in normal(3, 1, 1, 9, 8))
        (k if place == "k" else q)[0, 0, 4, 2] = value
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        wanted = torch_attention(q.double(), k.double(), v.double(), is_causal=True)
        assert torch.equal(out.isnan(), wanted.isnan()), (place, value)
        torch.testing.assert_close(
            out.double(), wanted, equal_nan=True, rtol=0, atol=8 * torch.finfo(dtype).eps
        )
    for value in (INFINITY, -INFINITY, float("nan")):
        q, k, v = (t.to(dtype) for t in normal(3, 1, 1, 9, 8))
        v[0, 0, 4, 2] = value
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        changed = ~out.isfinite()
        assert changed[0, 0, 4:, 2].all() and changed.sum() == 5
        assert_bits_equal(out[changed], torch.full((5,), value, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_keys(backend: Backend, dtype: torch.dtype) -> None:
    check(call, Case((1,), 2, 3, 20011, 24), dtype)
    check(call, Case((1,), 1, 4003, 5, 24, causal=True), dtype)


MEMORY = """
import torch, pyfast
def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1])
attention = pyfast.nn.functional.scaled_dot_product_attention
def step(n):
    q, k, v = (torch.randn(1, 2, n, 64, requires_grad=True) for _ in range(3))
    attention(q, k, v, dropout_p=0.1, is_causal=True).sum().backward()
    assert q.grad.isfinite().all()
step(16)
before = status("VmRSS")
step(4096)
print(status("VmHWM") - before)
"""


def test_memory() -> None:
    """Nothing of the size of the scores: 2 heads of 64 MiB. Operands, gradients and results are 17
    MiB, and the peak before may have been above what was left."""
    done = run_python(MEMORY, 240, PYFAST_BACKEND="cpu")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 48 * 1024


def test_seeds(backend: Backend) -> None:
    """One draw from torch's generator, or from the one that is given; none without dropout."""
    q, k, v = normal(3, 1, 2, 9, 8)
    draw = lambda **keywords: F.scaled_dot_product_attention(q, k, v, None, 0.5, **keywords)  # noqa: E731
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert_bits_equal(draw(), first)
    assert not torch.equal(first, second)
    by_generator = [draw(generator=torch.Generator().manual_seed(n)) for n in (3, 3, 4)]
    assert_bits_equal(by_generator[0], by_generator[1])
    assert not torch.equal(by_generator[0], by_generator[2])
    assert_bits_equal(draw(seed=5), draw(seed=torch.tensor(5)))
    assert_bits_equal(draw(seed=SEED), draw(seed=SEED - 2**64))
    state = torch.get_rng_state()
    F.scaled_dot_product_attention(q, k, v)
    draw(seed=5)
    assert torch.equal(torch.get_rng_state(), state)
