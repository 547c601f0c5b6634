"""``multi_head_attention_forward`` and ``MultiheadAttention`` against torch's, option by option."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from conftest import Backend
from device_under_test import CPU, current_device, to_same
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyfast
from pyfast.ops import multi_head_attention

N, L, S, E, H = 3, 5, 7, 8, 2
ours = pytest.mark.backends("reference", "cpu", "triton")
CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "both added": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "kdim": {"kdim": 6, "vdim": 4},
    "everything": {
        "kdim": 6,
        "vdim": 4,
        "bias": False,
        "add_bias_kv": True,
        "add_zero_attn": True,
        "batch_first": True,
    },
}
# attn_mask, key_padding_mask, is_causal, need_weights, average_attn_weights
FORWARDS = (
    *((None, None, False, need, True) for need in (True, False)),
    (None, None, False, True, False),
    *(("bool", None, False, need, True) for need in (True, False)),
    *((None, kind, False, need, False) for kind in ("bool", "float") for need in (True, False)),
    *((kind, kind, False, need, True) for kind in ("bool", "float") for need in (True, False)),
    *(("bool heads", "bool", False, need, False) for need in (True, False)),
    *(("float heads", None, False, need, True) for need in (True, False)),
    *(("float", None, True, need, True) for need in (True, False)),
    *(("bool", "bool", True, need, True) for need in (True, False)),
)


def modules(seed: int = 1, **options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """torch's and pyfast's, each initialised from the same seed."""
    pair = []
    for package in (nn, pyfast.nn):
        torch.manual_seed(seed)
        pair.append(package.MultiheadAttention(E, H, **options))
    return pair[0], pair[1]


def make_mask(kind: str | None, *shape: int, dtype: torch.dtype) -> Tensor | None:
    if kind is None:
        return None
    if kind.startswith("float"):
        return torch.randn(shape, dtype=dtype)
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False  # torch gives NaN where everything is masked
    return mask


def inputs(module: nn.MultiheadAttention, batched: bool, same: bool = False) -> list[Tensor]:
    dtype, sizes = module.out_proj.weight.dtype, (E, module.kdim, module.vdim)
    result = []
    for length, size in zip((L, S, S), sizes, strict=True):
        shape = (N, length) if module.batch_first else (length, N)
        result.append(torch.randn(*(shape if batched else (length,)), size, dtype=dtype))
    return [result[0]] * 3 if same else result


def arguments(case: tuple[Any, ...], batched: bool, keys: int, dtype: torch.dtype) -> Any:
    mask, padding, is_causal, need_weights, average = case
    count = N if batched else 1
    shape = (count * H, L, keys) if "heads" in (mask or "") else (L, keys)
    return {
        "attn_mask": make_mask(mask, *shape, dtype=dtype),
        "key_padding_mask": make_mask(padding, *((N,) if batched else ()), keys, dtype=dtype),
        "is_causal": is_causal,
        "need_weights": need_weights,
        "average_attn_weights": average,
    }


def results(module: nn.Module, tensors: list[Tensor], **options: Any) -> list[Tensor | None]:
    """Result, weights, and the gradients of a loss of both, on the CPU."""
    tensors, options = to_same(module, (tensors, options))
    if len({id(t) for t in tensors}) == 1:
        leaves = [tensors[0].clone().requires_grad_()]
        operands = leaves * 3
    else:
        operands = leaves = [t.clone().requires_grad_() for t in tensors]
    module.zero_grad()
    out, weights = module(*operands, **options)
    loss = (out * out.detach().cos()).sum()
    if weights is not None:
        loss = loss + (weights * (7 * weights.detach()).sin()).sum()
    loss.backward()
    return to_same(CPU, [out, weights, *(t.grad for t in [*leaves, *module.parameters()])])


def assert_same(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """Both sum a few dozen products in another order: 1e-5 of float32, 1e-10 of float64."""
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            tolerance = 2e-5 if e.dtype == torch.float32 else 1e-10
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def check(
    dtype: torch.dtype, constructor: str, forwards: Any = FORWARDS, is_slow: bool = False
) -> None:
    """``is_slow``: self-attention and evaluation, which are no other kernels, are left out."""
    theirs, mine = modules(dtype=dtype, **CONSTRUCTORS[constructor])
    assert_same(list(mine.parameters()), list(theirs.parameters()))
    mine.to(current_device())
    for case in forwards:
        for batched, same in ((True, False), (False, False), (True, True), (False, True)):
            if same and (is_slow or theirs.kdim != E):
                continue
            tensors = inputs(theirs, batched, same)
            options = arguments(case, batched, L if same else S, dtype)
            for training in (True,) if is_slow else (True, False):
                expected = results(theirs.train(training), tensors, **options)
                actual = results(mine.train(training), tensors, **options)
                assert_same(actual, expected)
                assert actual[0].is_contiguous()


@ours
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_matches_torch(backend: Backend, constructor: str) -> None:
    check(torch.float32, constructor, is_slow=backend.is_slow)


@pytest.mark.backends("reference")
@pytest.mark.parametrize("constructor", ["batch first", "both added", "everything"])
def test_matches_torch_in_float64(backend: Backend, constructor: str) -> None:
    check(torch.float64, constructor)


def invert(*arguments: Any) -> Tensor | None:
    mask = merged_mask(*arguments)
    return mask if mask is None or mask.dtype != torch.bool else ~mask


merged_mask, with_weights = multi_head_attention._merged_mask, multi_head_attention._with_weights
MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "mask inverted": ("_merged_mask", invert),
    "padding ignored": ("_merged_mask", lambda p, m, *a: merged_mask(None, m, *a)),
    "mask ignored": ("_merged_mask", lambda p, m, *a: merged_mask(p, None, *a)),
    "never averaged": ("_with_weights", lambda *a: with_weights(*a[:-1], False)),
    "weights detached": ("_with_weights", lambda *a: (with_weights(*a)[0], detached(*a))),
    "bias of keys forgotten": ("_with_bias", lambda x, bias, first: x),
}


def detached(*arguments: Any) -> Tensor:
    return with_weights(*arguments)[1].detach()


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_head_attention, *MUTANTS[mutant])
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check(torch.float32, "both added")


def test_function_matches_torch_with_static_keys() -> None:
    theirs, _ = modules()
    for mask in (None, torch.randn(L, S)):
        query, key, value = inputs(theirs, True)
        static = torch.randn(2, N * H, S, E // H)
        given = [theirs.embed_dim, H, theirs.in_proj_weight, theirs.in_proj_bias, None, None, True]
        given += [0.0, theirs.out_proj.weight, theirs.out_proj.bias]
        for k, v in (static, (static[0], None), (None, static[1])):
            options: dict[str, Any] = {"static_k": k, "static_v": v, "attn_mask": mask}
            actual, expected = (
                functional.multi_head_attention_forward(query, key, value, *given, **options)
                for functional in (pyfast.nn.functional, nn.functional)
            )
            assert_same([*actual], [*expected])


@ours
def test_fully_masked_rows_are_zero(backend: Backend) -> None:
    module = pyfast.nn.MultiheadAttention(E, H, batch_first=True).to(backend.device)
    x = torch.randn(N, S, E).to(backend.device).requires_grad_()
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1] = True
    masks = padding, torch.zeros(N, S).masked_fill(padding, -torch.inf)
    for mask in to_same(module, masks):
        for need_weights in (True, False):
            x.grad = None
            out, weights = module(x, x, x, key_padding_mask=mask, need_weights=need_weights)
            (out.sum() + (0 if weights is None else weights.square().sum())).backward()
            assert torch.equal(out[1], module.out_proj.bias.expand(S, E))
            assert weights is None or not weights[1].any()
            assert x.grad.isfinite().all() and not x.grad[1].any()


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_projects_once_and_copies_nothing(
    batch_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        seen.extend((q, k, v))
        return pyfast.nn.functional.scaled_dot_product_attention(q, k, v, *rest)

    monkeypatch.setattr(multi_head_attention, "scaled_dot_product_attention", attention)
    module = pyfast.nn.MultiheadAttention(E, H, batch_first=batch_first)
    x = torch.randn(N, L, E) if batch_first else torch.randn(L, N, E)
    module(x, x, x, need_weights=False)
    assert len({t.untyped_storage().data_ptr() for t in seen}) == 1
    assert all(t.shape == (N, H, L, E // H) and t.stride(-1) == 1 for t in seen)


def outcome(call: Callable[[], Any]) -> tuple[str, ...]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:
            return type(error).__name__, str(error)
    return tuple(str(w.message) for w in caught)


x, square, padding = torch.randn(L, N, E), torch.zeros(L, L), torch.zeros(N, L)
BAD_CALLS: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "four dimensions": ((x[None],) * 3, {}),
    "key unbatched": ((x, x[0], x), {}),
    "embedding": ((x[..., :6],) * 3, {}),
    "key and value": ((x, x, x[:3]), {}),
    "batches": ((x, x[:, :2], x[:, :2]), {}),
    "hint without mask": ((x, x, x), {"is_causal": True}),
    "integer mask": ((x, x, x), {"attn_mask": square.int()}),
    "integer padding": ((x, x, x), {"key_padding_mask": padding.long()}),
    "mask of another size": ((x, x, x), {"attn_mask": square[:3]}),
    "mask of heads": ((x, x, x), {"attn_mask": square.expand(N, L, L)}),
    "mask of four dimensions": ((x, x, x), {"attn_mask": square[None, None]}),
    "padding of another size": ((x, x, x), {"key_padding_mask": padding[:, :3]}),
    "padding of another batch": ((x, x, x), {"key_padding_mask": padding[:2]}),
    "padding of one dimension": ((x, x, x), {"key_padding_mask": padding[0]}),
    "unbatched mask": ((x[:, 0],) * 3, {"attn_mask": square.expand(3, L, L)}),
    "dtype": ((x.double(),) * 3, {}),
    "kinds of masks": ((x, x, x), {"attn_mask": square, "key_padding_mask": padding.bool()}),
    "kinds of masks, other way": (
        (x, x, x),
        {"attn_mask": square > 0, "key_padding_mask": padding},
    ),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_errors_and_warnings_are_torchs(bad: str, batch_first: bool) -> None:
    tensors, options = BAD_CALLS[bad]
    if batch_first and tensors[0].dim() == 3:
        tensors = tuple(t.transpose(0, 1) for t in tensors)
    theirs, mine = modules(batch_first=batch_first)
    expected = outcome(lambda: theirs(*tensors, **options))
    assert outcome(lambda: mine(*tensors, **options)) == expected != ()


@pytest.mark.parametrize("sizes", [(8, 3), (0, 1), (8, 0)])
def test_constructor_errors_are_torchs(sizes: tuple[int, int]) -> None:
    expected = outcome(lambda: nn.MultiheadAttention(*sizes))
    assert outcome(lambda: pyfast.nn.MultiheadAttention(*sizes)) == expected != ()


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_state_dict_copies_and_pickles(constructor: str) -> None:
    theirs, mine = modules(**CONSTRUCTORS[constructor])
    for source, target in ((theirs, mine), (mine, theirs)):
        nn.init.normal_(source.out_proj.weight)
        target.load_state_dict(source.state_dict())
        assert torch.equal(source.out_proj.weight, target.out_proj.weight)
    buffer = io.BytesIO()
    torch.save(mine, buffer)
    buffer.seek(0)
    tensors = inputs(mine, True)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), loaded):
        assert type(other) is pyfast.nn.MultiheadAttention
        assert torch.equal(other(*tensors)[0], mine(*tensors)[0])
    assert repr(mine) == repr(theirs)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_fullgraph(compiler: str, dropout: float) -> None:
    torch._dynamo.reset()
    _, mine = modules(dropout=dropout, batch_first=True)
    tensors, mask = inputs(mine, True, same=True), torch.rand(L, L) < 0.2
    compiled = torch.compile(mine, backend=compiler, fullgraph=True)
    for need_weights in (True, False):
        options = {"need_weights": need_weights, "attn_mask": mask}
        actual = results(compiled, tensors, **options)
        assert all(t is None or t.isfinite().all() for t in actual)
        if not dropout:
            assert_same(actual, results(mine, tensors, **options))


def test_exports_checkpoints_and_transforms() -> None:
    _, mine = modules(dropout=0.5)
    tensors = inputs(mine, True)
    exported = torch.export.export(mine.eval(), tuple(tensors)).module()
    assert_same([*exported(*tensors)], [*mine(*tensors)])
    mapped = torch.func.vmap(lambda t: mine(t, t, t)[1])(torch.randn(4, L, E))
    assert mapped.shape == (4, L, L)
    mine.train()
    torch.manual_seed(3)
    expected = results(mine, tensors)
    torch.manual_seed(3)
    again = nn.ModuleList([mine])
    again.forward = lambda *t: checkpoint(mine, *t, use_reentrant=False)
    assert_same(results(again, tensors), expected)


def test_autocast() -> None:
    theirs, mine = modules(add_bias_kv=True)
    tensors = inputs(theirs, True)
    with torch.autocast("cpu", torch.bfloat16):
        for need_weights in (True, False):
            pairs = [m(*tensors, need_weights=need_weights) for m in (mine, theirs)]
            for a, e in zip(*pairs, strict=True):
                assert a is e is None or a.dtype == e.dtype
                assert a is None or torch.allclose(a.float(), e.float(), atol=2e-2)


def test_nested_tensors_are_left_to_torch() -> None:
    theirs, mine = modules(batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(2, E), torch.randn(4, E)])
    with torch.no_grad():
        for need_weights in (True, False):
            a, e = (m.eval()(*[nested] * 3, need_weights=need_weights)[0] for m in (mine, theirs))
            assert a.is_nested
            assert_same([*a.unbind()], [*e.unbind()])
    expected = outcome(lambda: theirs.train()(nested, nested, nested))
    assert outcome(lambda: mine.train()(nested, nested, nested)) == expected


def test_tensor_subclasses_and_modes() -> None:
    class Named(Tensor):
        pass

    _, mine = modules()
    x = torch.randn(L, N, E)
    expected = mine(x, x, x)
    named = x.as_subclass(Named)
    assert isinstance(mine(named, named, named)[0], Named)
    with torch.device("cpu"):
        assert_same([*mine(x, x, x)], [*expected])
