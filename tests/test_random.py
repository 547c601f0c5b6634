"""Masks and seeds: Philox and its two index maps against plain Python, and who replays a seed.

The high counter word is met from element 2**35 on, which no tensor of a test reaches: the reference
is asked for those indices directly, and the CPU kernels through their headers.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Backend
from oracle import RANKS, assert_bits_equal, keep_mask, normal
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyfast

F = pyfast.nn.functional
philox_reference = pyfast.kernels.common.philox_reference
ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 0x12345678_9ABCDEF0, 2**63 - 1, 2**63, 2**64 - 1)


def philox(seed: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]:
    """Philox-4x32-7 as figure 2 and section 3.3 of Salmon et al. 2011 tell it."""
    k0, k1 = seed % 2**32, seed >> 32
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def element_bits(seed: int, index: int, stream: int) -> int:
    """The element-wise map."""
    words = philox(seed % 2**64, index // 8 % 2**32, index // 8 >> 32, 0, stream)
    return words[index % 8 // 2] >> (16 * (index % 2)) & 0xFFFF


def score_bits(seed: int, row: int, column: int, batch_head: int) -> int:
    """The attention map."""
    counter = (column // 32 * 4 + column % 8 // 2, row, batch_head, 0)
    return philox(seed % 2**64, *counter)[column % 32 // 8] >> (16 * (column % 2)) & 0xFFFF


def tensors(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, 0, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ([2**32 - 1] * 4, 2**64 - 1, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_known_answers(counter: list[int], key: int, expected: str) -> None:
    """The vectors that Random123 publishes for philox4x32-7."""
    words = tuple(int(word, 16) for word in expected.split())
    assert philox(key, *counter) == words
    assert tuple(map(int, philox_reference.philox(key, *tensors(*counter)))) == words
    signed = torch.tensor(key - 2**64 * (key >> 63))
    assert tuple(map(int, philox_reference.philox(signed, *tensors(*counter)))) == words


def test_reference_philox_matches_python() -> None:
    counters = torch.randint(0, 2**32, (4, 200))
    for seed in SEEDS:
        words = torch.stack(philox_reference.philox(seed, *counters)).T.tolist()
        assert words == [list(philox(seed, *c)) for c in counters.T.tolist()]


def test_element_map() -> None:
    """Also beyond 2**35, where the high counter word is no longer zero."""
    starts = (0, 2**32 - 70, 2**35 - 70, 2**40 + 3, 2**62)
    index = torch.cat([torch.arange(140) + start for start in starts])
    for seed, stream in zip(SEEDS, (1, 2, 3, 1, 2, 3), strict=True):
        expected = [element_bits(seed, i, stream) for i in index.tolist()]
        assert philox_reference.element_bits(seed, index, stream).tolist() == expected
    assert philox_reference.element_bits(5, torch.tensor([2**35]), 1) != element_bits(5, 0, 1)


def test_dropout_mask_is_the_element_map() -> None:
    for p in (0.0, 2**-17, 0.1, 0.5, 1 - 2**-16, 1.0):
        for seed, stream in ((3, 1), (2**64 - 5, 2), (-5, 2)):
            mask = pyfast.dropout_mask((5, 1, 7), p, seed, stream=stream)
            assert mask.dtype == torch.bool and mask.shape == (5, 1, 7)
            threshold = round(p * 65536)
            expected = [element_bits(seed, i, stream) >= threshold for i in range(35)]
            assert mask.flatten().tolist() == expected


@pytest.mark.parametrize("shape", [(3, 70), (2, 3, 5, 70), (4, 2, 33), (2, 0, 3, 5)])
def test_dropout_mask_is_the_attention_map(shape: tuple[int, ...]) -> None:
    mask = pyfast.dropout_mask(shape, 0.3, 2**63 + 9, stream=0)
    assert mask.shape == shape
    batch_heads = mask.reshape(-1, *shape[-2:]) if mask.numel() else []
    for z, scores in enumerate(batch_heads):
        rows = [
            [score_bits(2**63 + 9, r, c, z) >= round(0.3 * 65536) for c in range(shape[-1])]
            for r in range(shape[-2])
        ]
        assert scores.tolist() == rows


def test_dropout_mask_rejects() -> None:
    mask = partial(pyfast.dropout_mask, (3,), 0.5)
    for stream in (-1, 3, 1 << 32):
        with pytest.raises(ValueError, match="stream must be 0"):
            mask(1, stream=stream)
    with pytest.raises(ValueError, match=r"needs a shape \(..., L, S\), got \(3,\)"):
        mask(1, stream=0)
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="has to be between 0 and 1"):
            pyfast.dropout_mask((3,), p, 1)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("size", [(), (9,), (3, 4)])
def test_seed_tensors_of_any_shape(
    backend: Backend, shape: tuple[int, ...], size: tuple[int, ...]
) -> None:
    """A seed is one number, whatever the shape of the tensor that holds it."""
    seed = torch.full(shape, -7)
    x = torch.ones(size, device=backend.device)
    assert_bits_equal(F.dropout(x, seed=seed), F.dropout(x, seed=2**64 - 7))


@pytest.mark.parametrize("size", [(), (9,), (3, 4)])
def test_dropout_mask_takes_seed_tensors(size: tuple[int, ...]) -> None:
    for shape in ((), (1,), (1, 1)):
        mask = pyfast.dropout_mask(size, 0.5, torch.full(shape, -7))
        assert torch.equal(mask, pyfast.dropout_mask(size, 0.5, -7)), shape


def test_seeds_are_equal_modulo_two_to_64(backend: Backend) -> None:
    x = torch.ones(77, device=backend.device)
    for seed in (-1, -(2**63), 5, 2**32):
        y = F.dropout(x, seed=seed)
        assert torch.equal(y.cpu() != 0, keep_mask((77,), 0.5, seed))
        for same in (seed + 2**64, seed - 2**64, torch.tensor(seed)):
            assert_bits_equal(F.dropout(x, seed=same), y)


HEADER_TEST = """
#include "keep_bits.h"
using namespace pyfast::PYFAST_ISA;
extern "C" void fill(uint64_t seed, uint32_t stream, uint32_t threshold, uint64_t first,
                     int64_t count, uint64_t* bits) {
  fill_keep_bits({seed, stream, threshold}, first, count, bits);
}
extern "C" int eight(uint64_t seed, uint32_t stream, uint32_t threshold, uint64_t first) {
  return keep_bits8_from(seed, first, stream, threshold);
}
extern "C" int score(uint64_t seed, uint32_t row, uint32_t column, uint32_t z, uint32_t threshold) {
  return keep_score(seed, row, column, z, threshold);
}
"""
LEVEL_FLAGS = {"generic": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}


@pytest.mark.parametrize("level", LEVEL_FLAGS)
def test_headers_match_python(level: str, tmp_path: Path) -> None:
    """The C++ maps at indices that no tensor reaches, compiled as the kernels are."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    detected = pyfast._backend.native.build_info()["isa_detected"]
    if level != "generic" and (
        platform.machine() != "x86_64" or (level > "avx2") > detected.startswith("avx512")
    ):
        pytest.skip(f"this processor has {detected} at most")
    (tmp_path / "test.cpp").write_text(HEADER_TEST)
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-DPYFAST_ISA={level}", *LEVEL_FLAGS[level]]
    include = f"-I{ROOT / 'kernels' / 'common'}"
    library = tmp_path / "test.so"
    subprocess.run([compiler, *flags, include, tmp_path / "test.cpp", "-o", library], check=True)
    native = ctypes.CDLL(str(library))
    u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    for first in (0, 5, 64, 2**35 - 130, 2**35, 2**35 + 77, 2**62 - 3):
        for seed, threshold in ((2**64 - 9, 19661), (7, 65536), (7, 1), (8, 40000)):
            words = (u64 * 16)()
            native.fill(u64(seed), u32(1), u32(threshold), u64(first), ctypes.c_int64(300), words)
            keep = [words[i // 64] >> (i % 64) & 1 for i in range(300)]
            expected = [element_bits(seed, first + i, 1) >= threshold for i in range(300)]
            assert keep == expected, (first, seed, threshold)
            eight = native.eight(u64(seed), u32(1), u32(threshold), u64(first))
            assert [eight >> i & 1 for i in range(8)] == expected[:8]
    for row, column, z in ((0, 0, 0), (9, 41, 3), (2**32 - 1, 2**32 - 1, 2**32 - 1)):
        for i in range(64):
            arguments = (row, (column + i) % 2**32, z)
            kept = native.score(u64(11), *map(u32, arguments), u32(30000))
            assert kept == (score_bits(11, *arguments) >= 30000), arguments


@pytest.mark.parametrize("p", [2**-12, 0.1, 0.3, 0.5, 0.77, 0.999])
def test_keep_rate(p: float) -> None:
    n, keep_rate = 1 << 19, 1 - round(p * 65536) / 65536
    kept = int(keep_mask((n,), p, 2024).sum())
    five_sigma = 5 * (n * keep_rate * (1 - keep_rate)) ** 0.5
    assert abs(kept - n * keep_rate) <= five_sigma


def pair_chi_square(a: Tensor, b: Tensor, keep_rate: float) -> float:
    """Of the four outcomes of two independent masks; three degrees of freedom."""
    counts = torch.bincount(a.long() * 2 + b, minlength=4).double()
    rates = torch.tensor([1 - keep_rate, keep_rate], dtype=torch.float64)
    expected = torch.outer(rates, rates).flatten() * len(a)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_are_independent(p: float) -> None:
    """Also those of neighbouring seeds and of other streams. 33 is exceeded once in 3 million."""
    n, keep_rate = 1 << 19, 1 - round(p * 65536) / 65536
    mask = keep_mask((n,), p, 77)
    for lag in (1, 2, 7, 8, 16, 64, 256, 4096):
        assert pair_chi_square(mask[:-lag], mask[lag:], keep_rate) < 33, lag
    for seed, stream in ((76, 1), (78, 1), (77 + 2**32, 1), (77 + 2**63, 1), (77, 2)):
        other = keep_mask((n,), p, seed, stream)
        assert pair_chi_square(mask, other, keep_rate) < 33, (seed, stream)
        assert pair_chi_square(mask[1:], other[:-1], keep_rate) < 33, (seed, stream)
    assert pair_chi_square(mask, mask, keep_rate) > 1e5


def test_obeys_the_default_generator(backend: Backend) -> None:
    x = torch.ones(100, device=backend.device)
    torch.manual_seed(3)
    first, second = F.dropout(x), F.dropout(x)
    state = torch.get_rng_state()
    third = F.dropout(x)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    torch.manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        F.dropout(x)
        F.dropout(x)
    assert_bits_equal(F.dropout(x), first)
    torch.set_rng_state(state)
    assert_bits_equal(F.dropout(x), third)


def test_draws_once_a_call() -> None:
    for call in (F.dropout, F.dropout2d, partial(F.alpha_dropout, training=True)):
        torch.manual_seed(5)
        seed = torch.empty((), dtype=torch.int64).random_()
        state = torch.get_rng_state()
        torch.manual_seed(5)
        y = call(torch.ones(4, 4, 5, 5))
        assert torch.equal(torch.get_rng_state(), state)
        assert_bits_equal(y, call(torch.ones(4, 4, 5, 5), seed=seed))


def test_generator(backend: Backend) -> None:
    x = torch.ones(100, device=backend.device)
    before = torch.get_rng_state()
    module = pyfast.nn.Dropout(generator=torch.Generator().manual_seed(1))
    first, second = module(x), module(x)
    generator = torch.Generator().manual_seed(1)
    assert_bits_equal(F.dropout(x, generator=generator), first)
    assert_bits_equal(F.dropout(x, generator=generator), second)
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(first, second)
    fixed = pyfast.nn.Dropout(seed=1)
    assert_bits_equal(fixed(x), fixed(x))


@pytest.mark.backends("reference", "cpu")
def test_threads_do_not_matter(backend: Backend) -> None:
    x = torch.randn(5, 70_001)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append([F.dropout(y, 0.3, seed=1) for y in (x, x.bfloat16(), x.t(), x[:, 1:])])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_bits_equal(b, a)


def test_concurrent_calls() -> None:
    """Python threads run kernels at once: the interpreter lock is not held in them."""
    x = torch.randn(300_000)
    expected = [F.dropout(x, 0.3, seed=i) for i in range(4)]
    failures: list[object] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(F.dropout(x, 0.3, seed=i), expected[i]):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(backend: Backend, use_reentrant: bool) -> None:
    weight = torch.randn(9, 9, device=backend.device)

    def block(x: Tensor) -> Tensor:
        return F.dropout(F.dropout(x @ weight, 0.3).tanh() * 2, 0.3, inplace=True)

    def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(2)
        x = torch.ones(5, 9, device=backend.device, requires_grad=True)
        run(x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    expected = gradient(block)
    assert_bits_equal(gradient(partial(checkpoint, block, use_reentrant=use_reentrant)), expected)


def test_vmap_randomness() -> None:
    x = torch.ones(3, 200)
    for function in (F.dropout, torch.func.grad(lambda x: F.dropout(x).sum())):
        for in_dims, inputs in ((0, x), (1, x.t())):
            same = torch.func.vmap(function, in_dims, randomness="same")(inputs)
            assert torch.equal(same[0], same[1]) and same.any()
            different = torch.func.vmap(function, in_dims, randomness="different")(inputs)
            assert not torch.equal(different[0], different[1])
            assert not torch.equal(different[1], different[2])
        with pytest.raises(RuntimeError, match="randomness error mode"):
            torch.func.vmap(function)(x)
    seeds = torch.arange(3)
    y = torch.func.vmap(lambda seed: F.dropout(x[0], seed=seed))(seeds)
    assert_bits_equal(y, torch.stack([F.dropout(x[0], seed=seed) for seed in range(3)]))


def test_generator_is_refused_in_a_graph() -> None:
    with pytest.raises(NotImplementedError, match="pass seed= instead"):
        torch.func.vmap(lambda x: F.dropout(x, generator=torch.Generator()))(torch.ones(3, 4))


def test_saves_nothing_for_backward(backend: Backend) -> None:
    saved: list[Tensor] = []
    x = torch.ones(64, device=backend.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = F.dropout(x)
        z = F.dropout(y.clone(), inplace=True)
        assert not saved
        F.dropout(x, seed=torch.tensor(5))
    assert [t.nbytes for t in saved] == [8]  # the seed
    z.sum().backward()


@pytest.mark.backends("reference", "cpu", "cuda")
@pytest.mark.parametrize("name", RANKS)
def test_gradcheck(backend: Backend, name: str) -> None:
    x = normal(*(3, 4, 2, 2, 2)[: RANKS[name]]).double()
    x = x.to(backend.device).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return getattr(F, name)(x, 0.4, True, seed=6)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(lambda x: function(x) * x, x)
