"""Random ops on a shard: with the place of the shard in the seed, its mask is that of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend
from oracle import assert_bits_equal, normal
from torch import Tensor

import pyfast

ops = torch.ops.pyfast
SEED = 2**40 + 7
Seed = Callable[..., Tensor]
RULE = (20000, 1, 1.5)  # threshold, stream, scale


def seed_of(*place: int) -> Tensor:
    return torch.tensor([SEED, *place])


def without_place(*place: int) -> Tensor:
    return torch.tensor([SEED])


def start(x: Tensor, corner: tuple[int, ...]) -> int:
    return sum(c * s for c, s in zip(corner, x.stride(), strict=True))


def check_dropout(seed: Seed, device: torch.device) -> None:
    for shape in ((7, 5, 24), (4, 300), (6, 3, 8, 5)):
        x = normal(*shape).to(device)
        whole = ops.dropout(x, seed_of(), *RULE, 0.25, -1.0, x.dim())
        n = x.dim()
        for dims in ((0,), (n - 1,), (0, n - 1), (1,)):
            part = tuple(slice(1, s - 1) if d in dims else slice(None) for d, s in enumerate(shape))
            corner = tuple(1 if d in dims else 0 for d in range(n))
            place = (start(x, corner), *x.stride())
            got = ops.dropout(x[part].contiguous(), seed(*place), *RULE, 0.25, -1.0, n)
            assert_bits_equal(got, whole[part].contiguous())
            assert_bits_equal(ops.dropout(x[part], seed(*place), *RULE, 0.25, -1.0, n), got)
        rows = ops.dropout(x[1:], seed(x.stride(0)), *RULE, -0.0, 0.0, n)
        assert_bits_equal(rows, ops.dropout(x, seed_of(), *RULE, -0.0, 0.0, n)[1:])
    x = normal(4, 6, 9).to(device)  # of channels: (N, C), each with nine elements
    whole = ops.dropout(x, seed_of(), *RULE, -0.0, 0.0, 2)
    got = ops.dropout(x[1:3, 2:5].contiguous(), seed(1 * 6 + 2, 6, 1), *RULE, -0.0, 0.0, 2)
    assert_bits_equal(got, whole[1:3, 2:5].contiguous())


def check_fused(seed: Seed, device: torch.device) -> None:
    for columns in (24, 77, 256):
        x, residual = normal(2, 5, 3, columns).to(device)
        weight, bias = normal(2, columns).to(device)
        part, offset = slice(2, 4), 2 * 3 * columns
        whole = ops.bias_dropout_add(x, bias, residual, seed_of(), *RULE)
        got = ops.bias_dropout_add(x[part], bias, residual[part], seed(offset), *RULE)
        assert_bits_equal(got, whole[part])
        whole = ops.bias_dropout_add_backward(x, seed_of(), *RULE)[0]
        assert_bits_equal(
            ops.bias_dropout_add_backward(x[part], seed(offset), *RULE)[0], whole[part]
        )
        rule = (*RULE, 1e-5, False)
        whole = ops.dropout_add_norm(x, residual, weight, bias, seed_of(), *rule, True)
        got = ops.dropout_add_norm(x[part], residual[part], weight, bias, seed(offset), *rule, True)
        assert_bits_equal(got[0], whole[0][part])
        assert_bits_equal(got[1], whole[1][part])
        z, mean, rstd = whole[1:]
        grad = ops.dropout_add_norm_backward(x, None, z, weight, mean, rstd, seed_of(), *rule)[0]
        rows = slice(2 * 3, 4 * 3)
        got = ops.dropout_add_norm_backward(
            x[part], None, z[part], weight, mean[rows], rstd[rows], seed(offset), *rule
        )
        assert_bits_equal(got[0], grad[part])


def check_attention(seed: Seed, device: torch.device) -> None:
    rule = (20000, 0.25, 0.0, -1, 0, False)
    none = (None,) * 5
    for length in (5, 70):  # a few queries take another path
        q, k, v, grad = normal(4, 3, 4, length, 16).to(device)
        part = (slice(1, 3), slice(2, 4))
        tensors = [t[part] for t in (q, k, v)]
        out, lse = ops.attention(q, k, v, *none, seed_of(), *rule)
        got = ops.attention(*tensors, *none, seed(1 * 4 + 2, 4), *rule)
        torch.testing.assert_close(got[0], out[part], rtol=0, atol=1e-5)
        whole = ops.attention_backward(
            grad, torch.zeros_like(lse), q, k, v, *none, out, lse, seed_of(), *rule, False, False
        )
        shard = ops.attention_backward(
            grad[part],
            torch.zeros_like(lse)[part],
            *tensors,
            *none,
            out[part],
            lse[part],
            seed(1 * 4 + 2, 4),
            *rule,
            False,
            False,
        )
        for got_grad, expected in zip(shard[:3], whole[:3], strict=True):
            torch.testing.assert_close(got_grad, expected[part], rtol=0, atol=1e-4)


CHECKS: dict[str, Any] = {
    "dropout": check_dropout,
    "fused": check_fused,
    "attention": check_attention,
}


@pytest.mark.parametrize("check", CHECKS)
def test_mask_is_that_of_the_whole(backend: Backend, check: str) -> None:
    if check == "attention" and backend.name == "cuda":
        pytest.skip("attention has no CUDA C++ kernel")
    CHECKS[check](seed_of, backend.device)


@pytest.mark.parametrize("check", CHECKS)
def test_checks_reject_local_masks(check: str) -> None:
    with pytest.raises(AssertionError):
        CHECKS[check](without_place, torch.device("cpu"))


def test_places_that_do_not_fit(backend: Backend) -> None:
    """Strides for another number of dimensions; Triton takes two sharded dimensions."""
    x = normal(2, 4, 4).to(backend.device)
    if backend.name in ("cpu", "cuda"):
        with pytest.raises(TypeError, match="of a shard: of 2 or 5"):
            ops.dropout(x, seed_of(0, 1), *RULE, -0.0, 0.0, 3)
        with pytest.raises(TypeError, match="of a shard: of 2"):
            ops.bias_dropout_add(x, None, x, seed_of(0, 1), *RULE)
    if backend.name == "triton":
        with pytest.raises(RuntimeError, match="two dimensions at most"):
            ops.dropout(x, seed_of(0, 128, 9, 1), *RULE, -0.0, 0.0, 3)


def test_huge_offset() -> None:
    """A shard far into a tensor of more elements than 32 bits count."""
    x = torch.ones(4096)
    for offset in (2**35 - 8, 2**35 - 1000, 2**40 + 3):
        mask = ops.dropout(x, seed_of(offset), 32768, 1, 1.0, -0.0, 0.0, 1)
        pieces = [
            ops.dropout(part, seed_of(offset + 100 * i), 32768, 1, 1.0, -0.0, 0.0, 1)
            for i, part in enumerate(x.split(100))
        ]
        assert_bits_equal(mask, torch.cat(pieces))
        assert abs(mask.mean().item() - 0.5) < 5 / math.sqrt(4096)
        with pyfast.use_backend("reference"):
            assert_bits_equal(ops.dropout(x, seed_of(offset), 32768, 1, 1.0, -0.0, 0.0, 1), mask)


def test_seeds_that_hide_their_values() -> None:
    """A seed tensor of another shape is refused, a negated view is read as what it says."""
    x = normal(4, 4)
    with pytest.raises(TypeError, match="seed must be"):
        ops.dropout(x, seed_of(0, 4, 1).view(1, 4), *RULE, -0.0, 0.0, 2)
    negated = torch._neg_view(torch.tensor(5))
    got = pyfast.nn.functional.dropout(x, 0.5, seed=negated)
    assert_bits_equal(got, pyfast.nn.functional.dropout(x, 0.5, seed=-5))
