"""The weights of attention: those of the result, in blocks, with its dropout and its gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from conftest import Backend
from device_under_test import current_device, to_same
from pyfast.kernels.dropout.dropout_reference import attention_mask_reference
from test_multi_head_attention import E, H, N, assert_same, ours, results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyfast
from pyfast.ops import attention_weights
from pyfast.ops.attention_weights import attention_weights_op


def plain_attention(module: nn.MultiheadAttention, mask: Tensor, kept: Tensor) -> nn.Module:
    """The same with every step a function of torch: weights of all heads, then a product."""

    class Plain(nn.Module):
        def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
            projected = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)
            q, k, v = projected.unflatten(-1, (3, H, E // H)).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-1, -2) / (E // H) ** 0.5 + mask
            weights = scores.softmax(-1) * kept
            return module.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights

    plain = Plain()
    plain.module = module
    return plain


def check_dropout() -> None:
    """One mask for result and weights: out = out_proj(weights @ v), and its gradients."""
    module = pyfast.nn.MultiheadAttention(E, H, dropout=0.3, batch_first=True)
    on_cpu = copy.deepcopy(module)
    module.to(current_device())
    x, mask = torch.randn(N, 37, E), torch.randn(37, 37)
    threshold = round(0.3 * 65536)
    torch.manual_seed(7)
    actual = results(module, [x] * 3, attn_mask=mask, average_attn_weights=False)
    torch.manual_seed(7)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    kept = attention_mask_reference((N, H, 37, 37), seed, threshold, torch.device("cpu"))
    plain = plain_attention(on_cpu, mask, kept * 65536 / (65536 - threshold))
    assert_same(actual, results(plain, [x] * 3))
    x, mask, *actual = to_same(module, (x, mask, *actual))
    for need_weights in (True, False):
        torch.manual_seed(7)
        out, weights = module(x, x, x, attn_mask=mask, need_weights=need_weights)
        torch.testing.assert_close(out, actual[0])
        if weights is not None:
            torch.testing.assert_close(weights, actual[1].mean(1))


@ours
@pytest.mark.parametrize("block_size", [1, 100, 4000, 1 << 20])
def test_weights_have_the_dropout_of_the_result(
    backend: Backend, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the blocks: some rows, all rows of a sequence, several sequences."""
    monkeypatch.setattr(attention_weights, "BLOCK_SIZE", block_size)
    monkeypatch.setattr(attention_weights, "MIN_ROWS", 3)
    check_dropout()


kept, block_gradients = attention_weights._kept, attention_weights._block_gradients
MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "another seed": ("_kept", lambda seed, *a, **k: kept(seed + 1, *a, **k)),
    "not scaled": ("_kept", lambda *a, **k: kept(*a, **k).bool()),
    "rows from zero": (
        "_kept",
        lambda seed, threshold, scores, block: kept(
            seed, threshold, scores, block._replace(rows=slice(0, scores.shape[2]))
        ),
    ),
    "lse is a constant": (
        "_block_gradients",
        lambda *a: (*block_gradients(*a)[:3], torch.tensor(0.0)),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_weights, "BLOCK_SIZE", 100)
    check_dropout()
    monkeypatch.setattr(attention_weights, *MUTANTS[mutant])
    with pytest.raises(AssertionError):
        check_dropout()


def test_averaged_weights_need_no_tensor_of_all_heads() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().nbytes():
                self.numel = max(self.numel, result.untyped_storage().nbytes() // 4)
            return result

    q, k = torch.randn(2, 1, 8, 1024, 4)
    lse = torch.zeros(1, 8, 1024)
    with Largest() as forward:
        weights = attention_weights._weights(q, k, None, lse, 0, 0, 0.5, True, torch.float32)
    assert weights.numel() == 1 << 20 and forward.numel == attention_weights.BLOCK_SIZE
    with Largest() as backward:
        attention_weights._weights_backward(weights, q, k, None, lse, 0, 0, 0.5, True, False)
    assert backward.numel == attention_weights.BLOCK_SIZE


def test_dropout_rate_and_draws() -> None:
    module = pyfast.nn.MultiheadAttention(E, 1, dropout=0.25)
    x = torch.randn(200, 2, E)
    first, second = (module(x, x, x)[1] for _ in range(2))
    rate = (first == 0).double().mean().item()
    assert abs(rate - 0.25) < 5 * (0.25 * 0.75 / first.numel()) ** 0.5
    assert not torch.equal(first == 0, second == 0)
    state = torch.get_rng_state()
    module.eval()(x, x, x)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.backends("reference")
def test_gradcheck(backend: Backend) -> None:
    module = pyfast.nn.MultiheadAttention(4, 2, dropout=0.5, dtype=torch.float64)
    x = torch.randn(3, 1, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    for average in (True, False):

        def call(x: Tensor, mask: Tensor, average: bool = average) -> Any:
            torch.manual_seed(5)
            return module(x, x, x, attn_mask=mask, average_attn_weights=average)

        assert torch.autograd.gradcheck(call, (x, mask))
        assert torch.autograd.gradgradcheck(call, (x, mask))


def test_weights_op() -> None:
    q, k, mask = (torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 1, 1, 5))
    lse, seed = torch.randn(2, 3, 4), torch.tensor(5)
    tensors = [t.requires_grad_() for t in (q, k, mask, lse)]
    for average in (True, False):
        rule = (seed, 6553, 0.3, average, torch.float32)
        torch.library.opcheck(attention_weights_op.dispatched, (*tensors, *rule))
