"""int8_mm: exact sums for every size and layout."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_oracle import (
    MATRICES,
    assert_only_outputs_written,
    check_mm,
    check_products,
    guarded_outputs,
    ints,
)

import pyfast

F = pyfast.nn.functional


def test_sizes_and_layouts(backend: Backend) -> None:
    check_products(F.int8_mm, backend.device, backend.is_slow)


@settings(max_examples=40)
@given(data=st.data())
def test_any_size(backend: Backend, data: st.DataObject) -> None:
    sizes = st.integers(1, 40 if backend.is_slow else 130)
    m, k, n = (data.draw(sizes) for _ in range(3))
    left, right = (data.draw(st.sampled_from(list(MATRICES))) for _ in range(2))
    check_mm(F.int8_mm, MATRICES[left](m, k), MATRICES[right](k, n), backend.device)


@pytest.mark.parametrize(
    "shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0), (9, 0, 128), (40, 0, 300)], ids=str
)
def test_empty(backend: Backend, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    check_mm(F.int8_mm, ints(m, k), ints(k, n), backend.device)


@pytest.mark.backends("reference", "cpu")
def test_wraps(backend: Backend) -> None:
    """2**17 times 2**14 is 2**31, the first sum that an int32 cannot hold."""
    for k in (2**17 - 1, 2**17, 2**17 + 1):
        a = torch.full((2, k), -128, dtype=torch.int8)
        check_mm(F.int8_mm, a, a[:1].t())


@pytest.mark.backends("reference", "cpu")
@pytest.mark.parametrize("shape", [(700, 20, 400), (2, 40, 2**17 + 3)], ids=str)
def test_large(backend: Backend, shape: tuple[int, int, int]) -> None:
    """An output whose memory is recycled; before, it held ones in every bit."""
    m, k, n = shape
    native = pyfast._backend.native
    if backend.name == "cpu":
        block = native.empty(torch.empty(0, dtype=torch.int32), (m, n))
        assert block is not None
        block.fill_(-1)
        del block
    check_mm(F.int8_mm, ints(m, k), ints(n, k).t())


@pytest.mark.backends("cpu")
def test_threads_agree(backend: Backend) -> None:
    for m, k, n in ((1, 4096, 1000), (300, 130, 200), (1000, 300, 17)):
        a, b = ints(m, k), ints(n, k).t()
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            check_mm(F.int8_mm, a, b)


@pytest.mark.backends("cpu")
def test_writes_only_the_output(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    for m, k, n in ((1, 1, 1), (1, 64, 65), (2, 3, 31), (5, 33, 17), (17, 64, 49), (70, 9, 100)):
        with guarded_outputs(monkeypatch) as made:
            y = F.int8_mm(ints(m, k), ints(k, n))
        assert_only_outputs_written(made, y)


def test_does_not_change_its_operands(backend: Backend) -> None:
    a, b = ints(9, 37).to(backend.device), ints(37, 21).to(backend.device)
    before = a.clone(), b.clone()
    F.int8_mm(a, b)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])
