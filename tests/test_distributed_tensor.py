"""pyfast's ops on DTensors in two processes: results, gradients and masks of the whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_processes import in_two_processes, mesh, needs_processes, seeded_randn, whole
from torch import Tensor

import pyfast.nn.functional as F
from pyfast.ops._op import registered

pytestmark = needs_processes

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    from pyfast.distributed import _sharding, register_sharding_rules
    from pyfast.distributed._rules import RULES, WITHOUT_RULE

    WHOLE = Replicate()

SEED = 11
Function = Callable[..., Any]
Case = tuple[str, Function, Sequence[Any], Sequence[Sequence[Any]]]  # tensors, ways to cut them


def randn(*shape: int) -> Tensor:
    return seeded_randn(sum(shape) + len(shape), *shape)


def int8(*shape: int) -> Tensor:
    return (randn(*shape) * 40).round().clamp(-127, 127).to(torch.int8)


def outputs_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def assert_close(actual: Any, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        whole(actual), expected.detach(), rtol=1e-5, atol=1e-5, msg=lambda m: f"{what}: {m}"
    )


def compare(
    name: str, function: Function, tensors: Sequence[Any], places: Sequence[Any], where: Any = None
) -> list[Any]:
    """The function on whole tensors and on shards: the same results and gradients."""
    where = mesh() if where is None else where
    leaves = [None if t is None else t.clone() for t in tensors]
    shards = [
        None
        if t is None
        else distribute_tensor(t, where, [place] if not isinstance(place, list) else place)
        for t, place in zip(tensors, places, strict=True)
    ]
    for t in (*leaves, *shards):
        if t is not None and t.is_floating_point():
            t.requires_grad_()
    expected, actual = outputs_of(function(*leaves)), outputs_of(function(*shards))
    what = f"{name} {places}"
    losses = [torch.zeros(()), torch.zeros(())]
    for a, e in zip(actual, expected, strict=True):
        assert isinstance(a, DTensor), what
        assert_close(a, e, what)
        if e.requires_grad:
            weights = randn(*e.shape)
            losses[0] = losses[0] + (e * weights).sum()
            all_whole = [WHOLE] * where.ndim
            losses[1] = losses[1] + (a * distribute_tensor(weights, where, all_whole)).sum()
    if losses[0].requires_grad:
        losses[0].backward()
        losses[1].backward()
        for i, (leaf, shard) in enumerate(zip(leaves, shards, strict=True)):
            if leaf is not None and leaf.grad is not None:
                assert_close(shard.grad, leaf.grad, f"{what}: gradient {i}")
    return actual


def element_cases() -> Iterator[Case]:
    first, second, last = Shard(0), Shard(1), Shard(2)
    x, residual, bias = randn(5, 4, 6), randn(5, 4, 6) + 1, randn(6)
    anyhow = [[place] for place in (WHOLE, first, second, last)]
    yield "dropout", lambda x: F.dropout(x, 0.5, seed=SEED), [x], anyhow
    yield "dropout2d", lambda x: F.dropout2d(x, 0.5, seed=SEED), [randn(4, 3, 2, 5)], anyhow
    yield "alpha_dropout", lambda x: F.alpha_dropout(x, 0.5, True, seed=SEED), [x], anyhow
    rows = [[place, WHOLE, place] for place in (first, second, last)]
    for p, ways in ((0.0, rows[2:]), (0.5, [*rows, [first, Shard(0), WHOLE]])):

        def add(x: Tensor, bias: Tensor | None, residual: Tensor, p: float = p) -> Tensor:
            return F.bias_dropout_add(x, bias, residual, p, seed=SEED)

        yield "bias_dropout_add", add, [x, bias, residual], ways
    yield "bias_dropout_add", add, [x, None, residual], rows[:1]
    for norm, shape in (("layer", (5, 6)), ("layer", (5, 3, 6)), ("rms", (4, 3, 6))):

        def add_norm(*operands: Tensor, norm: str = norm) -> Any:
            return F.dropout_add_norm(*operands, 0.5, norm=norm, prenorm=True, seed=SEED)

        operands = [randn(*shape), randn(*shape) + 1, randn(6), randn(6)]
        ways = [[place, place, WHOLE, WHOLE] for place in (first, second)[: len(shape) - 1]]
        yield f"dropout_add_norm {norm}", add_norm, operands, ways


def linear_cases() -> Iterator[Case]:
    first, last = Shard(0), Shard(2)
    x, weight = randn(4, 2, 6), randn(4, 6)
    ways = [
        [first, WHOLE, WHOLE],
        [WHOLE, Shard(0), Shard(0)],
        [last, Shard(1), WHOLE],
    ]

    def connect(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.dropconnect_linear(x, weight, bias, 0.5, seed=SEED)

    yield "dropconnect_linear", connect, [x, weight, randn(4)], ways
    yield "dropconnect_linear", connect, [x, weight, None], ways[-1:]
    weight, scale = int8(4, 6), randn(4).abs() + 0.1
    for weight_only in (False, True):

        def product(*operands: Any, weight_only: bool = weight_only) -> Tensor:
            with torch.no_grad():
                return F.int8_linear(*operands, weight_only=weight_only)

        ways = [
            [first, WHOLE, WHOLE, WHOLE],
            [WHOLE, Shard(0), Shard(0), Shard(0)],
            [last, Shard(1), WHOLE, WHOLE],
        ]
        yield "int8_linear", product, [x, weight, scale, randn(4)], ways
        yield "int8_linear", product, [x, weight, scale, None], ways[-1:]

    def rounded(*operands: Any) -> Tensor:  # the same tensors, another dtype
        return F.int8_linear(*operands, dtype=torch.bfloat16)

    yield "int8_linear", rounded, [x, weight, scale, None], ways[:1]
    parts = [[Shard(0), WHOLE], [WHOLE, Shard(1)], [Shard(1), Shard(0)], [WHOLE, WHOLE]]
    yield "int8_mm", F.int8_mm, [int8(5, 6), int8(6, 4)], parts
    yield "quantize_int8", F.quantize_int8, [x], [[WHOLE], [first], [last]]

    def in_blocks(x: Tensor) -> Any:
        return F.quantize_int8(x, granularity="block", block_size=4, symmetric=False)

    yield "quantize_int8", in_blocks, [x], [[first]]

    def norm_and_quantize(x: Tensor, residual: Tensor) -> Any:
        with torch.no_grad():
            return F.dropout_add_norm(x, residual, None, p=0.5, quantize=True, seed=SEED)

    yield "dropout_add_norm_int8", norm_and_quantize, [x, x], [[first, first], [WHOLE, first]]


def attention_cases() -> Iterator[Case]:
    batch, heads, tokens = Shard(0), Shard(1), Shard(2)
    kinds: tuple[dict[str, Any], ...] = (
        {"dropout_p": 0.5, "is_causal": True},
        {"mask": (1, 1, 5, 7), "slopes": (3, 4), "sinks": True},
        {"dropout_p": 0.5, "mask": (3, 4, 5, 7), "slopes": (4,)},
        {"dropout_p": 0.25, "mask": (3, 1, 1, 7)},
    )
    for num_heads, key_heads in ((4, 4), (4, 2), (3, 3)):
        q = randn(3, num_heads, 5, 4)
        k, v = randn(3, key_heads, 7, 4), randn(3, key_heads, 7, 2)
        for extras in kinds if (num_heads, key_heads) == (4, 4) else kinds[:1]:
            options = dict(extras)
            shapes = options.pop("mask", None), options.pop("slopes", None)
            mask, slopes = (None if shape is None else randn(*shape) for shape in shapes)
            sinks = randn(num_heads) if options.pop("sinks", False) else None

            def attend(*tensors: Any, options: dict[str, Any] = options) -> Any:
                *qkv, mask, slopes, sinks = tensors
                options = {**options, "alibi_slopes": slopes, "sinks": sinks, "seed": SEED}
                return F.scaled_dot_product_attention(
                    *qkv, mask, enable_gqa=True, return_lse=True, **options
                )

            ways = [[place] * 3 + [WHOLE] * 3 for place in (batch, heads, tokens)]
            if not options.get("is_causal"):
                ways = ways[:2]
            yield "attention", attend, [q, k, v, mask, slopes, sinks], ways
    ends = torch.tensor([0, 4, 10])

    def packed(*qkv: Any) -> Any:
        seqlens = ends
        if isinstance(qkv[0], DTensor):
            seqlens = distribute_tensor(ends, mesh(), [WHOLE])
        return F.varlen_attention(*qkv, seqlens, seqlens, 6, 6, dropout_p=0.5, seed=SEED)

    yield (
        "varlen_attention",
        packed,
        [randn(10, 4, 4), randn(10, 4, 4), randn(10, 4, 4)],
        [[heads] * 3],
    )

    def with_cache(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        with torch.no_grad():
            seed = torch.tensor(0, device="cpu")
            rule = (None, None, seed, 0.5, 0.0, -1, 0)
            return torch.ops.pyfast.attention_with_kv_cache(q, k, v, None, None, lengths, *rule)

    lengths = torch.tensor([7, 3, 5])
    cache = [randn(3, 4, 1, 4), randn(3, 2, 7, 4), randn(3, 2, 7, 2), lengths]
    yield "attention_with_kv_cache", with_cache, cache, [[batch] * 4, [heads] * 3 + [WHOLE]]
    for average in (False, True):

        def weights(q: Tensor, k: Tensor, lse: Tensor, average: bool = average) -> Tensor:
            rule = (torch.tensor(SEED, device="cpu"), 32768, 0.5, average, torch.float32)
            result: Tensor = torch.ops.pyfast.attention_weights(q, k, None, lse, *rule)
            return result

        operands = [randn(3, 4, 5, 4), randn(3, 4, 7, 4), randn(3, 4, 5) + 3]
        yield "attention_weights", weights, operands, [[batch] * 3, [heads] * 3]


def check_meshes_of_two_dimensions() -> None:
    q, x = randn(4, 4, 3, 4), randn(4, 3, 6)

    def attend(q: Tensor) -> Any:
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5, seed=SEED)

    for shape in ((1, 2), (2, 1)):
        compare("attention", attend, [q], [[Shard(0), Shard(1)]], mesh(*shape))
        for places in ([Shard(0), Shard(0)], [Shard(1), Shard(2)], [WHOLE, Shard(0)]):
            compare("dropout", lambda x: F.dropout(x, 0.5, seed=SEED), [x], [places], mesh(*shape))


def check_that_nothing_moves() -> None:
    """Operands that are cut as a rule has it are used as they are."""
    from torch.distributed.tensor.debug import CommDebugMode

    def cut(tensor: Tensor, dim: int) -> Any:
        return distribute_tensor(tensor, mesh(), [Shard(dim)])

    x, q, vector = cut(randn(4, 3, 6), 0), cut(randn(2, 4, 3, 4), 1), randn(6)
    same = distribute_tensor(vector, mesh(), [WHOLE])
    weight, scale = int8(4, 6), randn(4).abs()
    whole_x = distribute_tensor(randn(5, 6), mesh(), [WHOLE])
    for tensor in (x, q):
        tensor.requires_grad_()
    with CommDebugMode() as moved:
        results = [
            (F.dropout(x), Shard(0)),
            (F.bias_dropout_add(x, same, x), Shard(0)),
            (F.dropout_add_norm(x, x, same, same), Shard(0)),
            (F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), Shard(1)),
        ]
        sum(result.sum() for result, _ in results).backward()
        results += [
            (F.int8_linear(whole_x, cut(weight, 0), cut(scale, 0)), Shard(1)),
            (F.quantize_int8(x)[0], Shard(0)),
        ]
    assert moved.get_total_counts() <= len(results)  # the sums are added up
    for result, place in results:
        assert result.placements == (place,)
    assert x.grad.placements == (Shard(0),) and q.grad.placements == (Shard(1),)


def check_that_local_masks_show() -> None:
    """The comparison rejects ranks that number their shards from zero."""

    def add_norm(x: Tensor) -> Any:
        return F.dropout_add_norm(x, x, None, p=0.5, prenorm=True, seed=SEED)

    def attend(q: Tensor) -> Any:
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5, seed=SEED)

    kept = _sharding._with_numbers
    _sharding._with_numbers = lambda seed, numbers: seed
    try:
        for function, shape in (
            (lambda x: F.dropout(x, 0.5, seed=SEED), (4, 6)),
            (add_norm, (4, 6)),
            (attend, (2, 4, 3, 4)),
        ):
            with pytest.raises(AssertionError, match="Mismatched elements"):
                compare("a mutant", function, [randn(*shape)], [Shard(0)])
    finally:
        _sharding._with_numbers = kept


def check_seeds() -> None:
    """A draw on each rank: the mask of one process after the same ``manual_seed``."""
    x = randn(6, 4)
    torch.manual_seed(1)
    expected = [F.dropout(x), F.dropout(x)]
    torch.manual_seed(1)
    shard = distribute_tensor(x, mesh(), [Shard(0)])
    for e in expected:
        assert torch.equal(whole(F.dropout(shard)), e)
    seed = torch.tensor(SEED)
    assert torch.equal(whole(F.dropout(shard, seed=seed)), F.dropout(x, seed=SEED))
    F.dropout(shard, inplace=True, seed=SEED)
    assert torch.equal(whole(shard), F.dropout(x, seed=SEED))
    with pytest.raises(RuntimeError, match="got mixed"):
        F.bias_dropout_add(shard, None, x)
    with pytest.raises(RuntimeError, match="got mixed"):
        F.scaled_dot_product_attention(x, shard, shard)


def check_compiled() -> None:
    def function(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        y = F.dropout_add_norm(F.dropout(x, 0.5, seed=SEED), x, None, p=0.3)
        return y, F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)

    def seeded(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(2)
        return (compiled if isinstance(tensors[0], DTensor) else function)(*tensors)

    compare("compiled", seeded, [randn(4, 6), randn(2, 4, 5, 4)], [Shard(0), Shard(1)])


def check_context_parallel(rank: int) -> None:
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _ContextParallel
    from torch.distributed.tensor.parallel import parallelize_module

    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = F.scaled_dot_product_attention(q, k, v, None, 0.5, True, seed=SEED)
            return out

    q = randn(2, 4, 6, 4)
    expected = Attention()(q, q, q)
    kind = _ContextParallel.AttentionType.SDPA
    net = parallelize_module(Attention(), mesh(), _ContextParallel(2, kind))
    part = q.chunk(2, 2)[rank]
    torch.testing.assert_close(net(part, part, part), expected.chunk(2, 2)[rank])
    with (
        context_parallel(mesh(), buffers=[q.clone()], buffer_seq_dims=[2]),
        pytest.raises(RuntimeError, match="torch's own attention alone"),
    ):
        F.scaled_dot_product_attention(part, part, part, softcap=1.0)
    F.scaled_dot_product_attention(part, part, part, softcap=1.0)


def check(rank: int) -> None:
    check_seeds()  # the rules come with the first call
    register_sharding_rules()
    count = 0
    for cases in (element_cases, linear_cases, attention_cases):
        for name, function, tensors, ways in cases():
            for places in ways:
                compare(name, function, tensors, places)
                count += 1
    assert count > 40
    check_that_nothing_moves()
    check_that_local_masks_show()
    check_meshes_of_two_dimensions()
    check_compiled()
    check_context_parallel(rank)


def test_every_op_has_a_rule() -> None:
    ops = set(registered())
    assert set(RULES) | set(WITHOUT_RULE) == ops and not set(RULES) & set(WITHOUT_RULE)
    assert all(WITHOUT_RULE.values())


def test_ops_on_shards(tmp_path: Path) -> None:
    in_two_processes(check, tmp_path)
