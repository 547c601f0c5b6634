"""What the tests of ``pyfast.activate`` share: who served a call, and that nothing stays behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from pyfast import _backend, _flash_attention

ORIGINALS = F.scaled_dot_product_attention, F.dropout


@pytest.fixture
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Threads that the compilers of other tests have left behind are idle.
    monkeypatch.setattr(_flash_attention, "_is_alone", lambda: True)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    yield
    assert (F.scaled_dot_product_attention, F.dropout) == ORIGINALS
    assert torch._C._nn.scaled_dot_product_attention is ORIGINALS[0]
    assert current_flash_attention_impl() is None
    assert torch.backends.mha.get_fastpath_enabled() is fast_path
    q = torch.ones(1, 1, 2, 4)
    assert served(lambda: F.dropout(F.scaled_dot_product_attention(q, q, q))) == []


@contextlib.contextmanager
def recorded() -> Iterator[list[_backend.Served]]:
    record: list[_backend.Served] = []
    _backend.observers.append(record)
    try:
        yield record
    finally:
        _backend.observers.pop()


def served(call: Callable[[], Any]) -> list[str]:
    """``op:backend`` of every pyfast op in the call, except of gradients."""
    with recorded() as record:
        call()
    return [f"{s.op}:{s.backend}" for s in record if not s.op.endswith("_backward")]


def is_on() -> bool:
    x = torch.ones(3)
    return served(lambda: F.dropout(x)) == ["dropout:cpu"]


def make_operands(dtype: torch.dtype = torch.float32, keys: int = 7) -> list[Tensor]:
    lengths = (7, keys, keys)
    return [torch.randn(2, 3, n, 8, dtype=dtype, requires_grad=True) for n in lengths]


def gradients(call: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of all tensors."""
    y = call(*tensors)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return (y.detach(), *torch.autograd.grad((y * weights).sum(), tensors))


def next_seed() -> int:
    """What pyfast draws for its next call."""
    return int(torch.empty((), dtype=torch.int64).random_())
