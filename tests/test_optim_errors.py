"""What pyfast's optimizers refuse, and that nothing has changed then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optim_extras import (
    HALF,
    INFINITY,
    KINDS,
    NAN,
    STATES,
    all_parameters,
    assert_same,
    each_kind,
    everything,
    make,
    parameters,
    set_gradients,
    train,
)

import pyfast

BAD: tuple[tuple[str, Any], ...] = (
    *(("max_grad_norm", x) for x in (-1.0, NAN, "1")),
    *(("ema_decay", x) for x in (-0.1, 1.5, NAN, "0.9")),
    *(("l1", x) for x in (-1.0, NAN, INFINITY, "1")),
    *(("l1_mode", x) for x in ("both", 3)),
    *(("state_dtype", x) for x in ("int4", 8)),
    *((name, x) for name in ("master_weights", "zero_grads") for x in ("yes", 2)),
    *(("stochastic_rounding", x) for x in ("yes", 2)),
    *(("seed", x) for x in ("a", 1.5)),
)


def check_message(error: Any, name: str, *values: Any) -> None:
    message = str(error.value)
    assert name in message
    for value in values:
        assert str(value) in message or type(value).__name__ in message, message


@pytest.mark.parametrize("name, value", BAD)
def test_bad_extras(name: str, value: Any) -> None:
    for kind in KINDS:
        with pytest.raises((TypeError, ValueError)) as error:
            make(kind, parameters(), **{name: value})
        check_message(error, name, value)
        ours = make(kind, parameters())
        with pytest.raises((TypeError, ValueError)) as error:
            ours.add_param_group({"params": parameters((3,)), name: value})
        check_message(error, name, value)
        assert len(ours.param_groups) == 1


@each_kind
def test_unknown_keyword(kind: str) -> None:
    with pytest.raises(TypeError, match="max_norm"):
        make(kind, parameters(), max_norm=1.0)
    with pytest.raises(TypeError):  # keywords only
        getattr(pyfast.optim, kind)(parameters(), *[0.1] * 30)


CLASHES: dict[str, tuple[torch.dtype, dict[str, Any], str]] = {
    "stochastic and master": (
        HALF,
        {"stochastic_rounding": True, "master_weights": True},
        "stochastic_rounding",
    ),
    "stochastic float16": (torch.float16, {"stochastic_rounding": True}, "stochastic_rounding"),
    "int8 float64": (torch.float64, {"state_dtype": "int8"}, "state_dtype"),
    "bfloat16 float64": (torch.float64, {"state_dtype": "bfloat16"}, "state_dtype"),
}


@pytest.mark.parametrize("clash", CLASHES)
def test_extras_that_clash(clash: str) -> None:
    dtype, extras, name = CLASHES[clash]
    for kind in KINDS:
        with pytest.raises(ValueError, match=name):
            make(kind, parameters(dtype=dtype), **extras)
        ours = make(kind, parameters())
        with pytest.raises(ValueError, match=name):
            ours.add_param_group({"params": parameters((3,), dtype=dtype), **extras})
        train(ours, 0)


def test_int8_of_centered_rmsprop() -> None:
    with pytest.raises(ValueError, match="centered"):
        make("RMSprop", parameters(), state_dtype="int8", centered=True)


@pytest.mark.parametrize("name, value", [("max_grad_norm", 1.0), ("ema_decay", 0.9), ("l1", 0.1)])
def test_extras_where_torch_computes(name: str, value: float) -> None:
    with pytest.raises(NotImplementedError, match=name):
        train(make("AdamW", parameters(dtype=torch.complex64), **{name: value}), 0)
    with pytest.raises(NotImplementedError, match=name):
        train(make("AdamW", parameters(), differentiable=True, **{name: value}), 0)


def make_sparse(ours: Any, kind: str) -> None:
    grad = all_parameters(ours)[-1].grad
    assert grad is not None
    all_parameters(ours)[-1].grad = grad.to_sparse()


def shorten_state(ours: Any, kind: str) -> None:
    ours.state[all_parameters(ours)[-1]][STATES[kind][0]] = torch.zeros(3)


EVERY_EXTRA = {"max_grad_norm": 1.0, "zero_grads": True, "ema_decay": 0.9}


@each_kind
@pytest.mark.parametrize("spoil", [make_sparse, shorten_state], ids=["sparse", "state"])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("extras", [{}, EVERY_EXTRA], ids=["plain", "extras"])
def test_nothing_changes_after_an_error(
    kind: str, spoil: Callable[[Any, str], None], is_first: bool, extras: dict[str, Any]
) -> None:
    ours = make(kind, parameters(), **extras)
    if not is_first:
        train(ours, 0, 1)
    elif spoil is shorten_state:
        pytest.skip("has no state yet")
    set_gradients(ours, 2)
    spoil(ours, kind)
    before = everything(ours)
    with pytest.raises((RuntimeError, ValueError)):
        ours.step()
    assert_same(ours, before)
