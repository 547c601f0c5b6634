"""``pyfast.patch`` on models of other packages: what it changes, what it says, and undoing it."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.functional as renamed
from activation_cases import served
from timm_alone import import_vision_transformer
from torch import Tensor
from torch.nn.functional import dropout

import pyfast
from pyfast.quantization import Int8StaticActivationInt8Weight, Int8WeightOnly

P = 0.25


def make_vit() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = import_vision_transformer().VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5,
        drop_rate=P, proj_drop_rate=P, attn_drop_rate=P,
    )  # fmt: skip
    return model, (torch.randn(2, 3, 16, 16),)


def make_x_transformer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    x_transformers = pytest.importorskip("x_transformers")
    layers = x_transformers.Decoder(
        dim=32, depth=2, heads=4, attn_flash=True, attn_dropout=P, ff_dropout=P
    )
    model = x_transformers.TransformerWrapper(num_tokens=13, max_seq_len=16, attn_layers=layers)
    return model, (torch.randint(13, (2, 10)),)


def make_bert() -> tuple[nn.Module, tuple[Tensor, ...]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config), (torch.randint(13, (2, 10)),)


def make_gpt2() -> tuple[nn.Module, tuple[Tensor, ...]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=13, n_embd=16, n_layer=2, n_head=2, n_positions=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), (torch.randint(13, (2, 10)),)


HF = "its attention is chosen by config._attn_implementation, now 'sdpa'"
# name: (model, dropouts swapped, what the notes say)
MODELS: dict[str, tuple[Any, int, str]] = {
    "timm": (make_vit, 10, "F.scaled_dot_product_attention in timm.layers.attention.Attention"),
    "x_transformers": (
        make_x_transformer, 5, "F.scaled_dot_product_attention in x_transformers.attend.Attend"
    ),
    "bert": (make_bert, 7, HF),
    "gpt2": (make_gpt2, 9, HF),  # seven dropouts, two activations
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


def result(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    torch.manual_seed(5)
    y: Any = model(*inputs)
    return y if isinstance(y, Tensor) else y[0]


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@every_model
def test_report_evaluation_and_undo(name: str) -> None:
    make, count, said = MODELS[name]
    model, inputs = make()
    before = classes(model)
    expected, stock = result(model.eval(), inputs), result(model.train(), inputs)
    report = pyfast.patch(model)
    assert len(report.swapped) == count and not report.skipped
    kinds = {entry.target.__name__ for entry in report if entry.target is not None}
    assert kinds == ({"Dropout", "NewGELUActivation"} if name == "gpt2" else {"Dropout"})
    (note,) = report.notes
    assert said in note
    suggestion = "register()" if said is HF else "pyfast.activate() sends them"
    assert suggestion in str(report).splitlines()[-1]
    torch.testing.assert_close(result(model.eval(), inputs), expected)
    assert not torch.equal(result(model.train(), inputs), stock)
    with torch.no_grad():
        ops = served(lambda: result(model, inputs))
    assert ops.count("dropout:cpu") >= 2 and "attention:cpu" not in ops
    report.undo()
    assert classes(model) == before
    assert torch.equal(result(model.train(), inputs), stock)


@pytest.mark.parametrize("name", ["timm", "x_transformers"])
def test_activate_reaches_what_the_note_names(name: str) -> None:
    model, inputs = MODELS[name][0]()
    pyfast.patch(model)
    with torch.no_grad(), pyfast.activate(dropout=False):
        assert served(lambda: result(model, inputs)).count("attention:cpu") == 2


def test_no_note_once_pyfast_s_attention_is_chosen() -> None:
    model, _ = make_bert()
    model.config._attn_implementation = "pyfast"  # type: ignore[union-attr]
    assert pyfast.patch(model).notes == []


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(P)

    def helper(self, x: Tensor) -> Tensor:
        return renamed.scaled_dot_product_attention(x, x, x)

    def forward(self, x: Tensor) -> Tensor:
        return dropout(self.helper(x), P, self.training)


class Inherits(Calls):
    pass


class CallsNothing(nn.Module):
    """F.dropout(x) in a docstring, and what only looks like it."""

    F = types.SimpleNamespace(dropout=lambda x: x)

    def forward(self, x: Tensor, functional: Any = F) -> Tensor:
        # F.scaled_dot_product_attention(x, x, x)
        return functional.dropout(self.F.dropout(self.dropout(x)))

    def dropout(self, x: Tensor) -> Tensor:
        return x


def test_functional_calls_are_found_whatever_their_name() -> None:
    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.dropout(x)

    report = pyfast.patch(nn.ModuleList([Inherits(), CallsNothing(), Local()]))
    (note,) = report.notes
    here = __name__
    assert f"F.scaled_dot_product_attention in {here}.Calls;" in note
    local = f"{here}.test_functional_calls_are_found_whatever_their_name.<locals>.Local"
    assert f"F.dropout in {here}.Calls, {local}." in note
    with pyfast.activate():
        assert pyfast.patch(Calls(), dry_run=True).notes


def test_no_functional_calls_no_note() -> None:
    report = pyfast.patch(CallsNothing())
    assert str(report) == "pyfast.patch: the model has no module that pyfast replaces"
    layer = nn.TransformerEncoderLayer(8, 2)
    assert pyfast.patch(layer).notes == []


def test_a_model_with_nothing_but_functional_calls_is_told_so() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x)

    lines = str(pyfast.patch(Bare())).splitlines()
    assert lines[0] == "pyfast.patch: the model has no module that pyfast replaces"
    assert lines[1].startswith("note: functions that patch does not replace") and len(lines) == 2


def test_classes_without_source_are_named() -> None:
    names = {"nn": nn, "__name__": "made_up"}
    exec("class Made(nn.Module):\n    def forward(self, x): return x", names)
    (note,) = pyfast.patch(names["Made"]()).notes
    assert note == "not searched for such functions, for want of source: made_up.Made"


def test_a_configuration_that_raises_does_no_harm() -> None:
    class Config:
        @property
        def _attn_implementation(self) -> str:
            raise RuntimeError

    model = nn.Sequential(nn.Dropout())
    model.config = Config()
    assert len(pyfast.patch(model).swapped) == 1


@pytest.mark.parametrize("name", ["timm", "bert"])
def test_int8_as_well(name: str) -> None:
    model, inputs = MODELS[name][0]()
    model.eval()
    expected = result(model, inputs)
    other = copy.deepcopy(model)
    planned = pyfast.patch(model, dry_run=True, int8=Int8WeightOnly())
    assert planned.int8 is None and classes(model) == classes(other)
    changed = pyfast.quantization.quantize_(other, Int8WeightOnly())
    assert f"int8: {len(changed.changed)} modules would be quantized" in planned.notes[0]
    report = pyfast.patch(model, int8=Int8WeightOnly())
    assert report.int8 is not None and len(report.int8.changed) == len(changed.changed)
    assert str(report.int8) in str(report)
    got = result(model, inputs)
    assert torch.equal(got, result(other, inputs))
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0.1)
    report.undo()
    kinds = classes(model)
    assert nn.Dropout in kinds and pyfast.nn.Dropout not in kinds
    assert pyfast.nn.Int8Linear in kinds
    assert torch.equal(result(model, inputs), got)


def test_int8_that_fails_changes_nothing() -> None:
    model, _ = make_bert()
    before = classes(model)
    with torch.no_grad():
        next(m for m in model.modules() if type(m) is nn.Linear).weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        pyfast.patch(model, int8=Int8WeightOnly())
    assert classes(model) == before
    calibration = pyfast.quantization.calibrate(nn.Linear(4, 4), [torch.ones(1, 4)])
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="calibration must have the input"):
        pyfast.patch(model, int8=Int8StaticActivationInt8Weight(calibration))
    assert classes(model)[1:] == [nn.Dropout, nn.Linear]


@pytest.mark.parametrize("scheduled", [False, True])
def test_optimizer_as_well(scheduled: bool) -> None:
    def train(step_by_step: list[str]) -> list[float]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.0), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2) if scheduled else None
        x = torch.randn(16, 4)
        losses, report = [], None
        for action in step_by_step:
            if action == "patch":
                assert pyfast.patch(model, True, optimizer=optimizer).optimizer is not None
                assert type(optimizer) is torch.optim.AdamW
                report = pyfast.patch(model, optimizer=optimizer)
                assert type(optimizer) is pyfast.optim.AdamW
                assert "the optimizer: torch.optim.adamw.AdamW to pyfast.optim" in str(report)
            elif action == "undo":
                assert report is not None
                report.undo()
                assert type(optimizer) is torch.optim.AdamW
            loss = (model(x) - x[:, :1]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            losses.append(loss.item())
        return losses

    stock = train(["", "", "", "", "", ""])
    assert train(["", "patch", "", "undo", "", ""]) == pytest.approx(stock, rel=1e-5)
    assert stock[-1] < stock[0]


class Unknown(torch.optim.SGD):
    pass


def test_refusals_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    before = classes(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"int8": "int8"}, TypeError, "patch: int8 must be a configuration .*, got str"),
        ({"int8": Int8WeightOnly}, TypeError, "got the class Int8WeightOnly"),
        ({"optimizer": Unknown(model.parameters(), 0.1)}, TypeError, "optimizer must be an inst"),
        ({"int8": Int8WeightOnly(), "optimizer": sgd}, ValueError, "must not be given together"),
    ]
    for arguments, kind, text in cases:
        for dry_run in (False, True):
            with pytest.raises(kind, match=text):
                pyfast.patch(model, dry_run, **arguments)
            assert classes(model) == before and type(sgd) is torch.optim.SGD


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_activations_of_transformers(name: str) -> None:
    """The same function and gradient; in bfloat16 closer to the exact ones."""
    activations = pytest.importorskip("transformers.activations")
    stock = activations.ACT2FN[name]
    patched = copy.deepcopy(stock)
    pyfast.patch(patched)
    assert type(patched) is not type(stock) and isinstance(patched, type(stock))
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64, requires_grad=True)
    exact = stock(x)
    torch.testing.assert_close(patched(x), exact)
    (grad,) = torch.autograd.grad(patched(x).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(exact.sum(), x)[0])
    wrong = [(f(x.bfloat16()).double() - exact).abs().max() for f in (patched, stock)]
    assert wrong[0] <= wrong[1]
