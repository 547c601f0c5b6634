"""The transformer layers against torch's: alone, in torch's containers, and with parts replaced."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from conftest import Backend
from device_under_test import CPU, current_device, to_same
from test_multi_head_attention import assert_same, make_mask, ours, outcome
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyfast
from pyfast.nn import transformer

N, L, S, E = 3, 6, 5, 16
KINDS = ("Encoder", "Decoder")
LAYERS: dict[str, dict[str, Any]] = {
    "post-norm": {},
    "post-norm, batch first": {"batch_first": True, "activation": "gelu"},
    "pre-norm": {"norm_first": True, "activation": nn.ReLU()},
    "pre-norm, batch first": {"norm_first": True, "batch_first": True, "activation": torch.tanh},
    "no bias": {"bias": False, "batch_first": True, "layer_norm_eps": 0.1},
    "no bias, pre-norm": {"bias": False, "norm_first": True},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def layers(kind: str, seed: int = 1, dropout: float = 0.0, **options: Any) -> tuple[Any, Any]:
    """torch's and pyfast's, each initialised from the same seed."""
    pair = []
    for package in (nn, pyfast.nn):
        torch.manual_seed(seed)
        layer = getattr(package, f"Transformer{kind}Layer")
        pair.append(layer(E, 2, 24, dropout, **options))
    return pair[0], pair[1]


def inputs(kind: str, batch_first: bool, batched: bool, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(N, length) if batch_first else (length, N) for length in (L, S)]
    shapes = shapes if batched else [(L,), (S,)]
    return [torch.randn(*s, E, dtype=dtype) for s in shapes[: 1 + (kind == "Decoder")]]


def masks(
    kind: str, mask: str | None, padding: str | None, batched: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments of a layer."""
    causal = mask == "causal"
    batch = (N,) if batched else ()
    square: Tensor | None
    if causal:
        square = nn.Transformer.generate_square_subsequent_mask(L, dtype=dtype)
    else:
        square = make_mask(mask, L, L, dtype=dtype)
    own = make_mask(padding, *batch, L, dtype=dtype)
    if kind == "Encoder":
        return {"src_mask": square, "src_key_padding_mask": own, "is_causal": causal}
    return {
        "tgt_mask": square,
        "tgt_key_padding_mask": own,
        "tgt_is_causal": causal,
        "memory_mask": make_mask(None if causal else mask, L, S, dtype=dtype),
        "memory_key_padding_mask": make_mask(padding, *batch, S, dtype=dtype),
    }


def results(module: nn.Module, tensors: list[Tensor], **options: Any) -> list[Tensor | None]:
    leaves = [t.clone().requires_grad_() for t in to_same(module, tensors)]
    module.zero_grad()
    out = module(*leaves, **to_same(module, options))
    (out * out.detach().cos()).sum().backward()
    return to_same(CPU, [out, *(t.grad for t in [*leaves, *module.parameters()])])


MASKS = (
    *((None, padding) for padding in (None, "bool", "float")),
    *(("bool", padding) for padding in (None, "bool")),
    *((mask, padding) for mask in ("float", "causal") for padding in (None, "float")),
)


def check(kind: str, name: str, dtype: torch.dtype) -> None:
    theirs, mine = layers(kind, dtype=dtype, **LAYERS[name])
    assert_same(list(mine.parameters()), list(theirs.parameters()))
    mine.to(current_device())
    for mask, padding in MASKS:
        for batched in (True, False):
            tensors = inputs(kind, LAYERS[name].get("batch_first", False), batched, dtype)
            options = masks(kind, mask, padding, batched, dtype)
            for training in (True, False):
                expected = results(theirs.train(training), tensors, **options)
                assert_same(results(mine.train(training), tensors, **options), expected)
            with torch.no_grad():
                tensors, options = to_same(mine, (tensors, options))
                assert_same([mine(*tensors, **options).cpu()], expected[:1])


@ours
@each_kind
@pytest.mark.parametrize("name", LAYERS)
def test_matches_torch(backend: Backend, name: str, kind: str) -> None:
    check(kind, name, torch.float32)


@pytest.mark.backends("reference")
@each_kind
@pytest.mark.parametrize("name", ["post-norm", "pre-norm, batch first"])
def test_matches_torch_in_float64(backend: Backend, name: str, kind: str) -> None:
    check(kind, name, torch.float64)


MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "no residual": ("_add_norm", lambda x, r, *a: add_norm(x, 0 * r, *a)),
    "residual after the norm": ("_prenorm", lambda *a: (prenorm(*a)[0],) * 2),
    "no bias": ("_add_linear", lambda linear, *a: add_linear(no_bias(linear), *a)),
    "mask forgotten": ("canonical_mask", lambda *a: None),
}
add_norm, prenorm, add_linear = transformer._add_norm, transformer._prenorm, transformer._add_linear


def no_bias(linear: nn.Linear) -> nn.Linear:
    without = nn.Linear(linear.in_features, linear.out_features, bias=False)
    without.weight = linear.weight
    return without


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, *MUTANTS[mutant])
    with pytest.raises(AssertionError):
        for name in LAYERS:
            check("Encoder", name, torch.float32)


@each_kind
@pytest.mark.parametrize("norm_first", [True, False])
def test_dropout_is_that_of_the_modules(norm_first: bool, kind: str) -> None:
    """The fused layer drops what torch's forward drops with pyfast's dropouts of the same seed."""
    _, mine = layers(kind, dropout=0.4, norm_first=norm_first)
    for seed, (name, module) in enumerate(mine.named_children()):
        if name.startswith("dropout"):
            assert type(module) is pyfast.nn.Dropout
            module.seed = seed
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    tensors = inputs(kind, False, True, torch.float32)
    fused = results(mine, tensors)
    mine._sa_block = mine._sa_block  # an override, even of the same
    assert_same(fused, results(mine, tensors))
    mine.dropout1.seed += 1
    with pytest.raises(AssertionError):
        assert_same(fused, results(mine, tensors))
    del mine._sa_block
    torch.manual_seed(2)
    mine.dropout2.seed = None
    first = mine(*tensors)
    assert not torch.equal(first, mine(*tensors))
    torch.manual_seed(2)
    assert torch.equal(first, mine(*tensors))


@each_kind
def test_fuses_only_what_is_plain(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fused = pyfast.nn.functional.dropout_add_norm
    monkeypatch.setattr(
        pyfast.nn.functional,
        "dropout_add_norm",
        lambda *a, **o: (calls.append(1), fused(*a, **o))[1],
    )
    tensors = inputs(kind, False, True, torch.float32)
    theirs, plain = layers(kind)
    expected = theirs(*tensors)
    plain(*tensors)
    assert len(calls) == (2 if kind == "Encoder" else 3)
    seen: list[str] = []

    def hook(*_: Any) -> None:
        seen.append("hook")

    def override(layer: nn.Module) -> None:
        block = layer._sa_block
        layer._sa_block = lambda *a, **o: (seen.append("block"), block(*a, **o))[1]

    class Norm(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            seen.append("norm")
            return super().forward(input)

    def own_norm(layer: nn.Module) -> None:
        layer.norm2.__class__ = Norm

    changes: list[Callable[[Any], object]] = [
        lambda layer: layer.norm1.register_forward_hook(hook),
        lambda layer: layer.dropout2.register_forward_pre_hook(hook),
        lambda layer: layer.norm2.register_full_backward_hook(hook),
        override,
        own_norm,
        lambda layer: setattr(layer, "dropout1", nn.Identity()),
    ]
    for change in changes:
        _, mine = layers(kind)
        change(mine)
        calls.clear(), seen.clear()
        out = mine(*tensors)
        out.sum().backward()
        torch.testing.assert_close(out, expected)
        assert not calls and len(seen) == (change is not changes[-1])
    handle = nn.modules.module.register_module_forward_hook(hook)
    seen.clear()
    plain(*tensors)
    handle.remove()
    assert not calls and len(seen) == sum(1 for _ in theirs.modules()) - 1 - (kind == "Decoder")


@each_kind
def test_parts_that_are_called_may_be_anything(kind: str) -> None:
    """Hooks and other classes of linear layers, attention and activation see their calls."""
    seen: list[str] = []
    _, mine = layers(kind, norm_first=True)
    for name in ("linear1", "linear2", "self_attn", "dropout", "norm1"):
        getattr(mine, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    mine(*inputs(kind, False, True, torch.float32))
    assert seen == ["norm1", "self_attn", "linear1", "dropout", "linear2"]


def test_attention_is_called_in_evaluation() -> None:
    """torch's fast path reads the weights of self_attn and never calls it."""
    calls: list[int] = []
    for fast_path in (True, False):
        _, mine = layers("Encoder", batch_first=True)
        forward = mine.self_attn.forward
        mine.self_attn.forward = lambda *a, f=forward, **o: (calls.append(1), f(*a, **o))[1]
        with torch.set_grad_enabled(not fast_path):
            mine.eval()(torch.randn(N, L, E))
    assert len(calls) == 2


def left_aligned_padding(dtype: torch.dtype = torch.bool) -> Tensor:
    padding = torch.arange(L) >= torch.tensor([[6], [4], [2]])
    return padding if dtype == torch.bool else torch.zeros(N, L).masked_fill(padding, -torch.inf)


def outcomes(model: nn.Module, *arguments: Any, **options: Any) -> list[Tensor | None]:
    """In training, in evaluation with gradients, and in torch's fast path."""
    model.zero_grad()
    result = []
    for training, grad in ((True, True), (False, True), (False, False)):
        with torch.set_grad_enabled(grad):
            result.append(model.train(training)(*arguments, **options))
    result[0].sum().backward()
    return [*result, *(p.grad for p in model.parameters())]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder(nested: bool, batch_first: bool, norm_first: bool) -> None:
    """With our layers from the start, patched, and with the patch undone."""
    options = {"batch_first": batch_first, "norm_first": norm_first}
    theirs, mine = (
        nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), nested)
        for layer in layers("Encoder", **options)
    )
    patched = copy.deepcopy(theirs)
    report = pyfast.patch(patched)
    assert list(patched.state_dict()) == list(theirs.state_dict())
    assert type(patched.layers[0].self_attn) is pyfast.nn.MultiheadAttention
    assert len(report.swapped) == 2 * 5
    (x,) = inputs("Encoder", batch_first, True, torch.float32)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    for call in (
        {},
        {"src_key_padding_mask": left_aligned_padding()},
        {"src_key_padding_mask": left_aligned_padding().flip(1)},
        {"src_key_padding_mask": left_aligned_padding(torch.float32)},
        {"mask": causal},
        {"mask": causal, "is_causal": True},
        {"mask": causal, "src_key_padding_mask": left_aligned_padding(torch.float32)},
    ):
        expected = outcomes(theirs, x, **call)
        if call.get("mask") is not None and "src_key_padding_mask" in call:
            expected[2] = expected[1]
        for model in (mine, patched):
            assert_same(outcomes(model, x, **call), expected)
    report.undo()
    assert [type(m) for m in patched.modules()] == [type(m) for m in theirs.modules()]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_transformer(batch_first: bool) -> None:
    options = {"batch_first": batch_first}
    theirs = nn.Transformer(E, 2, 2, 2, 24, 0.0, "gelu", **options)
    patched = copy.deepcopy(theirs)
    report = pyfast.patch(patched)
    assert len(report.swapped) == 2 * 5 + 2 * 7 and not report.skipped
    encoder, decoder = (
        getattr(nn, f"Transformer{kind}")(
            layers(kind, activation="gelu", **options)[1], 2, nn.LayerNorm(E)
        )
        for kind in KINDS
    )
    custom = nn.Transformer(E, 2, custom_encoder=encoder, custom_decoder=decoder, **options)
    custom.load_state_dict(theirs.state_dict())
    src, _ = tensors = inputs("Decoder", batch_first, True, torch.float32)
    causal = nn.Transformer.generate_square_subsequent_mask(S)
    padding = left_aligned_padding()
    for call in (
        {"tgt_mask": causal},
        {"tgt_mask": causal, "tgt_is_causal": True},
        {"src_key_padding_mask": padding, "memory_key_padding_mask": padding},
    ):
        expected = outcomes(theirs, *tensors, **call)
        for model in (patched, custom):
            assert_same(outcomes(model, *tensors, **call), expected)
    report.undo()
    assert torch.equal(patched.eval()(src, src), theirs.eval()(src, src))


@ours
def test_fully_masked_rows_are_finite(backend: Backend) -> None:
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1] = True
    mine = layers("Encoder", batch_first=True)[1].to(backend.device)
    x, padding = to_same(mine, (*inputs("Encoder", True, True, torch.float32), padding))
    for result in results(mine, [x], src_key_padding_mask=padding):
        assert result.isfinite().all()
    with torch.no_grad():
        assert mine.eval()(x, src_key_padding_mask=padding).isfinite().all()


@each_kind
def test_errors_and_warnings_are_torchs(kind: str) -> None:
    prefix = "src" if kind == "Encoder" else "tgt"
    tensors = inputs(kind, False, True, torch.float32)
    padding = f"{prefix}_key_padding_mask"
    calls: list[tuple[list[Tensor], dict[str, Any]]] = [
        (tensors, {f"{prefix}_mask": torch.zeros(L, L, dtype=torch.int)}),
        (tensors, {padding: torch.zeros(N, L, dtype=torch.int)}),
        (tensors, {f"{prefix}_mask": torch.zeros(L, L), padding: left_aligned_padding()}),
        (tensors, {"is_causal" if kind == "Encoder" else "tgt_is_causal": True}),
        (tensors, {f"{prefix}_mask": torch.zeros(L, L + 1)}),
        ([t[..., :3] for t in tensors], {}),
        ([t[None] for t in tensors], {}),
    ]
    theirs, mine = layers(kind)
    for positional, options in calls:
        expected = outcome(lambda p=positional, o=options: theirs(*p, **o))
        assert outcome(lambda p=positional, o=options: mine(*p, **o)) == expected != ()
    classes = (type(theirs), type(mine))
    expected, actual = (outcome(lambda c=c: c(E, 2, activation="x")) for c in classes)
    assert actual == expected != ()


@each_kind
def test_state_dict_copies_and_pickles(kind: str) -> None:
    theirs, mine = layers(kind)
    theirs.load_state_dict(mine.state_dict())
    mine.load_state_dict(theirs.state_dict())
    tensors = inputs(kind, False, True, torch.float32)
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert type(other) is type(mine) and type(other.self_attn) is pyfast.nn.MultiheadAttention
        assert torch.equal(other(*tensors), mine(*tensors))
    assert repr(mine) == repr(theirs)


@each_kind
@pytest.mark.parametrize("norm_first", [True, False])
def test_compiles_exports_checkpoints_and_autocasts(kind: str, norm_first: bool) -> None:
    torch._dynamo.reset()
    theirs, mine = layers(kind, norm_first=norm_first)
    tensors = inputs(kind, False, True, torch.float32)
    options = masks(kind, "causal", None, True, torch.float32)
    expected = results(mine, tensors, **options)
    for compiler in ("eager", "aot_eager"):
        compiled = torch.compile(mine, backend=compiler, fullgraph=True)
        assert_same(results(compiled, tensors, **options), expected)
    exported = torch.export.export(mine, tuple(tensors), options).module()
    assert_same([exported(*tensors, **options)], expected[:1])
    for module in (mine, theirs):
        module.self_attn.dropout = module.dropout1.p = 0.5
    with torch.autocast("cpu", torch.bfloat16):
        pair = [module.eval()(*tensors, **options) for module in (mine, theirs)]
    assert pair[0].dtype == pair[1].dtype
    torch.testing.assert_close(pair[0].float(), pair[1].float(), rtol=5e-2, atol=5e-2)
    torch.manual_seed(3)
    dropped = results(mine.train(), tensors, **options)
    torch.manual_seed(3)
    again = nn.ModuleList([mine])
    again.forward = lambda *t, **o: checkpoint(mine, *t, use_reentrant=False, **o)
    assert_same(results(again, tensors, **options), dropped)
