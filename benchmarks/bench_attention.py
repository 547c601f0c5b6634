"""Attention against torch's: full, causal, with dropout, with a mask that needs a gradient, in a
window, a decoder's step over the caches of several layers, more than a processor caches, and the
training step of an encoder layer. The row ``matmul`` is torch's product of two square matrices with
as many operations: a yardstick, which attention in float32 passes, not the machine's ceiling."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pyfast.kernels.dropout.dropout_reference import attention_mask_reference
from torch import Tensor

import pyfast
import pyfast.nn.functional as pyfast_F

from .cases import (
    SEED,
    Call,
    Case,
    Computation,
    drop_rate,
    normal,
    parametrize,
    run_with_pytest,
)

if TYPE_CHECKING:
    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture

SHAPES = (  # (batch, heads, length, head size)
    (8, 12, 128, 64),
    (4, 12, 512, 64),
    (1, 12, 1024, 64),
    (1, 12, 4096, 64),
    (1, 16, 2048, 128),
)
CHECK_SHAPE = (1, 3, 300, 64)
FAST_DTYPES = (torch.float32, torch.bfloat16)
WINDOW = 256
DECODE_KEYS = 4096
DECODE_LAYERS = {32: 4, 8: 16}  # by key heads: as many bytes
LAYER_SHAPE = (4, 512, 768)


def _heads(shape: tuple[int, ...], seed: int) -> Tensor:
    """(B, H, L, E) as a projection gives it: the heads of a token side by side."""
    batch, heads, length, size = shape
    return normal((batch, length, heads, size), seed).transpose(1, 2)


def _inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: _heads(shape, seed) for seed, name in enumerate(("query", "key", "value"))}


def _masked_inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {**_inputs(shape), "mask": normal((shape[2], shape[2]), 3)}


@functools.lru_cache(maxsize=1)
def _decode_inputs(key_heads: int, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The same tensors for every row: how fast memory is read depends on its pages."""
    batch, heads, _, size = shape
    cache = (DECODE_LAYERS[key_heads], batch, math.gcd(key_heads, heads), DECODE_KEYS, size)
    shapes = {"query": shape, "key": cache, "value": cache}
    return {name: normal(shapes[name], seed).to(dtype) for seed, name in enumerate(shapes)}


@functools.lru_cache(maxsize=4)
def _window_mask(length: int) -> Tensor:
    """bool (L, L): what torch needs in place of a window."""
    i = torch.arange(length)
    return (i[:, None] - i).abs() <= WINDOW


def _formula(
    keep: Tensor,
    p: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    window: bool = False,
) -> Tensor:
    """Attention as it is written; ``keep`` is not used, attention has a map of its own."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores + mask
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if is_causal:
        visible = visible.tril()
    if window:
        visible = _window_mask(query.shape[2])
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    if p > 0:
        kept = attention_mask_reference(weights.shape, SEED, round(p * 65536), query.device)
        weights = torch.where(kept, weights / (1 - drop_rate(p)), 0)
    return weights @ value


def _each_layer(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One query over the caches of all layers."""

    def call(query: Tensor, keys: Tensor, values: Tensor, p: float, **options: Any) -> Tensor:
        pairs = zip(keys, values, strict=True)
        return torch.stack([attend(query, k, v, dropout_p=p, **options) for k, v in pairs])

    return call


def _decode_computation(key_heads: int, dtype: torch.dtype) -> Computation:
    def formula(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        return _formula(query, dropout_p, query, key, value)

    return Computation(
        functools.partial(_decode_inputs, key_heads, dtype),
        functools.partial(_each_layer(F.scaled_dot_product_attention), enable_gqa=True),
        functools.partial(_each_layer(pyfast_F.scaled_dot_product_attention), enable_gqa=True),
        lambda keep, p, q, k, v: _each_layer(formula)(q, k, v, p),
        mask_ndim=0,
    )


def _computation(kind: str, is_causal: bool = False) -> Computation:
    if kind == "window":
        return Computation(
            _inputs,
            lambda q, k, v, p: F.scaled_dot_product_attention(
                q, k, v, _window_mask(q.shape[2]), dropout_p=p
            ),
            lambda q, k, v, p, **options: pyfast_F.scaled_dot_product_attention(
                q, k, v, dropout_p=p, window=(WINDOW, WINDOW), **options
            ),
            functools.partial(_formula, window=True),
            mask_ndim=0,
        )
    options: dict[str, Any] = {"is_causal": is_causal}

    def torch_call(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, p: float
    ) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, **options)

    def pyfast_call(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, p: float, **more: Any
    ) -> Any:
        return pyfast_F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, **options, **more)

    inputs = _masked_inputs if kind == "mask" else _inputs
    formula = functools.partial(_formula, is_causal=is_causal)
    return Computation(inputs, torch_call, pyfast_call, formula, mask_ndim=0)


@functools.cache
def _layer(module: Any, size: int, p: float) -> torch.nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        layer: torch.nn.Module = module.TransformerEncoderLayer(
            size, math.gcd(12, size), 4 * size, p, batch_first=True
        )
    return layer


def _layer_inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    parameters = _layer(torch.nn, shape[-1], 0.0).named_parameters()
    return {"x": normal(shape, 0), **{name: value.detach() for name, value in parameters}}


def _layer_call(module: Any) -> Callable[..., Tensor]:
    """A training step with respect to x and all parameters. A layer draws its own seeds: what the
    check calls, with a seed, is the layer without dropout."""

    def call(x: Tensor, *parameters: Tensor, p: float, seed: int | None = None) -> Tensor:
        layer = _layer(module, x.shape[-1], p if seed is None else 0.0)
        names = (name for name, _ in layer.named_parameters())
        values = dict(zip(names, parameters, strict=True))
        y: Tensor = torch.func.functional_call(layer, values, x)
        return y

    return call


def _layer_flops(shape: tuple[int, ...]) -> int:
    batch, length, size = shape
    return 72 * batch * length * size**2 + _flops(1.0, True, (batch, 1, length, size))


def _layer_case(dtype: torch.dtype) -> Case:
    torch_layer = _layer_call(torch.nn)
    return Case(
        op="attention",
        name="training step of TransformerEncoderLayer(768, 12, 3072, 0.1)",
        shape=LAYER_SHAPE,
        dtype=dtype,
        computation=Computation(
            _layer_inputs,
            torch_layer,
            _layer_call(pyfast.nn),
            lambda keep, p, x, *parameters: torch_layer(x, *parameters, p=p, seed=SEED),
            mask_ndim=0,
        ),
        num_passes=4,
        backward=True,
        flops=_layer_flops,
        check_shape=(2, 40, 60),
        compiles=False,
        others={"matmul": functools.partial(_matmul, _layer_flops(LAYER_SHAPE))},
    )


def _flops(visible: float, backward: bool, shape: tuple[int, ...]) -> int:
    """Two products forward, five backward; ``visible`` is the share of the scores."""
    batch, heads, length, size = shape
    return int((14 if backward else 4) * batch * heads * length**2 * size * visible)


def _matmul(flops: int, x: Tensor) -> Call:
    """A square product of as many operations in the dtype of x."""
    n = max(1, round((flops / 2) ** (1 / 3)))
    a, b = (torch.randn(n, n).to(x.dtype) for _ in range(2))
    return functools.partial(torch.mm, a, b)


def _case(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, backward: bool, is_causal: bool = False
) -> Case:
    words = [kind] * (kind != "full") + ["causal"] * is_causal
    passes = "forward+backward" if backward else "forward"
    visible = 0.5 if is_causal else 1.0
    if kind == "window":
        visible = (2 * WINDOW + 1) / shape[2]
    flops = functools.partial(_flops, visible, backward)
    return Case(
        op="attention",
        name=" ".join((*words, passes)),
        shape=shape,
        dtype=dtype,
        computation=_computation(kind, is_causal),
        num_passes=12 if backward else 4,
        backward=backward,
        p=0.1 if kind == "dropout" else 0.0,
        flops=flops,
        check_shape=CHECK_SHAPE if kind != "window" else (1, 2, 700, 64),
        compiles=False,
        others={"matmul": functools.partial(_matmul, flops(shape))},
    )


def _decode_matmul(key_heads: int, query: Tensor) -> Call:
    """The best formulation in torch: two products and a softmax."""
    _, keys, values = _decode_inputs(key_heads, query.dtype, tuple(query.shape)).values()
    grouped = query.view(query.shape[0], keys.shape[2], -1, query.shape[-1])
    scale = 1 / math.sqrt(query.shape[-1])

    def attend(key: Tensor, value: Tensor) -> Tensor:
        return ((grouped @ key.transpose(-1, -2)) * scale).softmax(-1) @ value

    return lambda: torch.stack([attend(k, v) for k, v in zip(keys, values, strict=True)])


def _decode_read(key_heads: int, query: Tensor) -> Call:
    """A sum over as many bytes as keys and values have."""
    _, *caches = _decode_inputs(key_heads, query.dtype, tuple(query.shape)).values()
    flat = [t.view(-1).view(torch.float32) for t in caches]
    return lambda: [t.sum() for t in flat]


def _decode_case(key_heads: int, dtype: torch.dtype) -> Case:
    layers = DECODE_LAYERS[key_heads]
    return Case(
        op="attention",
        name=f"decode, {DECODE_KEYS} keys, {key_heads} key heads, {layers} layers",
        shape=(1, 32, 1, 128),
        dtype=dtype,
        computation=_decode_computation(key_heads, dtype),
        num_passes=2 * layers * DECODE_KEYS * key_heads // 32,
        p=0.0,
        compiles=False,
        others={
            "matmul": functools.partial(_decode_matmul, key_heads),
            "read": functools.partial(_decode_read, key_heads),
        },
    )


CASES = [
    *(
        _case("full", shape, dtype, backward, is_causal)
        for dtype in FAST_DTYPES
        for backward in (False, True)
        for is_causal in (False, True)
        for shape in SHAPES
    ),
    *(_case("full", shape, torch.float16, True) for shape in SHAPES[:3]),
    *(_case("dropout", shape, dtype, True) for dtype in FAST_DTYPES for shape in SHAPES),
    *(_case("mask", shape, torch.float32, True) for shape in SHAPES),
    *(_case("window", SHAPES[3], dtype, True) for dtype in FAST_DTYPES),
    *(_decode_case(key_heads, dtype) for key_heads in (32, 8) for dtype in FAST_DTYPES),
    *(_layer_case(dtype) for dtype in FAST_DTYPES),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, CASES)


def test_attention(benchmark: BenchmarkFixture, case: Case, implementation: str) -> None:
    run_with_pytest(benchmark, case, implementation)
