"""What attention refuses: with torch's errors where torch has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend
from device_under_test import to_device
from oracle import normal
from torch import Tensor
from torch.utils._pytree import tree_map_only

import pyfast

pytestmark = pytest.mark.backends("reference", "cpu", "triton")
F = pyfast.nn.functional
attention = F.scaled_dot_product_attention
Q, K = normal(2, 4, 5, 8), normal(2, 4, 7, 8)
BOOL = torch.ones(5, 7, dtype=torch.bool)


def error_of(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        function(*arguments, **keywords)
    return caught.type, str(caught.value)


def calls() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    meta = torch.empty(2, 4, 7, 8, device="meta")
    return {
        "key of another dtype": ((Q, K.double(), K), {}),
        "value of another dtype": ((Q, K, K.bfloat16()), {}),
        "integers": ((Q.long(), K.long(), K.long()), {}),
        "bool": ((Q > 0, K > 0, K > 0), {}),
        "query of one dimension": ((Q[0, 0, 0], K, K), {}),
        "key of one dimension": ((Q, K[0, 0, 0], K), {}),
        "value without dimensions": ((Q, K, torch.tensor(1.0)), {}),
        "other head size": ((Q, K[..., :7], K), {}),
        "heads that do not broadcast": ((Q, K[:, :3], K[:, :3]), {}),
        "batches that do not broadcast": ((Q, normal(3, 4, 7, 8), normal(3, 4, 7, 8)), {}),
        "values of other heads": ((Q, K, K[:, :3]), {}),
        "groups without enable_gqa": ((Q, K[:, :2], K[:, :2]), {}),
        "groups that do not divide": ((Q, K[:, :3], K[:, :3]), {"enable_gqa": True}),
        "more key heads than query heads": ((Q[:, :2], K, K), {"enable_gqa": True}),
        "mask of another length": ((Q, K, K, BOOL[:, :6]), {}),
        "mask of other queries": ((Q, K, K, BOOL[:4]), {}),
        "mask of other heads": ((Q, K, K, BOOL.expand(3, 5, 7)), {}),
        "mask of other batches": ((Q, K, K, torch.zeros(3, 4, 5, 7)), {}),
        "mask of integers": ((Q, K, K, BOOL.int()), {}),
        "mask of bytes": ((Q, K, K, BOOL.byte()), {}),
        "p above 1": ((Q, K, K, None, 1.5), {}),
        "p below 0": ((Q, K, K, None, -0.5), {}),
        "p above 1 with a mask": ((Q, K, K, BOOL, 1.5), {}),
        "key on another device": ((Q, meta, K), {}),
        "mask that is no tensor": ((Q, K, K, [1]), {}),
        "query that is no tensor": ((1, K, K), {}),
        "scale that is no number": ((Q, K, K), {"scale": "1"}),
        "unknown keyword": ((Q, K, K), {"unknown": 1}),
    }


@pytest.mark.parametrize("name", calls())
def test_rejects_what_torch_rejects(backend: Backend, name: str) -> None:
    arguments, keywords = tree_map_only(Tensor, to_device, calls()[name])
    torchs, text = error_of(
        torch.nn.functional.scaled_dot_product_attention, *arguments, **keywords
    )
    ours = error_of(attention, *arguments, **keywords)
    if "that is no" in name or name == "unknown keyword":  # the signature: torch's text lists all
        assert ours[0] is torchs
    else:
        assert ours == (torchs, text)
    gradients = [
        t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in (a.clone() if isinstance(a, Tensor) else a for a in arguments)
    ]
    assert error_of(attention, *gradients, **keywords)[0] is torchs


def test_rejects_nan_probability(backend: Backend) -> None:
    q, k = to_device(Q), to_device(K)
    assert error_of(attention, q, k, k, None, float("nan"))[0] in (RuntimeError, ValueError)


def test_rejects_other_numbers_of_keys_and_values(backend: Backend) -> None:
    """Torch reads past the end of the shorter one."""
    for k, v in ((K, K[:, :, :6]), (K[:, :, :6], K)):
        with pytest.raises(ValueError, match="do not match"):
            attention(*map(to_device, (Q, k, v)))


OURS: dict[str, tuple[dict[str, Any], str]] = {
    "window of one": ({"window": (1,)}, "window must be"),
    "window of three": ({"window": (1, 2, 3)}, "window must be"),
    "window below -1": ({"window": (-2, 0)}, "window must be"),
    "window of floats": ({"window": (1.0, 2)}, "window must be"),
    "window an int": ({"window": 4}, "window must be"),
    "softcap below 0": ({"softcap": -1.0}, "softcap must be"),
    "softcap inf": ({"softcap": float("inf")}, "softcap must be"),
    "softcap nan": ({"softcap": float("nan")}, "softcap must be"),
    "slopes of other heads": ({"alibi_slopes": torch.ones(3)}, "alibi_slopes must be"),
    "slopes of other batches": ({"alibi_slopes": torch.ones(3, 4)}, "alibi_slopes must be"),
    "slopes of three dimensions": ({"alibi_slopes": torch.ones(2, 4, 1)}, "alibi_slopes must be"),
    "slopes of integers": ({"alibi_slopes": torch.ones(4).int()}, "alibi_slopes must be"),
    "slopes elsewhere": ({"alibi_slopes": torch.ones(4, device="meta")}, "alibi_slopes must be"),
    "sinks of other heads": ({"sinks": torch.ones(3)}, "sinks must be"),
    "sinks of two dimensions": ({"sinks": torch.ones(2, 4)}, "sinks must be"),
    "sinks of integers": ({"sinks": torch.ones(4).int()}, "sinks must be"),
    "sinks elsewhere": ({"sinks": torch.ones(4, device="meta")}, "sinks must be"),
    "alignment": ({"causal_alignment": "right"}, "causal_alignment must be"),
}


@pytest.mark.parametrize("name", OURS)
def test_rejects_what_does_not_fit(backend: Backend, name: str) -> None:
    keywords, text = tree_map_only(Tensor, to_device, OURS[name])
    with pytest.raises(ValueError, match=f"scaled_dot_product_attention: {text}"):
        attention(*map(to_device, (Q, K, K)), **keywords)


@pytest.mark.parametrize("seed", [1.5, "1", torch.ones(2).long(), torch.ones(1)], ids=str)
def test_rejects_seeds(backend: Backend, seed: Any) -> None:
    q, k = to_device(Q), to_device(K)
    wanted = error_of(F.dropout, q, 0.5, seed=seed)
    kind, text = error_of(attention, q, k, k, None, 0.5, seed=seed)
    assert kind is wanted[0] and text.partition(":")[2] == wanted[1].partition(":")[2]


@pytest.mark.backends("cpu")
def test_rejects_what_its_kernel_does_not_serve(backend: Backend) -> None:
    """A backend that was named does not fall back."""
    wide = normal(1, 1, 3, 257)
    for q, v in ((Q.double(), K.double()), (wide, wide), (wide[..., :8], wide)):
        k = v[..., : q.shape[-1]] if q.shape[-1] != 257 else wide
        with pytest.raises(RuntimeError, match="'cpu' was asked for, but"):
            attention(q, k, v)
    slopes = torch.ones(4, requires_grad=True)
    out = attention(Q, K, K, alibi_slopes=slopes)
    with pytest.raises(RuntimeError, match="'cpu' was asked for, but"):
        out.sum().backward()


def test_the_reference_differentiates_slopes() -> None:
    """Where no backend was named."""
    slopes = normal(4).requires_grad_()
    attention(Q, K, K, alibi_slopes=slopes).square().sum().backward()
    with pyfast.use_backend("reference"):
        other = slopes.detach().clone().requires_grad_()
        attention(Q, K, K, alibi_slopes=other).square().sum().backward()
    torch.testing.assert_close(slopes.grad, other.grad)


def test_rejects_missing_backends() -> None:
    for name in ("triton", "cuda"):
        if not pyfast.backends()["attention"][name].usable:
            with pyfast.use_backend(name), pytest.raises(RuntimeError, match="asked for, but"):
                attention(Q, K, K)
