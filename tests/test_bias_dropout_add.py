"""``residual + dropout(x + bias)``: values, gradients, layouts, errors, and its module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from conftest import Backend
from oracle import (
    LAYOUTS,
    assert_bits_equal,
    drop_scale,
    extreme_values,
    keep_mask,
    nan_memory,
    normal,
    poison_recycled_blocks,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyfast

F = pyfast.nn.functional
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = (
    *((1, 1), (3, 7), (2, 5, 33), (33, 64), (40, 256), (35, 300), (4, 768), (5, 1000)),
    *((3, 2500), (2, 4500)),
)
SLOW_SHAPES = SHAPES[:-2]  # where every element is interpreted
LAYOUTS_OF_ROWS = [name for name in LAYOUTS if name != "scalar"]
P, SEED = 0.3, 0xFEDCBA9876543210
Function = Callable[..., Tensor]


def fused(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: int) -> Tensor:
    return F.bias_dropout_add(x, bias, residual, p, seed=seed)


def plain(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: int) -> Tensor:
    """The unfused expression: what is replaced, with the mask as a tensor; exact in float64."""
    mask = keep_mask(tuple(x.shape), p, seed).to(x.device)
    value = x if bias is None else x + bias
    return (residual + torch.where(mask, value * drop_scale(p), 0.0)).to(residual.dtype)


def with_gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor | None) -> list:
    """The result of a function and its gradients, on the CPU."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    y.backward(grad)
    return [y.detach().cpu()] + [t.grad.cpu() for t in leaves if t is not None]


def assert_as_accurate_as_torch(
    actual: Tensor, torchs: Tensor, exact: Tensor, message: str, ulps: float = 1.0
) -> None:
    """No error above twice that of the unfused torch expression in the same dtype, plus ``ulps``.

    One rounding of a result is half an ulp of it, that is eps / 2 of the largest one at most. As
    much again is for what was rounded before in the type that is computed in, where torch is exact
    by luck (one element). Twice torch's error is the criterion of flash-attention 3.
    """
    assert actual.dtype == torchs.dtype and actual.shape == exact.shape, message
    largest = exact.abs().max().item() if exact.numel() else 0.0
    finfo = torch.finfo(actual.dtype)
    allowed = 2 * (torchs.double() - exact).abs() if exact.numel() else exact
    bound = allowed.max() if exact.numel() else 0.0
    error = (actual.double() - exact).abs().max() if exact.numel() else 0.0
    bound = bound + ulps * finfo.eps * largest + finfo.tiny
    assert error <= bound, f"{message} error {error:.3g}, allowed {bound:.3g}"


def check(
    function: Function,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ulps: float = 1.0,
) -> None:
    """Asserts that ``function(x, bias, residual, p, seed)`` and its gradients are right."""
    for shape in shapes:
        for bias_dtype in (None, dtype, torch.float32):
            x, residual, grad = normal(3, *shape).to(dtype)
            bias = None if bias_dtype is None else normal(shape[-1]).to(bias_dtype)
            inputs = (x, bias, residual)
            wide = [t if t is None else t.double() for t in inputs]
            exact = with_gradients(lambda *t: plain(*t, P, SEED), grad.double(), *wide)
            torchs = with_gradients(lambda *t: plain(*t, P, SEED), grad, *inputs)
            there = [t if t is None else t.to(device) for t in inputs]
            with nan_memory():
                ours = with_gradients(lambda *t: function(*t, P, SEED), grad.to(device), *there)
            names = ("y", "grad_x", *(("grad_bias",) if bias is not None else ()), "grad_residual")
            for name, *tensors in zip(names, ours, torchs, exact, strict=True):
                text = f"{shape} {dtype}, bias {bias_dtype}: {name}"
                assert_as_accurate_as_torch(*tensors, text, ulps)


def is_truncated(backend: Backend, dtype: torch.dtype) -> bool:
    """Triton's interpreter cuts float32 to bfloat16 off instead of rounding it."""
    return backend.name == "triton" and backend.is_slow and dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_torch(backend: Backend, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not compute in {dtype}")
    shapes = SLOW_SHAPES if backend.is_slow else SHAPES
    check(fused, shapes, dtype, backend.device, 2.0 if is_truncated(backend, dtype) else 1.0)


def with_mask(change: Callable[[Tensor], Tensor]) -> Function:
    def mutant(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: int) -> Tensor:
        mask = change(keep_mask(tuple(x.shape), p, seed))
        return residual + torch.where(mask, (x if bias is None else x + bias) * drop_scale(p), 0.0)

    return mutant


def without_tail(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: int) -> Tensor:
    whole = x.shape[-1] // 8 * 8
    y = plain(x, bias, residual, p, seed)
    return torch.cat([y[..., :whole], residual[..., whole:]], -1)


def without_last_chunk(
    x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: int
) -> Tensor:
    """The right values, but the gradient of the bias misses the last 32 rows."""
    if bias is None:
        return plain(x, bias, residual, p, seed)
    rows = bias.expand(x.shape).reshape(-1, x.shape[-1])
    last = (len(rows) - 1) // 32 * 32 if len(rows) > 32 else len(rows)
    rows = torch.cat([rows[:last], rows[last:].detach()])
    return plain(x, rows.view(x.shape), residual, p, seed)


MUTANTS: dict[str, Function] = {
    "no-op": lambda x, bias, residual, p, seed: residual + x,
    "no bias": lambda x, bias, residual, p, seed: plain(x, None, residual, p, seed),
    "no residual": lambda x, bias, residual, p, seed: plain(x, bias, residual * 0, p, seed),
    "bias after dropout": lambda x, bias, residual, p, seed: (
        plain(x, None, residual, p, seed) + (0 if bias is None else bias)
    ),
    "unscaled": lambda x, bias, residual, p, seed: (
        residual + (plain(x, bias, residual, p, seed) - residual) / drop_scale(p)
    ),
    "scale of p as given": lambda x, bias, residual, p, seed: (
        residual + (plain(x, bias, residual, p, seed) - residual) / drop_scale(p) / (1 - p)
    ),
    "residual dropped too": lambda x, bias, residual, p, seed: (
        plain(residual + (x if bias is None else x + bias), None, residual * 0, p, seed)
    ),
    "low half of the seed": lambda x, bias, residual, p, seed: plain(
        x, bias, residual, p, seed & 0xFFFFFFFF
    ),
    "shifted mask": with_mask(lambda mask: mask.roll(1)),
    "inverted mask": with_mask(lambda mask: ~mask),
    "mask of one row": with_mask(lambda mask: mask[:1].expand(mask.shape)),
    "tail without dropout": without_tail,
    "bias gradient of all but the last chunk": without_last_chunk,
    "gradient without scale": lambda x, bias, residual, p, seed: (
        plain(x, bias, residual, p, seed).detach()
        + (residual + (plain(x, bias, residual, p, seed) - residual) / drop_scale(p))
        - (residual + (plain(x, bias, residual, p, seed) - residual) / drop_scale(p)).detach()
    ),
}


def test_oracle_accepts_plain_torch() -> None:
    for dtype in DTYPES:
        check(plain, dtype=dtype)


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_oracle_rejects(mutant: str, dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="allowed"):
        check(MUTANTS[mutant], dtype=dtype)


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(backend: Backend, dtype: torch.dtype) -> None:
    """To the bit, but for the sums over rows, whose order is torch's in the reference."""
    for shape in SHAPES:
        inputs = [t.to(dtype).to(backend.device) for t in normal(2, *shape)]
        inputs.insert(1, normal(shape[-1]).to(backend.device))
        grad = normal(*shape).to(dtype).to(backend.device)
        ours = with_gradients(lambda *t: fused(*t, P, SEED), grad, *inputs)
        with pyfast.use_backend("reference"):
            expected = with_gradients(lambda *t: fused(*t, P, SEED), grad, *inputs)
        for i in (0, 1, 3):
            assert_bits_equal(ours[i], expected[i], f"{shape} output {i}:")


def test_gradients_of_many_rows(backend: Backend) -> None:
    """3000 rows are 94 chunks: their sums are as exact as torch's."""
    num_rows = 300 if backend.is_slow else 3000
    x, residual, grad = normal(3, num_rows, 37)
    inputs = (x, normal(37), residual)
    wide = [t.double() for t in inputs]
    exact = with_gradients(lambda *t: plain(*t, P, SEED), grad.double(), *wide)
    torchs = with_gradients(lambda *t: plain(*t, P, SEED), grad, *inputs)
    there = [t.to(backend.device) for t in inputs]
    ours = with_gradients(lambda *t: fused(*t, P, SEED), grad.to(backend.device), *there)
    for i in range(4):
        assert_as_accurate_as_torch(ours[i], torchs[i], exact[i], f"output {i}")


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large(backend: Backend, dtype: torch.dtype) -> None:
    """Above 32 MiB the outputs are written past the cache."""
    x = torch.randn(16388, 1024 if dtype == torch.bfloat16 else 512).to(dtype)
    bias = normal(x.shape[1])
    poison_recycled_blocks(x)
    ours = with_gradients(lambda *t: fused(*t, P, SEED), x, x, bias, x)
    with pyfast.use_backend("reference"):
        assert_bits_equal(ours[0], fused(x, bias, x, P, SEED))
    assert_bits_equal(ours[1], F.dropout(x, P, seed=SEED))
    # 513 chunks of 32 rows: sums of 545 roundings, eps / 2 each, of the sum of magnitudes.
    wide = F.dropout(x.double(), P, seed=SEED)
    assert ((ours[2] - wide.sum(0)).abs() <= 545 * 2**-24 * wide.abs().sum(0)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_dropout(backend: Backend, dtype: torch.dtype) -> None:
    """In eval mode, with p = 0 and with a p that rounds to it, and no seed is drawn."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not compute in {dtype}")
    x, residual = normal(2, 5, 37).to(dtype).to(backend.device)
    bias = normal(37).to(dtype).to(backend.device)
    compute = torch.promote_types(dtype, torch.float32)
    expected = residual.to(compute) + (x.to(compute) + bias.to(compute))
    before = torch.get_rng_state()
    for p, training in ((0.5, False), (1.0, False), (0.0, True), (1e-9, True)):
        y = F.bias_dropout_add(x, bias, residual, p, training)
        if is_truncated(backend, dtype):
            assert torch.allclose(y.float(), expected, rtol=2**-7)
        else:
            assert_bits_equal(y, expected.to(dtype))
    assert torch.equal(torch.get_rng_state(), before)


def test_drops_everything(backend: Backend) -> None:
    x, residual = normal(2, 5, 37).to(backend.device)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    bias = normal(37).to(backend.device)
    grad = torch.ones_like(x)
    y, grad_x, grad_bias, grad_residual = with_gradients(
        lambda *t: F.bias_dropout_add(*t, 1.0), grad, x, bias, residual
    )
    assert_bits_equal(y, residual)
    assert not grad_x.any() and not grad_bias.any() and (grad_residual == 1).all()


def test_extreme_values(backend: Backend) -> None:
    """NaN and Inf appear where they are kept, and only there."""
    x = extreme_values(37 * 40, torch.float32).view(40, 37).to(backend.device)
    residual = normal(40, 37).to(backend.device)
    y, grad_x, _ = with_gradients(lambda *t: fused(t[0], None, t[1], P, SEED), x, x, residual)
    mask = keep_mask((40, 37), P, SEED)
    value = torch.where(mask, x.cpu() * torch.tensor(drop_scale(P)), 0.0)
    assert_bits_equal(grad_x, value)
    assert_bits_equal(y, residual.cpu() + value)
