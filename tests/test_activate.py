"""``pyfast.activate``: what it reaches, and what it leaves to torch."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from activation_cases import (
    ORIGINALS,
    gradients,
    is_on,
    make_operands,
    next_seed,
    nothing_stays,
    recorded,
    served,
)
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    sdpa_kernel,
)
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import dropout

import pyfast

__all__ = ["nothing_stays"]
pytestmark = pytest.mark.usefixtures("nothing_stays")


def attention_with_mask(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, p: float) -> Tensor:
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
    return (weights * keep / (1 - p)) @ v


def test_import_activates_nothing() -> None:
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    assert F.dropout.__code__.co_filename == F.__file__
    assert "pyfast" in torch.nn.attention.list_flash_attention_impls()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_attention_matches_torch(causal: bool, masked: str | None) -> None:
    if causal and masked:
        pytest.skip("torch refuses both together")
    q, k, v = make_operands()
    mask = None
    if masked:
        mask = torch.rand(2, 1, 7, 7) > 0.3
        mask[..., 0] = True
        if masked == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=0.3)

    expected = gradients(call, q, k, v)
    with pyfast.activate():
        got = gradients(call, q, k, v)
        assert served(lambda: call(q, k, v)) == ["attention:cpu"]
    torch.testing.assert_close(got, expected)
    unmasked = gradients(lambda q, k, v: ORIGINALS[0](q, k, v, scale=0.3), q, k, v)
    if causal or masked:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(got, unmasked)


def test_gradient_of_a_mask_matches_torch() -> None:
    tensors = *make_operands(), torch.randn(3, 1, 7, requires_grad=True)
    expected = gradients(F.scaled_dot_product_attention, *tensors)
    with pyfast.activate():
        assert served(lambda: F.scaled_dot_product_attention(*tensors)) == ["attention:cpu"]
        got = gradients(F.scaled_dot_product_attention, *tensors)
    torch.testing.assert_close(got, expected)


def test_grouped_heads_match_torch() -> None:
    q, k, v = make_operands()
    tensors = q, k[:, :1].detach().requires_grad_(), v[:, :1].detach().requires_grad_()

    def call(*tensors: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*tensors, enable_gqa=True)

    expected = gradients(call, *tensors)
    with pyfast.activate():
        torch.testing.assert_close(gradients(call, *tensors), expected)


def test_attention_drops_what_pyfast_drops() -> None:
    tensors = make_operands()
    torch.manual_seed(3)
    keep = pyfast.dropout_mask((2, 3, 7, 7), 0.5, next_seed(), stream=0)

    def call(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return F.scaled_dot_product_attention(*tensors, dropout_p=0.5)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_with_mask(q, k, v, keep, 0.5)

    expected = gradients(oracle, *tensors)
    with pyfast.activate():
        torch.testing.assert_close(gradients(call, *tensors), expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradients(call, *tensors), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_drops_what_pyfast_drops(inplace: bool) -> None:
    x = torch.ones(50, 40)
    torch.manual_seed(9)
    keep = pyfast.dropout_mask(x.shape, 0.25, next_seed())
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "function": lambda x: F.dropout(x, 0.25, True, inplace),
        "module": nn.Dropout(0.25, inplace),
        "name": lambda x: dropout(x, p=0.25, training=True, inplace=inplace),
    }
    for call in calls.values():
        with pyfast.activate():
            torch.manual_seed(9)
            y = call(x.clone())
        assert torch.equal(y, keep / 0.75)
        torch.manual_seed(9)
        assert not torch.equal(call(x.clone()), y)


def test_dropout_in_evaluation_is_the_input() -> None:
    x = torch.ones(3)
    with pyfast.activate():
        assert F.dropout(x, 0.5, training=False) is x
        assert nn.Dropout().eval()(x) is x


def test_checkpoint_recomputes_the_same_masks() -> None:
    x = torch.randn(64, 32, requires_grad=True)
    with pyfast.activate():
        y = torch.utils.checkpoint.checkpoint(
            lambda x: F.dropout(x.tanh(), 0.5), x, use_reentrant=False
        )
        (grad,) = torch.autograd.grad(y.sum(), x)
    scale = (y != 0) * 2.0
    torch.testing.assert_close(grad, scale * (1 - x.tanh() ** 2))


def test_errors_are_torch_s() -> None:
    q, k, v = make_operands()
    calls: list[Callable[[], Any]] = [
        lambda: F.scaled_dot_product_attention(q, k[..., :3], v),
        lambda: F.scaled_dot_product_attention(q, k.double(), v),
        lambda: F.scaled_dot_product_attention(q, k, v, torch.zeros(5, 5)),
        lambda: F.scaled_dot_product_attention(q[0, 0, 0], k, v),
        lambda: F.dropout(q, 1.5),
        lambda: F.dropout(torch.ones(3, dtype=torch.int64)),
    ]
    for call in calls:
        with pytest.raises((RuntimeError, ValueError, IndexError)) as expected:
            call()
        with pyfast.activate(), pytest.raises(type(expected.value)) as got:
            call()
        assert str(got.value) == str(expected.value)


def test_torch_serves_what_pyfast_does_not() -> None:
    q, k, v = make_operands(torch.float64)
    wide = torch.randn(1, 1, 3, 300)
    with pyfast.activate():
        for call in (
            lambda: F.scaled_dot_product_attention(q, k, v),
            lambda: F.scaled_dot_product_attention(wide, wide, wide),
        ):
            with recorded() as record:
                call()
            assert {s.backend for s in record} == {"torch"}
            assert all("activate() leaves it" in s.reason for s in record)
        with sdpa_kernel(SDPBackend.MATH):
            assert served(lambda: F.scaled_dot_product_attention(wide, wide, wide)) == [
                "attention:torch"
            ]


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_are_left_to_torch(layout: torch.layout) -> None:
    parts = [
        torch.randn(2, n, 8) if layout is torch.strided else torch.randn(n, 2, 8) for n in (3, 5)
    ]
    x = torch.nested.nested_tensor(parts, layout=layout)
    y = x if layout is torch.strided else x.transpose(1, 2)
    expected = F.scaled_dot_product_attention(y, y, y)
    with pyfast.activate():
        got = F.scaled_dot_product_attention(y, y, y)
        assert F.dropout(x, 0.5).is_nested
    for one, other in zip(got.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_causal_bias(make: Callable[..., Tensor], dtype: torch.dtype) -> None:
    tensors = make_operands(dtype, keys=9)

    def call(*tensors: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*tensors, attn_mask=make(7, 9))

    expected = gradients(call, *tensors)
    with pyfast.activate():
        torch.testing.assert_close(gradients(call, *tensors), expected)


def test_subclasses_and_modes_see_torch_s_functions() -> None:
    seen: list[Any] = []

    class Labelled(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func is F.dropout or func is F.scaled_dot_product_attention)
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 2, 3, 4)
    labelled = x.as_subclass(Labelled)
    with pyfast.activate():
        F.scaled_dot_product_attention(labelled, labelled, labelled)
        F.dropout(labelled)
        assert ORIGINALS[0] in seen and ORIGINALS[1] in seen
        seen.clear()
        with Watch():
            ops = served(lambda: F.dropout(F.scaled_dot_product_attention(x, x, x)))
        assert ops == ["attention:cpu", "dropout:cpu"] and seen[:2] == [True, True]
        with torch.device("cpu"):  # a mode, too
            assert is_on()


def test_transforms_and_tracing() -> None:
    q, k, v = (t.detach() for t in make_operands())
    expected = torch.func.vmap(F.scaled_dot_product_attention)(q, k, v)
    with pyfast.activate():
        torch.testing.assert_close(
            torch.func.vmap(F.scaled_dot_product_attention)(q, k, v), expected
        )
        graph = torch.fx.symbolic_trace(
            lambda x: F.dropout(F.scaled_dot_product_attention(x, x, x))
        )
        targets = {node.target for node in graph.graph.nodes if node.op == "call_function"}
        scripted = torch.jit.script(nn.Dropout(0.5))
        assert scripted(torch.ones(64)).unique().tolist() == [0.0, 2.0]
        assert pickle.loads(pickle.dumps(F.dropout)) is F.dropout
        exported = torch.export.export(nn.Dropout(0.5), (torch.ones(3),))
    assert targets == set(ORIGINALS)
    assert "dropout" in str(exported.graph)


class Block(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.dropout(y, 0.5, self.training) + q


@pytest.mark.parametrize("compiled_first", [True, False])
def test_compiled_code_is_right(compiled_first: bool) -> None:
    """Attention reaches pyfast through the registry, whether compiled before or while it is on."""
    torch._dynamo.reset()
    q, k, v = make_operands()
    block = Block().eval()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected = gradients(block, q, k, v)
    if compiled_first:
        torch.testing.assert_close(gradients(compiled, q, k, v), expected)
    with pyfast.activate():
        torch.testing.assert_close(gradients(compiled, q, k, v), expected)
        assert "attention:cpu" in served(lambda: compiled(q, k, v))
        block.train()
        y = compiled(q, k, v) - q
        block.eval()
        kept = y != 0
        torch.testing.assert_close(y[kept], (2 * (expected[0] - q))[kept])
        assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(gradients(compiled, q, k, v), expected)
    assert served(lambda: compiled(q, k, v)) == []


def test_encoder_in_evaluation_is_reached() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        with pyfast.activate():
            got = model(x, src_key_padding_mask=padding)
            assert served(lambda: model(x))[:2] == ["attention:cpu"] * 2
            wrong = model(x)
    torch.testing.assert_close(got[~padding], expected[~padding])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong[~padding], expected[~padding])


def test_attention_can_be_scripted_while_active() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    with pyfast.activate():
        scripted = torch.jit.script(module)
    torch.testing.assert_close(scripted(x, x, x)[0], module(x, x, x)[0])
