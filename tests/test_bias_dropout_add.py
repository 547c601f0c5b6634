"""``residual + dropout(x + bias)``: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend
from oracle import (
    assert_bits_equal,
    drop_scale,
    extreme_values,
    keep_mask,
    nan_memory,
    normal,
    poison_recycled_blocks,
)
from torch import Tensor

import pyfast

F = pyfast.nn.functional
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SLOW_SHAPES = ((1, 1), (3, 7), (2, 5, 33), (33, 64), (40, 256), (35, 300), (4, 768), (5, 1000))
SHAPES = (*SLOW_SHAPES, (3, 2500), (2, 4500), (300, 5))  # slow: where elements are interpreted
P, SEED = 0.3, 0xFEDCBA9876543210
Function = Callable[..., Any]


def fused(x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return F.bias_dropout_add(x, bias, residual, P, seed=SEED)


def plain(
    x: Tensor, bias: Tensor | None, residual: Tensor, p: float = P, seed: int = SEED
) -> Tensor:
    """The unfused expression: what is replaced, with the mask as a tensor; exact in float64."""
    mask = keep_mask(tuple(x.shape), p, seed)
    value = x if bias is None else x + bias
    return (residual + torch.where(mask, value * drop_scale(p), 0.0)).to(residual.dtype)


def with_gradients(
    function: Function, grads: Tensor | tuple[Tensor | None, ...], *inputs: Tensor | None
) -> list[Tensor]:
    """The results of a function and its gradients for given ones of its results, on the CPU."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in inputs]
    results = function(*leaves)
    if isinstance(results, Tensor):
        results = (results,)
    pairs = zip(results, (grads,) if isinstance(grads, Tensor) else grads, strict=True)
    used = [(result, grad) for result, grad in pairs if grad is not None]
    torch.autograd.backward(*map(list, zip(*used, strict=True)))
    gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves if t is not None]
    return [t.detach().cpu() for t in (*results, *gradients)]


def assert_all_equal(actual: list[Tensor], expected: list[Tensor], message: str = "") -> None:
    for i, tensors in enumerate(zip(actual, expected, strict=True)):
        assert_bits_equal(*tensors, f"{message} output {i}:")


def assert_as_accurate_as_torch(
    actual: Tensor, torchs: Tensor, exact: Tensor, message: str, ulps: float, terms: float
) -> None:
    """No error above twice that of the unfused torch expression in the same dtype, plus ``ulps``.

    One rounding of a result is half an ulp of it, that is eps / 2 of the largest one at most. As
    much again is for what was rounded before in the type that is computed in, where torch is exact
    by luck (one element). Twice torch's error is the criterion of flash-attention 3. ``terms`` is
    the size of what the result is a difference of, where that is far larger than the result.
    In float64 torch's values are the exact ones, and thousands of terms round in another order.
    """
    assert actual.dtype == torchs.dtype and actual.shape == exact.shape, f"{message}: not allowed"
    finfo = torch.finfo(actual.dtype)
    ulps = 64.0 if actual.dtype == torch.float64 else ulps
    error = (actual.double() - exact).abs().max()
    of_torch = (torchs.double() - exact).abs().max()
    allowed = 2 * of_torch + ulps * finfo.eps * exact.abs().max().clamp(min=terms) + finfo.tiny
    assert error <= allowed, f"{message}: error {error:.3g}, allowed {allowed:.3g}"


def compare(
    function: Function,
    unfused: Function,
    grads: tuple[Tensor | None, ...],
    inputs: list[Tensor | None],
    message: str,
    ulps: float = 1.0,
    device: Any = "cpu",
    terms: float = 0.0,
) -> None:
    """Asserts that results and gradients of a function are as accurate as those of ``unfused``."""

    def moved(tensors: Any, change: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, ...]:
        return tuple(t if t is None else change(t) for t in tensors)

    exact = with_gradients(unfused, moved(grads, Tensor.double), *moved(inputs, Tensor.double))
    torchs = with_gradients(unfused, grads, *inputs)
    to_device = lambda t: t.to(device)  # noqa: E731
    with nan_memory():
        actual = with_gradients(function, moved(grads, to_device), *moved(inputs, to_device))
    for i, (a, t, e) in enumerate(zip(actual, torchs, exact, strict=True)):
        assert_as_accurate_as_torch(a, t, e, f"{message}, output {i}", ulps, terms)


def check(
    function: Function,
    dtype: torch.dtype = torch.float32,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    ulps: float = 1.0,
    device: torch.device | str = "cpu",
) -> None:
    """Asserts that ``function(x, bias, residual)`` and its gradients are right."""
    for shape in shapes:
        for bias_dtype in (None, dtype, torch.float32):
            x, residual, grad = normal(3, *shape).to(dtype)
            bias = None if bias_dtype is None else normal(shape[-1]).to(bias_dtype)
            text = f"{shape} {dtype}, bias {bias_dtype}"
            compare(function, plain, (grad,), [x, bias, residual], text, ulps, device)


def ulps_of(backend: Backend, dtype: torch.dtype) -> float:
    """Triton's interpreter truncates float32 to bfloat16: half an ulp more for every rounding."""
    truncates = backend.name == "triton" and backend.is_slow and dtype == torch.bfloat16
    return 2.0 if truncates else 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_torch(backend: Backend, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not compute in {dtype}")
    shapes = SLOW_SHAPES if backend.is_slow else SHAPES
    check(fused, dtype, shapes, ulps_of(backend, dtype), backend.device)


def with_mask(change: Callable[[Tensor], Tensor]) -> Function:
    def mutant(x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        value = (x if bias is None else x + bias) * drop_scale(P)
        mask = change(keep_mask(tuple(x.shape), P, SEED))
        return (residual + torch.where(mask, value, 0.0)).to(residual.dtype)

    return mutant


def with_tail_of(x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    whole = x.shape[-1] // 8 * 8
    return torch.cat([plain(x, bias, residual)[..., :whole], residual[..., whole:]], -1)


def without_last_chunk(x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """The right values, but the gradient of the bias misses the rows after a multiple of 32."""
    if bias is None:
        return plain(x, bias, residual)
    rows = bias.expand(x.shape).reshape(-1, x.shape[-1])
    last = len(rows) // 32 * 32 or len(rows)
    return plain(x, torch.cat([rows[:last], rows[last:].detach()]).view(x.shape), residual)


MUTANTS: dict[str, Function] = {
    "no-op": lambda x, b, r: r + x,
    "no bias": lambda x, b, r: plain(x, None, r),
    "no residual": lambda x, b, r: plain(x, b, r * 0),
    "bias after dropout": lambda x, b, r: plain(x, None, r if b is None else r + b).to(r.dtype),
    "unscaled": lambda x, b, r: r + (plain(x, b, r) - r) / drop_scale(P),
    "another p": lambda x, b, r: plain(x, b, r, P + 2**-6),
    "residual dropped too": lambda x, b, r: plain(x + r, b, r * 0),
    "low half of the seed": lambda x, b, r: plain(x, b, r, P, SEED & 0xFFFFFFFF),
    "shifted mask": with_mask(lambda mask: mask.roll(1)),
    "inverted mask": with_mask(lambda mask: ~mask),
    "mask of one row": with_mask(lambda mask: mask[:1].expand(mask.shape)),
    "tail of the residual": with_tail_of,
    "tail never written": lambda x, b, r: with_tail_of(x, b, r * float("nan")),
    "bias gradient of all but the last chunk": without_last_chunk,
    "gradient without mask": lambda x, b, r: plain(x.detach(), b, r) + x - x.detach(),
}


def test_oracle_accepts_plain_torch() -> None:
    check(plain)
    check(plain, torch.bfloat16)


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_oracle_rejects(mutant: str, dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="allowed"):
        check(MUTANTS[mutant], dtype)


def column_sums(value: Tensor) -> Tensor:
    """Over the rows as the kernels add them: 32 rows in order, then these sums in double."""
    num_chunks = (len(value) + 31) // 32
    rows = value.new_zeros(num_chunks * 32, value.shape[1])
    rows[: len(value)] = value
    sums = rows.new_zeros(num_chunks, value.shape[1])
    for row in rows.view(num_chunks, 32, -1).unbind(1):
        sums += row
    return sum(sums.double()).to(value.dtype)  # Python's sum: one chunk after the other


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(backend: Backend, dtype: torch.dtype) -> None:
    """To the bit; the sums over rows in the order that the kernels promise."""
    for shape in ((1, 1), (2, 5, 33), (40, 256), (35, 300), (5, 1000), (300, 37)):
        x, residual, grad = normal(3, *shape).to(dtype).to(backend.device)
        inputs = (x, normal(shape[-1]).to(backend.device), residual)
        ours = with_gradients(fused, grad, *inputs)
        with pyfast.use_backend("reference"):
            expected = with_gradients(fused, grad, *inputs)
            value = F.dropout(grad.to(torch.promote_types(dtype, torch.float32)), P, seed=SEED)
        expected[2] = column_sums(value.view(-1, shape[-1]).cpu()).float()
        assert_all_equal(ours, expected, f"{shape}")


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large(backend: Backend, dtype: torch.dtype) -> None:
    """Above 32 MiB the outputs are written past the cache."""
    x = torch.randn(16388, 1024 if dtype == torch.bfloat16 else 512).to(dtype)
    bias = normal(x.shape[1])
    poison_recycled_blocks(x)
    drop = lambda t: F.dropout(t, P, seed=SEED)  # noqa: E731 (test_dropout.py proves it)
    expected = [(x.float() + drop(x.float() + bias)).to(dtype), drop(x)]
    expected += [column_sums(drop(x.float())), x]
    assert_all_equal(with_gradients(fused, x, x, bias, x), expected)


def test_extreme_probabilities(backend: Backend) -> None:
    """Nothing dropped, or everything, and then no seed is drawn for nothing."""
    x, residual = normal(2, 5, 37).to(backend.device)
    bias = normal(37).to(backend.device)
    before = torch.get_rng_state()
    for p, training in ((0.5, False), (1.0, False), (0.0, True), (1e-9, True)):
        y = F.bias_dropout_add(x, bias, residual, p, training)
        assert_bits_equal(y, residual + (x + bias))
        assert y.data_ptr() not in (x.data_ptr(), residual.data_ptr())
    assert torch.equal(torch.get_rng_state(), before)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    function = lambda *t: F.bias_dropout_add(*t, 1.0)  # noqa: E731
    y, grad_x, grad_bias, grad_residual = with_gradients(function, residual, x, bias, residual)
    assert_all_equal([y, grad_residual], [residual, residual])
    assert not grad_x.any() and not grad_bias.any()


def test_extreme_values(backend: Backend) -> None:
    """NaN and Inf appear where they are kept, and only there."""
    x = extreme_values(37 * 40, torch.float32).view(40, 37).to(backend.device)
    residual = normal(40, 37).to(backend.device)
    y, grad_x, _ = with_gradients(lambda x, r: fused(x, None, r), x, x, residual)
    mask = keep_mask((40, 37), P, SEED)
    value = torch.where(mask, x.cpu() * torch.tensor(drop_scale(P)), 0.0)
    assert_bits_equal(grad_x, value)
    assert_bits_equal(y, residual.cpu() + value)


@pytest.mark.parametrize("seed", [SEED, torch.tensor(5)], ids=["int", "tensor"])
def test_saves_only_the_seed(backend: Backend, seed: int | Tensor) -> None:
    saved: list[Tensor] = []
    x = normal(4, 9).to(backend.device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.bias_dropout_add(x, x[0], x, P, seed=seed)
    assert [t.numel() for t in saved] == ([] if isinstance(seed, int) else [1])
