"""``norm(residual + dropout(x))``: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
from conftest import Backend
from oracle import assert_bits_equal, drop_scale, extreme_values, keep_mask, normal
from test_bias_dropout_add import (
    DTYPES,
    SEED,
    SHAPES,
    SLOW_SHAPES,
    P,
    column_sums,
    compare,
    ulps_of,
    with_gradients,
)
from torch import Tensor

import pyfast

F = pyfast.nn.functional
Function = Callable[..., Any]
# name: (options, which of residual, weight and bias are given, which of y and z has a gradient)
VARIANTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "layer": ({"norm": "layer"}, "rwb", "y"),
    "rms": ({"norm": "rms"}, "rw", "y"),
    "plain layer": ({"norm": "layer", "eps": 0.1}, "", "y"),
    "plain rms": ({"norm": "rms", "eps": 0.1}, "", "y"),
    "layer without bias": ({"norm": "layer", "prenorm": True}, "rw", "yz"),
    "rms with bias": ({"norm": "rms", "eps": 0.1, "prenorm": True}, "rwb", "yz"),
    "layer, y of two": ({"norm": "layer", "eps": 0.1, "prenorm": True}, "rwb", "y"),
    "layer, z of two": ({"norm": "layer", "prenorm": True}, "rwb", "z"),
    "rms, z of two": ({"norm": "rms", "prenorm": True}, "w", "z"),
}


def fused(*inputs: Tensor | None, **options: Any) -> Any:
    return F.dropout_add_norm(*inputs, P, seed=SEED, **options)


def mask_of(x: Tensor) -> Tensor:
    return keep_mask(tuple(x.shape), P, SEED)


def default_eps(dtype: torch.dtype, norm: str) -> float:
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps if norm == "rms" else 1e-5


def normalised(z: Tensor, norm: str, eps: float | None) -> Tensor:
    eps = default_eps(z.dtype, norm) if eps is None else eps
    if norm == "rms":
        return torch_functional.rms_norm(z, z.shape[-1:], None, eps)
    return torch_functional.layer_norm(z, z.shape[-1:], None, None, eps)


def plain(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str = "layer",
    prenorm: bool = False,
    eps: float | None = None,
    mask: Tensor | None = None,
    scale: float = drop_scale(P),
    normalise: Function = normalised,
) -> Any:
    """The unfused expression, with the mask as a tensor; exact in float64."""
    z = torch.where(mask_of(x) if mask is None else mask, x * scale, 0.0)
    z = z if residual is None else residual + z
    y = normalise(z, norm, eps)
    y = y if weight is None else y * weight
    y = (y if bias is None else y + bias).to(x.dtype)
    return (y, z) if prenorm else y


def given_operands(shape: tuple[int, ...], given: str, dtype: torch.dtype) -> list[Tensor | None]:
    """x, residual, weight and bias; the mean of x and residual is not zero."""
    x, residual = (normal(2, *shape) + 0.5).to(dtype)
    # In float32 with every second shape, whatever x is.
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = normal(2, shape[-1]).to(dtype if shape[-1] % 2 else wide)
    tensors = zip("rwb", (residual, weight, bias), strict=True)
    return [x, *(tensor if name in given else None for name, tensor in tensors)]


def check(
    function: Function,
    dtype: torch.dtype = torch.float32,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    ulps: float = 1.0,
    device: Any = "cpu",
    every: int = 1,
) -> None:
    """Asserts that a function and its gradients are right; one case of ``every``."""
    cases = [(shape, name) for shape in shapes for name in VARIANTS][::every]
    for shape, name in cases:
        options, given, wanted = VARIANTS[name]
        # Fixed: in float64 the default would be another one.
        fixed = {"eps": default_eps(dtype, options["norm"]), **options}
        grad_y, grad_z = normal(2, *shape).to(dtype)
        grads = [grad_y if "y" in wanted else None, grad_z if "z" in wanted else None]
        # Of one column, gradients are differences of grad_y * weight / sqrt(eps), and nearly zero.
        terms = 10 * fixed["eps"] ** -0.5 if shape[-1] == 1 else 0.0
        inputs, text = given_operands(shape, given, dtype), f"{shape} {dtype} {name}"
        pair = (partial(function, **options), partial(plain, **fixed))
        grads = tuple(grads[: 1 + ("prenorm" in options)])
        compare(*pair, grads, inputs, text, ulps, device, terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_torch(backend: Backend, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} does not compute in {dtype}")
    shapes, every = (SLOW_SHAPES, 5) if backend.is_slow else (SHAPES, 1)
    check(fused, dtype, shapes, ulps_of(backend, dtype), backend.device, every)


def centred(z: Tensor) -> Tensor:
    return z - z.mean(-1, keepdim=True)


def variance(z: Tensor) -> Tensor:
    return z.var(-1, correction=0, keepdim=True)


def norm_mutant(change: Callable[[Tensor, float], Tensor]) -> Function:
    """Another formula of LayerNorm, of z and eps."""

    def normalise(z: Tensor, norm: str, eps: float | None) -> Tensor:
        if norm == "rms":
            return normalised(z, norm, eps)
        return change(z, 1e-5 if eps is None else eps)

    return lambda *t, **options: plain(*t, **options, normalise=normalise)


def with_tail(tail: Function) -> Function:
    def mutant(*t: Any, **options: Any) -> Any:
        y = plain(*t, **options)
        first, *rest = y if isinstance(y, tuple) else (y,)
        whole = first.shape[-1] // 8 * 8
        first = torch.cat([first[..., :whole], tail(first[..., whole:])], -1)
        return (first, *rest) if rest else first

    return mutant


def without_last_chunk(x: Tensor, *t: Any, **options: Any) -> Any:
    """The right values, but the gradient of the weight misses the rows after a multiple of 32."""
    if t[1] is None:
        return plain(x, *t, **options)
    rows = t[1].expand(x.shape).reshape(-1, x.shape[-1])
    last = len(rows) // 32 * 32 or len(rows)
    rows = torch.cat([rows[:last], rows[last:].detach()]).view(x.shape)
    return plain(x, t[0], rows, t[2], **options)


MUTANTS: dict[str, Function] = {
    "no-op": lambda x, *t, norm, prenorm=False, eps=None: (x + 0, x + 0) if prenorm else x + 0,
    "no residual": lambda x, r, *t, **o: plain(x, None, *t, **o),
    "no weight": lambda x, r, w, b, **o: plain(x, r, None, b, **o),
    "no bias": lambda x, r, w, b, **o: plain(x, r, w, None, **o),
    "unscaled": lambda *t, **o: plain(*t, **o, scale=1.0),
    "shifted mask": lambda x, *t, **o: plain(x, *t, **o, mask=mask_of(x).roll(1)),
    "no dropout": lambda x, *t, **o: plain(x, *t, **o, scale=1.0, mask=torch.ones_like(x).bool()),
    "mean not subtracted": norm_mutant(lambda z, eps: normalised(z, "rms", eps)),
    "unbiased": norm_mutant(lambda z, eps: centred(z) * (z.var(-1, keepdim=True) + eps).rsqrt()),
    "eps outside of the root": norm_mutant(lambda z, eps: centred(z) / (variance(z).sqrt() + eps)),
    "no eps": norm_mutant(lambda z, eps: centred(z) * variance(z).rsqrt()),
    "constant rstd": norm_mutant(lambda z, eps: centred(z) * (variance(z.detach()) + eps).rsqrt()),
    "constant mean": norm_mutant(
        lambda z, eps: (centred(z.detach()) + z - z.detach()) * (variance(z) + eps).rsqrt()
    ),
    "tail of zeros": with_tail(torch.zeros_like),
    "tail never written": with_tail(lambda tail: tail * float("nan")),
    "weight gradient of all but the last chunk": without_last_chunk,
    "no gradient through z": lambda x, *t, prenorm=False, **o: (
        (plain(x, *t, **o), plain(x.detach(), *t, **o, prenorm=True)[1] + x - x.detach())
        if prenorm
        else plain(x, *t, **o)
    ),
}


def test_oracle_accepts_plain_torch() -> None:
    for dtype in DTYPES:
        check(plain, dtype, every=4)


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_oracle_rejects(mutant: str, dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="allowed"):
        check(MUTANTS[mutant], dtype, SHAPES[1:])  # of one column, some of them are NaN


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_eps_is_that_of_torch(dtype: torch.dtype, norm: str) -> None:
    x = (normal(4, 64) * 1e-4).to(dtype)  # so small that eps is what they are divided by
    expected = getattr(torch_functional, f"{norm}_norm")(x, (64,))
    y = F.dropout_add_norm(x, None, None, p=0.0, norm=norm)
    assert torch.allclose(y.float(), expected.float(), rtol=8 * torch.finfo(dtype).eps)


def test_extreme_values(backend: Backend) -> None:
    """What is dropped does not appear; what is kept spoils its own row alone."""
    x = extreme_values(37 * 40, torch.float32).view(40, 37).to(backend.device)
    x = x.where(x.abs() < 1e9, float("nan"))
    residual = normal(40, 37).to(backend.device)
    y, z = fused(x, residual, None, None, prenorm=True)
    expected = residual.cpu() + torch.where(mask_of(x), x.cpu() * torch.tensor(drop_scale(P)), 0.0)
    assert_bits_equal(z, expected)
    assert (y.cpu().isnan().any(-1) == expected.isnan().any(-1)).all()
    y, z = F.dropout_add_norm(x, residual, None, None, 1.0, prenorm=True)
    assert_bits_equal(z, residual)
    assert torch.allclose(y, torch_functional.layer_norm(residual, (37,)), rtol=1e-5, atol=1e-6)
    assert z.data_ptr() != residual.data_ptr()


def test_without_dropout(backend: Backend) -> None:
    """Eval mode, p = 0 and a p that rounds to it: no seed is drawn; the sum is a new tensor."""
    x, residual = normal(2, 5, 37).to(backend.device)
    before = torch.get_rng_state()
    for p, training in ((0.5, False), (0.0, True), (1e-9, True)):
        for added in (residual, None):
            y, z = F.dropout_add_norm(x, added, None, None, p, training, prenorm=True)
            assert_bits_equal(z, x if added is None else added + x)
            assert {y.data_ptr(), z.data_ptr()}.isdisjoint({x.data_ptr(), residual.data_ptr()})
            assert y.data_ptr() != z.data_ptr()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large(backend: Backend, dtype: torch.dtype) -> None:
    """Above 32 MiB the outputs are written past the cache: the bits are those of small pieces."""
    x = torch.randn(16388, 1024 if dtype == torch.bfloat16 else 512).to(dtype)
    vectors = normal(2, x.shape[1])
    y, z, grad_x, grad_residual, _, grad_bias = with_gradients(
        lambda *t: fused(*t, prenorm=True), (x, x), x, x, *vectors
    )
    dropped = F.dropout(x.float(), P, seed=SEED)  # test_dropout.py proves it
    assert_bits_equal(z, (x.float() + dropped).to(dtype))
    parts = [
        with_gradients(
            lambda *t: F.dropout_add_norm(*t, 0.0, prenorm=True), (x[i], x[i]), z[i], None, *vectors
        )
        for i in (slice(0, 8192), slice(8192, None))
    ]
    assert_bits_equal(y, torch.cat([part[0] for part in parts]))
    assert_bits_equal(grad_residual, torch.cat([part[2] for part in parts]))
    assert_bits_equal(grad_bias, column_sums(x.float()))
    if dtype == torch.float32:
        assert_bits_equal(grad_x, F.dropout(grad_residual, P, seed=SEED))


def test_saves_the_sum_and_two_numbers_a_row(backend: Backend) -> None:
    saved: list[Tensor] = []
    x = normal(4, 9).to(backend.device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, z = fused(x, x, x[0], x[0], prenorm=True)
    shapes = sorted(tuple(t.shape) for t in saved)
    assert shapes == [(4,), (4,), (4, 9), (9,)]  # mean, rstd, z, weight
    assert any(t.data_ptr() == z.data_ptr() for t in saved)
