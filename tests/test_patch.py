"""``pyfast.patch``: what is swapped, what is left alone and why, and what must not change."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import pyfast

NAMES = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
INPUT_SHAPES = {"Dropout1d": (4, 8, 5), "Dropout2d": (4, 8, 5, 3), "Dropout3d": (4, 8, 5, 3, 2)}


def make_input(name: str = "Dropout") -> Tensor:
    return torch.randn(INPUT_SHAPES.get(name, (16, 32)))


class Model(nn.Module):
    """One of everything that patch has something to say about, and a Linear that it has not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.25)
        self.again = self.dropout
        self.inner = nn.Sequential(nn.LayerNorm(8), nn.Dropout1d(0.5), nn.Identity())
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.inner(self.dropout(self.linear(x))))


class Noisy(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def same_mask(module: nn.Module, x: Tensor) -> bool:
    """Whether a call of the module drops what pyfast drops for the same draw from the generator."""
    torch.manual_seed(5)
    y = module(x)
    seed = torch.empty((), dtype=torch.int64)
    torch.manual_seed(5)
    drawn = int(seed.random_())
    mask = pyfast.dropout_mask(x.shape, 0.5, drawn)
    return torch.equal(y != 0, mask)


@pytest.mark.parametrize("name", NAMES)
def test_every_class_is_swapped_as_root(name: str) -> None:
    module = getattr(nn, name)(0.3)
    report = pyfast.patch(module)
    assert type(module) is getattr(pyfast.nn, name)
    assert [(e.path, e.source, e.target, e.reason) for e in report] == [
        ("(root)", getattr(nn, name), getattr(pyfast.nn, name), "")
    ]
    ours = getattr(pyfast.nn, name)(0.3)
    assert repr(module) == repr(ours)
    x = make_input(name)
    torch.manual_seed(1)
    expected = ours(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_inplace_and_p_are_kept(name: str) -> None:
    module = getattr(nn, name)(0.3, inplace=True)
    pyfast.patch(module)
    assert module.p == 0.3
    assert module.inplace is True
    assert (module.seed, module.generator) == (None, None)


def test_patched_module_drops_what_pyfast_drops() -> None:
    module = nn.Dropout(0.5)
    x = torch.ones(64, 64)
    assert not same_mask(module, x)
    pyfast.patch(module)
    assert same_mask(module, x)


def test_identity_and_training_flag_are_kept() -> None:
    model = Model()
    model.inner.eval()
    before = list(model.modules())
    flags = [module.training for module in before]
    pyfast.patch(model)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))
    assert [module.training for module in model.modules()] == flags


def test_parameters_buffers_and_state_dict_are_kept() -> None:
    model = Model()
    model.register_buffer("steps", torch.zeros(1))
    before = model.state_dict(keep_vars=True)
    pyfast.patch(model)
    after = model.state_dict(keep_vars=True)
    assert list(before) == list(after)
    assert all(before[key] is after[key] for key in before)
    Model().load_state_dict(model.state_dict(), strict=False)


def test_shared_module_is_one_entry_with_all_paths() -> None:
    model = Model()
    report = pyfast.patch(model)
    assert [entry.path for entry in report.swapped] == ["dropout, again", "inner.1", "attention"]
    assert model.dropout is model.again
    assert type(model.dropout) is pyfast.nn.Dropout


def test_module_under_two_names_of_two_parents() -> None:
    shared = nn.Dropout(0.5)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(nn.Identity(), shared))
    (entry,) = pyfast.patch(model)
    assert entry.path == "0.0, 1.1"


def test_cyclic_model_ends() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    model.add_module("self", model)
    assert len(pyfast.patch(model).swapped) == 1


def test_hooks_still_fire() -> None:
    module = nn.Dropout(0.5)
    calls: list[str] = []
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    module.register_forward_hook(lambda *_: calls.append("post"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    pyfast.patch(module)
    module(torch.ones(4, 4, requires_grad=True)).sum().backward()
    assert calls == ["pre", "post", "backward"]


def test_subclass_is_skipped() -> None:
    model = nn.Sequential(Noisy(0.5))
    (entry,) = pyfast.patch(model)
    assert type(model[0]) is Noisy
    assert (entry.source, entry.target) == (Noisy, None)
    assert entry.reason == "a subclass of Dropout: its forward may differ"


def test_subclass_of_ours_is_skipped() -> None:
    class Ours(pyfast.nn.Dropout2d):
        pass

    model = nn.Sequential(Ours(0.5))
    (entry,) = pyfast.patch(model)
    assert type(model[0]) is Ours
    assert entry.reason == "a subclass of Dropout2d: its forward may differ"


def test_forward_override_is_skipped() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    model[0].forward = lambda input: input * 2  # type: ignore[method-assign]
    report = pyfast.patch(model)
    assert classes(model)[1:] == [nn.Dropout, pyfast.nn.Dropout]
    assert report.skipped[0].reason == "its forward is overridden on the instance"
    assert torch.equal(model[0](torch.ones(3)), torch.full((3,), 2.0))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_is_swapped(dropout: float) -> None:
    module = nn.MultiheadAttention(8, 2, dropout=dropout)
    projection = module.out_proj
    (entry,) = pyfast.patch(module)
    assert entry.target is type(module) is pyfast.nn.MultiheadAttention
    assert module.out_proj is projection and module.dropout == dropout


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_script_module_is_skipped_and_said(whole: bool) -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
    model = scripted if whole else nn.Sequential(scripted, nn.Dropout(0.5))
    report = pyfast.patch(model)
    (entry,) = report.skipped
    assert entry.path == ("(root)" if whole else "0")
    assert entry.reason.startswith("a ScriptModule:")
    assert len(report.swapped) == (0 if whole else 1)
    assert model(torch.ones(2, 4)).shape == (2, 4)


def test_other_modules_are_not_listed() -> None:
    report = pyfast.patch(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Identity()))
    assert len(report) == 0
    assert str(report) == "pyfast.patch: the model has no module that pyfast replaces"


def test_dry_run_changes_nothing_and_reports_the_same() -> None:
    model = Model()
    before = classes(model)
    planned = pyfast.patch(model, dry_run=True)
    assert planned.dry_run
    assert classes(model) == before
    done = pyfast.patch(model)
    assert planned.entries == done.entries
    planned.undo()
    assert type(model.dropout) is pyfast.nn.Dropout


def test_undo_restores_every_class() -> None:
    model = nn.Sequential(*(getattr(nn, name)() for name in NAMES), Noisy(), Model())
    before = classes(model)
    report = pyfast.patch(model)
    assert len(report.swapped) == len(NAMES) + 3
    report.undo()
    assert classes(model) == before
    report.undo()
    assert classes(model) == before


def test_second_undo_does_not_undo_a_later_patch() -> None:
    module = nn.Dropout(0.5)
    first = pyfast.patch(module)
    first.undo()
    pyfast.patch(module)
    first.undo()
    assert type(module) is pyfast.nn.Dropout


def test_undo_leaves_modules_changed_since_alone() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    report = pyfast.patch(model)
    model[0].__class__ = Noisy
    report.undo()
    assert classes(model)[1:] == [Noisy, nn.Dropout]


def test_double_patch_says_so_and_does_nothing() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    first = pyfast.patch(model)
    second = pyfast.patch(model)
    assert second.swapped == []
    assert [entry.reason for entry in second.skipped] == ["already pyfast's"]
    second.undo()
    assert type(model[0]) is pyfast.nn.Dropout
    first.undo()
    assert type(model[0]) is nn.Dropout


def test_optimizer_made_before_keeps_training() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    pyfast.patch(model)
    x = torch.randn(64, 4)
    y = x.sum(1, keepdim=True)
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def make_layer(dropout: float) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout, "gelu", batch_first=True, norm_first=True)


def test_encoder_layer_children_are_swapped() -> None:
    layer = make_layer(0.1)
    report = pyfast.patch(layer)
    names = ["(root)", "self_attn", "dropout", "dropout1", "dropout2"]
    assert [entry.path for entry in report.swapped] == names and not report.skipped
    assert layer(torch.randn(2, 5, 16)).isfinite().all()


@pytest.mark.parametrize("fast_path", [True, False])
def test_encoder_layer_eval_output_is_unchanged(fast_path: bool) -> None:
    layer, x = make_layer(0.1).eval(), torch.randn(2, 5, 16)
    with torch.set_grad_enabled(not fast_path):
        before = layer(x)
        pyfast.patch(layer)
        torch.testing.assert_close(layer(x), before)


def test_encoder_layer_train_output_without_dropout_is_unchanged() -> None:
    layer, x = make_layer(0.0), torch.randn(2, 5, 16)
    before = layer(x)
    assert len(pyfast.patch(layer).swapped) == 5
    torch.testing.assert_close(layer(x), before)


def test_encoder_layer_train_output_has_pyfast_masks() -> None:
    layer, x = make_layer(0.5), torch.randn(2, 5, 16)
    layer.self_attn.dropout = 0.0
    pyfast.patch(layer)
    masks = {}
    for seed, (name, width) in enumerate((("dropout1", 16), ("dropout", 32), ("dropout2", 16))):
        getattr(layer, name).seed = seed
        masks[name] = 2 * pyfast.dropout_mask((2, 5, width), 0.5, seed)
    normed = layer.norm1(x)
    y = x + masks["dropout1"] * layer.self_attn(normed, normed, normed, need_weights=False)[0]
    hidden = masks["dropout"] * nn.functional.gelu(layer.linear1(layer.norm2(y)))
    torch.testing.assert_close(layer(x), y + masks["dropout2"] * layer.linear2(hidden))


def test_deepcopy_and_pickle_of_a_patched_model() -> None:
    model = Model()
    report = pyfast.patch(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded]
    report.undo()
    for clone in clones:
        assert type(clone.dropout) is pyfast.nn.Dropout
        assert clone.dropout is clone.again
        assert clone(torch.randn(2, 3, 8)).shape == (2, 3, 8)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    assert len(pyfast.patch(model).swapped) == 1
    y = model(torch.ones(2, 4, device="meta"))
    assert (y.device.type, y.shape) == ("meta", (2, 4))


def test_compiled_model_is_patched_inside() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    compiled = torch.compile(model, backend="eager")
    x = torch.ones(64, 64)
    torch._dynamo.reset()
    compiled(x)
    (entry,) = pyfast.patch(compiled)
    assert entry.path == "_orig_mod.0"
    assert type(model[0]) is pyfast.nn.Dropout
    model[0].seed = 11
    mask = pyfast.dropout_mask(x.shape, 0.5, 11)
    assert torch.equal(compiled(x) != 0, mask)


def test_report_text() -> None:
    model = nn.Sequential(nn.Dropout(0.5), Noisy(0.5), nn.AlphaDropout(0.5))
    assert str(pyfast.patch(model, dry_run=True)).endswith("2 of 3 modules would be swapped")
    report = pyfast.patch(model)
    noisy = f"{Noisy.__module__}.Noisy"
    width = len(max("torch.nn.AlphaDropout", noisy, key=len))
    assert str(report).splitlines() == [
        f"module  {'from':{width}}  to, or why not",
        f"0       {'torch.nn.Dropout':{width}}  pyfast.nn.Dropout",
        f"1       {noisy:{width}}  a subclass of Dropout: its forward may differ",
        f"2       {'torch.nn.AlphaDropout':{width}}  pyfast.nn.AlphaDropout",
        "2 of 3 modules swapped",
    ]
    assert repr(report) == "<PatchReport: 2 swapped, 1 skipped>"


def test_report_names_torch_classes_as_users_do() -> None:
    text = str(pyfast.patch(nn.MultiheadAttention(8, 2, dropout=0.1)))
    assert "(root)  torch.nn.MultiheadAttention  pyfast.nn.MultiheadAttention" in text


@pytest.mark.parametrize(
    ("model", "came"),
    [(nn.Dropout, "the class Dropout"), ([nn.Dropout()], "list"), (None, "NoneType")],
)
def test_rejects_what_is_no_module(model: object, came: str) -> None:
    with pytest.raises(TypeError) as error:
        pyfast.patch(model)  # type: ignore[arg-type]
    assert str(error.value) == f"patch: model must be a torch.nn.Module, got {came}"


def test_traced_modules_follow_eval_and_train() -> None:
    """torch.fx keeps the modules as calls; those with parameters too."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout())
    pyfast.patch(model)
    model.append(pyfast.nn.DropConnect(8, 8))
    graph = torch.fx.symbolic_trace(model.train())
    assert [node.op for node in graph.graph.nodes].count("call_module") == 3
    x = torch.ones(40, 8)
    assert torch.equal(graph.eval()(x), model.eval()(x))
    assert not torch.equal(graph.train()(x), graph(x))
    assert [node.op for node in torch.fx.symbolic_trace(pyfast.nn.Dropout()).graph.nodes][1] == (
        "call_function"
    )


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_are_left_to_torch(layout: torch.layout) -> None:
    x = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=layout)
    y = pyfast.nn.functional.dropout(x, 0.5)
    assert y.is_nested and set(y.values().unique().tolist()) <= {0.0, 2.0}
