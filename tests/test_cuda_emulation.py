"""The CUDA kernels, run as host code, give the bits of the CPU kernels; broken ones do not."""

from __future__ import annotations

import faulthandler
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from conftest import CPU_LEVELS
from cuda_emulation import build as emulation
from cuda_emulation.mutants import MUTANTS
from oracle import LAYOUTS, assert_bits_equal, normal
from test_bias_dropout_add import assert_all_equal
from torch import Tensor

import pyfast

native = pyfast._backend.native
pytestmark = [
    pytest.mark.skipif(native is None, reason=pyfast._backend.native_error or "-"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation is built with g++"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ORDERS = ("0", "1", "2")  # in which the threads of a block take turns
# Elements on both sides of every tensor, so that what a mutant does outside stays in the buffer: a
# block too many is 256 threads of eight elements.
GUARD = 4096
GUARD_VALUE = 777.0
RULE = (-0x123456789ABCDEF0, 13107, 1, 65536 / (65536 - 13107))  # seed, threshold, stream, scale
IDENTITY = (0, 0, 1, 1.0)


class Memory:
    """Tensors between guard zones. Outputs are full of NaN at first."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.inputs: list[tuple[Tensor, Tensor]] = []
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def _guarded(self, like: Tensor, dtype: torch.dtype, offset: int) -> tuple[Tensor, Tensor]:
        steps = zip(like.shape, like.stride(), strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in steps)
        buffer = torch.full((extent + 2 * GUARD,), GUARD_VALUE, dtype=dtype)
        return torch.as_strided(buffer, like.shape, like.stride(), GUARD + offset), buffer

    def matrix(self, values: Tensor, offset: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """A copy with the strides of ``values``; with an offset of 1 it is not aligned."""
        inner, buffer = self._guarded(values, dtype or self.dtype, offset)
        once = tuple(slice(1) if stride == 0 else slice(None) for stride in values.stride())
        inner[once] = values[once].to(inner.dtype)
        self.inputs.append((buffer, buffer.clone()))
        return inner

    def vector(self, values: Tensor) -> Tensor:
        return self.matrix(values, dtype=self.compute)

    def matrix_out(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        inner, buffer = self._guarded(torch.empty_like(like), dtype or self.dtype, 0)
        self.outputs.append((inner.fill_(float("nan")), buffer))
        return inner

    def vector_out(self, *shape: int) -> Tensor:
        return self.matrix_out(torch.empty(shape), self.compute)

    def results(self) -> list[Tensor]:
        """The outputs, once every element of them is written, and nothing else."""
        for buffer, before in self.inputs:
            assert_bits_equal(buffer, before, "an input changed:")
        for inner, buffer in self.outputs:
            assert not inner.isnan().any(), f"{int(inner.isnan().sum())} elements not written"
            outside = buffer.clone()
            place = (inner.shape, inner.stride(), inner.storage_offset())
            torch.as_strided(outside, *place).fill_(GUARD_VALUE)
            assert (outside == GUARD_VALUE).all(), "written outside of an output"
        return [inner for inner, _ in self.outputs]


class Dropout(NamedTuple):
    make: Callable[[], Tensor]
    mask_ndim: int
    offset: int = 0
    output: str = "like x"

    def run(self, module: ModuleType, memory: Memory) -> None:
        x = memory.matrix(self.make(), self.offset)
        y = x
        if self.output == "x":
            memory.outputs.append((x, memory.inputs.pop()[0]))
        else:
            y = memory.matrix_out(x if self.output == "like x" else x.contiguous())
        # Shift and fill as of an alpha dropout, so that both show in the result.
        module.dropout(x, y, *RULE, 0.25, -1.5, self.mask_ndim, 2)


class BiasDropoutAdd(NamedTuple):
    num_rows: int
    num_columns: int
    has_bias: bool = True
    offset: int = 0

    def run(self, module: ModuleType, memory: Memory) -> None:
        x, residual = normal(2, self.num_rows, self.num_columns)
        bias = memory.vector(normal(self.num_columns)) if self.has_bias else None
        inputs = (memory.matrix(x, self.offset), bias, memory.matrix(residual))
        module.bias_dropout_add(*inputs, memory.matrix_out(x), *RULE, self.num_columns, 2)
        sums = memory.vector_out((self.num_rows + 31) // 32, self.num_columns)
        outputs = (memory.matrix_out(x), sums, memory.vector_out(self.num_columns))
        grad = memory.matrix(residual, self.offset)
        module.bias_dropout_add_backward(grad, *outputs, *RULE, self.num_columns, 2)


class DropoutAddNorm(NamedTuple):
    num_rows: int
    num_columns: int
    rms: bool = False
    is_full: bool = True  # every optional operand; otherwise none, and no dropout
    offset: int = 0

    def run(self, module: ModuleType, memory: Memory) -> None:
        rows, columns, rms = self.num_rows, self.num_columns, self.rms
        x, residual, grad = normal(3, rows, columns)
        added, weight, bias, second = None, None, None, None
        if self.is_full:
            added = memory.matrix(residual)
            weight, bias = (memory.vector(v) for v in normal(2, columns))
            second = memory.matrix_out(x)  # z
        rule = (*(RULE if self.is_full else IDENTITY), 1e-5, rms, columns, 2)
        inputs = (memory.matrix(x, self.offset), added, weight, bias)
        mean = None if rms else memory.vector_out(rows)
        outputs = (memory.matrix_out(x), second, mean, memory.vector_out(rows))
        module.dropout_add_norm(*inputs, *outputs, None, None, *rule)

        # Not what the forward kernel left: each kernel is judged by itself.
        mean = None if rms else memory.vector(x.mean(-1) + 0.5)
        rstd = memory.vector(1 / (x.var(-1, correction=0) + 1e-5).sqrt())
        given = (memory.matrix(grad, self.offset), added, memory.matrix(x + 0.5), weight)
        second = memory.matrix_out(x) if self.is_full else None  # grad_residual
        sums = memory.vector_out(2, (rows + 31) // 32, columns)
        vectors = (sums, memory.vector_out(columns), memory.vector_out(columns))
        outputs = (memory.matrix_out(x), second, *vectors)
        rule = (*rule[:4], *rule[5:])  # less eps
        module.dropout_add_norm_backward(*given, mean, rstd, *outputs, *rule)


Case = Dropout | BiasDropoutAdd | DropoutAddNorm

FEW: dict[str, list[Case]] = {
    "dropout": [
        Dropout(lambda: normal(2067), 1),  # a block of 256 threads, and a tail
        Dropout(lambda: normal(2067), 1, offset=1),
        Dropout(lambda: normal(9, 68)[:, :36], 2),
        Dropout(lambda: normal(700)[::3], 1, output="contiguous"),
        Dropout(lambda: normal(2067), 1, output="x"),
    ],
    "bias_dropout_add": [
        *(BiasDropoutAdd(*shape) for shape in ((33, 36), (65, 40))),
        BiasDropoutAdd(3, 40, offset=1),
    ],
    "dropout_add_norm": [
        *(DropoutAddNorm(*shape) for shape in ((33, 36), (3, 300), (2, 4504))),
        DropoutAddNorm(2, 40, offset=1),
    ],
}


MORE: dict[str, list[Case]] = {
    "dropout": [
        *(Dropout(lambda n=n: normal(n), 1) for n in (1, 7, 8, 9, 2048, 4099)),
        *(Dropout(make, max(make().dim(), 1)) for make in LAYOUTS.values()),
        *(Dropout(make, make().dim(), 0, "contiguous") for make in LAYOUTS.values()),
        Dropout(lambda: normal(4, 6, 5, 3), 2),
        Dropout(LAYOUTS["channels last"], 2),
        Dropout(lambda: normal(3, 5, 17)[:, :, 1:], 1),
        Dropout(lambda: normal(3, 5, 16), 2, offset=1),
        Dropout(lambda: normal(9, 17).t(), 2, output="x"),
    ],
    "bias_dropout_add": [
        *(BiasDropoutAdd(*shape) for shape in ((1, 1), (5, 7), (33, 64), (3, 1032))),
        BiasDropoutAdd(34, 300, has_bias=False),
    ],
    "dropout_add_norm": [
        *(
            DropoutAddNorm(*shape, rms=rms)
            for shape in ((1, 1), (5, 7), (33, 64), (2, 768), (2, 1000), (1, 2500))
            for rms in (False, True)
        ),
        *(DropoutAddNorm(*shape, is_full=False) for shape in ((2, 40), (2, 2504), (2, 4500))),
        *(DropoutAddNorm(1, columns) for columns in (2048, 4096, 8200, 16392)),
        DropoutAddNorm(2, 4500, rms=True, offset=1),
    ],
}


def cpu_results(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """What the CPU kernels give, at every level that this processor has."""
    info = native.build_info()
    selected = native.selected_isa()
    results = []
    for level in CPU_LEVELS[: CPU_LEVELS.index(info["isa_detected"]) + 1]:
        if level not in info["isa_compiled"]:
            continue
        native.set_selected_isa(level)
        memory = Memory(dtype)
        case.run(native, memory)
        results.append(memory.results())
    native.set_selected_isa(selected)
    for other in results[1:]:
        assert_all_equal(other, results[0], f"{case} {dtype} between levels")
    return results[0]


def compare(
    module: ModuleType, cases: list[Case], dtypes: tuple[torch.dtype, ...], orders: tuple[str, ...]
) -> None:
    """Asserts that the kernels of an emulated module give the bits of the CPU kernels."""
    for case in cases:
        for dtype in dtypes:
            expected = cpu_results(case, dtype)
            for order in orders:
                memory = Memory(dtype)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("PYFAST_EMULATION_ORDER", order)
                    case.run(module, memory)
                assert_all_equal(memory.results(), expected, f"{case} {dtype}")


@pytest.fixture(scope="module")
def emulated() -> ModuleType:
    return emulation.load(emulation.build(), "emulated")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("op", FEW)
def test_cuda_kernels_give_the_bits_of_the_cpu(emulated: ModuleType, op: str, order: str) -> None:
    compare(emulated, FEW[op] + MORE[op], DTYPES, (order,))


NAMES = [(op, name) for op, mutants in MUTANTS.items() for name in mutants]


@pytest.fixture(scope="module")
def mutants(emulated: ModuleType) -> dict[tuple[str, str], Path]:
    """The builds of all mutants. The unchanged objects are there already."""

    changes = [[(f"{op}_cuda.cu", *MUTANTS[op][name])] for op, name in NAMES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(NAMES, pool.map(emulation.build, changes), strict=True))


def verdict(module: ModuleType, op: str) -> str:
    """What the comparison says of a module, in a process of its own: a mutant may end it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            compare(module, FEW[op], DTYPES[:2], ORDERS)
            os.write(writer, b"accepted")
        except (AssertionError, RuntimeError) as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode()[:2000])
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    return text if status == 0 else f"ended by signal {os.WTERMSIG(status)}"


@pytest.mark.parametrize("op", FEW)
def test_comparison_accepts_the_original(emulated: ModuleType, op: str) -> None:
    assert verdict(emulated, op) == "accepted"


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_comparison_rejects(mutants: dict[tuple[str, str], Path], op: str, name: str) -> None:
    module = emulation.load(mutants[op, name], f"mutant_{NAMES.index((op, name))}")
    found = "differ|not written|outside|not aligned|waits at a barrier for ever"
    if name.endswith("taken as aligned"):
        found = "RuntimeError.* not aligned"
    text = verdict(module, op)
    assert re.search(found, text), text


EMULATOR_TEST = r"""
#include <cstdio>
#include <cstdlib>
#include "cuda_emulation.h"

alignas(16) static char bytes[64], copy[16];
static int out[64];

void report(const char* name, int block_threads, const std::function<void()>& kernel) {
  for (int& value : out) value = 0;
  const char* error = cuda_emulation::run(dim3(2), block_threads, kernel);
  int sum = 0;
  for (int i = 0; i < 64; ++i) sum += out[i] * (i + 1);
  std::printf("%s: %s %d\n", name, error ? error : "fine", sum);
}

int exchanged(bool has_barrier) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(blockIdx.x * 100 + threadIdx.x);
  if (has_barrier) __syncthreads();
  return values[63 - threadIdx.x];
}

int main(int, char** arguments) {
  setenv("PYFAST_EMULATION_ORDER", arguments[1], 1);
  report("butterfly", 64, [] {
    int sum = static_cast<int>(threadIdx.x);
    for (unsigned lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
    out[threadIdx.x] = sum;
  });
  report("barrier", 64, [] { out[threadIdx.x] = exchanged(true); });
  report("no barrier", 64, [] { out[threadIdx.x] = exchanged(false); });
  report("skipped shuffle", 32, [] {
    if (threadIdx.x != 5) __shfl_xor_sync(~0u, 1, 1u);
  });
  report("lane outside", 16, [] { __shfl_xor_sync(0xFFFFu, 1, 16u); });
  using cuda_emulation::copy_aligned;
  report("aligned", 32, [] { copy_aligned(copy, bytes, bytes + 16, 16); });
  report("misaligned", 32, [] { copy_aligned(copy, bytes, bytes + threadIdx.x / 31, 16); });
}
"""


@pytest.fixture(scope="module")
def emulator_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("emulator") / "test"
    program.with_suffix(".cpp").write_text(EMULATOR_TEST)
    sources = [f"{program}.cpp", emulation.HERE / "cuda_emulation.cpp"]
    flags = ["-std=c++17", f"-I{emulation.HERE}", "-o", program]
    subprocess.run(["g++", *flags, *sources], check=True)
    return program


@pytest.mark.parametrize("order", ORDERS)
def test_emulator_reports(emulator_test: Path, order: str) -> None:
    """Deadlocks, lanes that do not exist, misaligned accesses; a missing barrier changes values."""
    text = subprocess.check_output([emulator_test, order], text=True, timeout=60)
    reports = dict(line.split(": ", 1) for line in text.splitlines())
    total = sum((496 if i < 32 else 1520) * (i + 1) for i in range(64))  # of 0 to 31, of 32 to 63
    assert reports["butterfly"] == f"fine {total}"
    right = f"fine {sum((100 + 63 - i) * (i + 1) for i in range(64))}"
    assert reports["barrier"] == right and reports["no barrier"] != right
    assert "waits at a barrier for ever" in reports["skipped shuffle"]
    assert "lane outside of the block" in reports["lane outside"]
    assert reports["aligned"] == "fine 0"
    assert "thread 31 of block 0 accesses 16 bytes at an address" in reports["misaligned"]
