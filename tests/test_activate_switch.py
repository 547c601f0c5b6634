"""``pyfast.activate`` on and off: nesting, threads, other libraries, torch's registry."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from activation_cases import (
    ORIGINALS,
    is_on,
    make_operands,
    nothing_stays,
    served,
)
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    register_flash_attention_impl,
    restore_flash_attention_impl,
)
from torch.nn.functional import scaled_dot_product_attention

import pyfast
from pyfast import _flash_attention

__all__ = ["nothing_stays"]
pytestmark = pytest.mark.usefixtures("nothing_stays")
bound_before = F.dropout, F.scaled_dot_product_attention  # not under their names


@pytest.mark.parametrize("attention", [True, False])
def test_one_alone(attention: bool) -> None:
    q = make_operands()[0].detach()
    with pyfast.activate(attention=attention, dropout=not attention):
        ops = served(lambda: F.dropout(F.scaled_dot_product_attention(q, q, q)))
        assert ops == (["attention:cpu"] if attention else ["dropout:cpu"])
        assert torch.backends.mha.get_fastpath_enabled() is not attention
    with pytest.raises(ValueError, match="attention or dropout must be True"):
        pyfast.activate(attention=False, dropout=False)


def test_activations_nest_and_end_in_any_order() -> None:
    first = pyfast.activate()
    with pyfast.activate(attention=False) as second:
        third = pyfast.activate(dropout=False)
        first.deactivate()
        first.deactivate()
        assert is_on()
    assert not is_on()
    assert F.scaled_dot_product_attention is not ORIGINALS[0]
    third.deactivate()
    assert F.scaled_dot_product_attention is ORIGINALS[0]
    assert repr(second) == "<Activation of dropout: off>"
    with pytest.raises(RuntimeError, match="this activation is over"), third:
        pass


def test_undone_after_an_exception() -> None:
    with pytest.raises(KeyError), pyfast.activate():
        raise KeyError
    assert not is_on()


def test_names_bound_before_and_while_it_is_on() -> None:
    module = types.ModuleType("pyfast_test_late")
    sys.modules[module.__name__] = module
    x = torch.ones(4)
    try:
        with pyfast.activate():
            exec("from torch.nn.functional import dropout", vars(module))
            captured = F.dropout
            assert scaled_dot_product_attention is F.scaled_dot_product_attention
            assert served(lambda: bound_before[0](x)) == []  # as documented
            q = make_operands()[0].detach()
            assert served(lambda: bound_before[1](q, q, q)) == ["attention:cpu"]
        assert module.dropout is ORIGINALS[1]
        assert served(lambda: captured(x)) == []
    finally:
        del sys.modules[module.__name__]


def test_foreign_replacements_stay() -> None:
    calls: list[int] = []
    saved: Any = None

    def foreign(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(x.numel())
        return saved(x, *args, **kwargs)

    try:
        handle = pyfast.activate()
        saved, F.dropout = F.dropout, foreign
        with pytest.warns(RuntimeWarning, match=r"functional.dropout has become .*foreign"):
            handle.deactivate()
        assert F.dropout is foreign and not is_on()
        with warnings.catch_warnings(), pyfast.activate(), pyfast.activate():
            warnings.simplefilter("error")
            assert is_on() and calls == [3]
            F.dropout(torch.ones(4, dtype=torch.int64), training=False)  # not pyfast's
        assert F.dropout is foreign and calls == [3, 4]
        F.dropout = saved  # what foreign found, long over
        assert not is_on()
        with pyfast.activate():
            assert is_on()
        assert F.dropout is ORIGINALS[1]
    finally:
        F.dropout = ORIGINALS[1]


def test_a_warning_that_is_an_error_leaves_nothing_half_done() -> None:
    handle = pyfast.activate()
    F.scaled_dot_product_attention = lambda *_: None
    try:
        with warnings.catch_warnings(), pytest.raises(RuntimeWarning):
            warnings.simplefilter("error")
            handle.deactivate()
        assert F.dropout is ORIGINALS[1]
        assert torch.backends.mha.get_fastpath_enabled()
    finally:
        F.scaled_dot_product_attention = ORIGINALS[0]


class Other:
    """Another implementation in torch's registry."""

    removed = 0

    def remove(self) -> None:
        Other.removed += 1


def test_another_implementation_in_the_registry_stays() -> None:
    register_flash_attention_impl("pyfast-test", register_fn=Other)
    q = make_operands()[0].detach()
    try:
        activate_flash_attention_impl("pyfast-test")
        with pyfast.activate():
            assert current_flash_attention_impl() == "pyfast-test"
            assert served(lambda: F.scaled_dot_product_attention(q, q, q)) == ["attention:cpu"]
        restore_flash_attention_impl()
        with pyfast.activate():
            activate_flash_attention_impl("pyfast-test")
        assert current_flash_attention_impl() == "pyfast-test"
    finally:
        restore_flash_attention_impl()
    assert Other.removed == 2


def test_registry_alone_matches_torch() -> None:
    """Every combination of who serves the forward and who the backward pass."""
    q, k, v = make_operands()
    mask = torch.zeros(7, 7)
    mask[2], mask[:, 4] = -torch.inf, -torch.inf  # query 2 sees nothing
    weights = torch.linspace(-1, 1, q.numel()).view(q.shape)

    def run(forward: bool, backward: bool, mask: Tensor | None, causal: bool) -> list[Tensor]:
        with registered(forward):
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        with registered(backward):
            return [y.detach(), *torch.autograd.grad((y * weights).sum(), (q, k, v))]

    for case in ((None, False), (None, True), (mask, False)):
        expected = run(False, False, *case)
        for forward, backward in ((True, True), (True, False), (False, True)):
            got = run(forward, backward, *case)
            torch.testing.assert_close(got, expected)
            strides = [t.stride() for t in got]
            assert strides == [t.stride() for t in expected]
    with registered(True):
        assert served(lambda: F.scaled_dot_product_attention(q, k, v)) == ["attention:cpu"]
        assert served(lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)) == []


@contextlib.contextmanager
def registered(wanted: bool) -> Iterator[None]:
    if wanted:
        activate_flash_attention_impl("pyfast")
    try:
        yield
    finally:
        if wanted:
            restore_flash_attention_impl()


def test_the_dispatcher_is_left_alone_while_other_threads_live(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q = make_operands()[0].detach()
    monkeypatch.setattr(_flash_attention, "_is_alone", lambda: False)
    with pyfast.activate():
        assert current_flash_attention_impl() is None
        assert served(lambda: F.scaled_dot_product_attention(q, q, q)) == ["attention:cpu"]
    monkeypatch.setattr(_flash_attention, "_is_alone", lambda: True)
    handle = pyfast.activate()
    monkeypatch.setattr(_flash_attention, "_is_alone", lambda: False)
    handle.deactivate()
    assert served(lambda: bound_before[1](q, q, q)) == []  # it passes calls on
    assert torch.equal(bound_before[1](q, q, q), ORIGINALS[0](q, q, q))
    with pyfast.activate():
        assert served(lambda: bound_before[1](q, q, q)) == ["attention:cpu"]
        monkeypatch.setattr(_flash_attention, "_is_alone", lambda: True)


def test_threads_enter_and_leave_in_any_order() -> None:
    """With calls in all of them: each is served by one or the other, and none fails."""
    q = make_operands()[0].detach()
    expected = ORIGINALS[0](q, q, q)
    failures: list[BaseException] = []
    interval = sys.getswitchinterval()

    def work(number: int) -> None:
        try:
            held: list[Any] = []
            for step in range(60):
                held.append(pyfast.activate(dropout=bool((step + number) % 3)))
                torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), expected)
                assert F.dropout(q, 0.5).shape == q.shape
                if len(held) > 3:
                    held.pop((step * 7 + number) % len(held)).deactivate()
            for handle in held:
                handle.deactivate()
        except BaseException as error:
            failures.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_flash_attention, "_is_alone", lambda: False)
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
    assert not failures


def test_other_threads_are_reached() -> None:
    results: list[bool] = []
    with pyfast.activate():
        thread = threading.Thread(target=lambda: results.append(is_on()))
        thread.start()
        thread.join()
    assert results == [True]
