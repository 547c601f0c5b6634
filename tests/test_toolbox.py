"""pyfast in accelerate, Lightning, peft and safetensors: small runs, compared with torch's own."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import pyfast
from pyfast.demo.data import load_corpus, spaced_windows
from pyfast.quantization import (
    Int8DynamicActivationInt8Weight,
    Int8WeightOnly,
    dequantize_,
    quantize_,
)

CONTEXT = 16
STEPS = 10
Losses = list[float]


class Model(nn.Module):
    """Bytes in, logits of the next byte out; without dropout, so that two runs can be compared."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.attention = nn.MultiheadAttention(32, 4, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.dropout = nn.Dropout(dropout)
        self.linear1 = nn.Linear(32, 64)
        self.linear2 = nn.Linear(64, 32)
        self.head = nn.Linear(32, 256)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        x = x + self.dropout(self.linear2(F.gelu(self.linear1(self.norm(x)))))
        out: Tensor = self.head(x)
        return out


def make_model(dropout: float = 0.0, *, is_patched: bool = True) -> Model:
    torch.manual_seed(1)
    model = Model(dropout)
    if is_patched:
        assert len(pyfast.patch(model).swapped) == 2
    return model


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    """Bytes of the standard library's sources."""
    return list(spaced_windows(load_corpus(None, CONTEXT).train, 8 * STEPS, CONTEXT).split(8))


def assert_same_losses(losses: Losses, expected: Losses, rtol: float = 1e-5) -> None:
    """By default to the rounding of float32, which ten steps of training multiply."""
    assert len(losses) == len(expected) == STEPS
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=rtol, atol=0)


@pytest.fixture
def accelerator_state() -> Iterator[None]:
    """accelerate's accelerators share one state for the process."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(True)
    yield
    state.AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("accelerator_state")
@pytest.mark.parametrize(("precision", "rtol"), [("no", 1e-5), ("bf16", 2e-2)])
def test_accelerate(batches: list[Tensor], precision: str, rtol: float) -> None:
    """prepare, backward, clipping, a scheduler and the step."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, limit: float = 0.5) -> Losses:
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=4)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        losses = []
        for batch in batches:
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), limit)
            assert norm > 0.5
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    for make in (
        lambda model, package: package.AdamW(model.parameters(), lr=1e-2),
        lambda model, package: package.SGD(model.parameters(), lr=0.5, momentum=0.9),
    ):
        stock, patched = make_model(is_patched=False), make_model()
        expected = train(stock, make(stock, torch.optim))
        losses = train(patched, make(patched, pyfast.optim))
        assert_same_losses(losses, expected, rtol)
        assert expected[-1] < 0.9 * expected[0]
    other = make_model()  # SGD, whose steps are as long as its gradients
    losses = train(other, make(other, pyfast.optim), limit=5.0)
    with pytest.raises(AssertionError):
        assert_same_losses(losses, expected, rtol)


def lightning_run(
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    batches: list[Tensor],
    precision: str,
    limit: float | None = 0.5,
) -> tuple[Losses, list[float]]:
    """Losses, and the norms of the gradients that the steps saw."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()
            self.losses: Losses = []
            self.norms: list[float] = []

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss = loss_of(self.model, batch)
            self.losses.append(loss.item())
            return loss

        def on_train_batch_end(self, *args: Any) -> None:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            self.norms.append(float(nn.utils.get_total_norm(grads)))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(self.parameters())

    module = Module()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if precision == "16-mixed" else None
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        plugins=[MixedPrecision(precision, "cpu", scaler)],
        gradient_clip_val=limit,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return module.losses, module.norms


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("precision", "rtol"), [("bf16-mixed", 2e-2), ("16-mixed", 5e-3)])
def test_lightning(batches: list[Tensor], precision: str, rtol: float) -> None:
    """Clipping with AMP, which Lightning refuses for optimizers that say that they unscale."""
    run = functools.partial(lightning_run, batches=batches, precision=precision)
    expected, _ = run(lambda p: torch.optim.SGD(p, 0.5, 0.9))
    limit = 0.5 * (1 + 1e-4)
    for make in (
        lambda p: pyfast.optim.SGD(p, 0.5, 0.9),
        lambda p: pyfast.patch_optimizer(torch.optim.SGD(p, 0.5, 0.9)),
    ):
        losses, norms = run(make)
        # Products in half precision: weights that differ in their last place can differ by a
        # rounding of the half type in them.
        assert_same_losses(losses, expected, rtol)
        assert max(norms) < limit and losses[-1] < 0.9 * losses[0]
    losses, norms = run(lambda p: pyfast.optim.AdamW(p, 1e-2))
    assert max(norms) < limit and losses[-1] < 0.9 * losses[0]

    losses, norms = run(lambda p: pyfast.optim.SGD(p, 0.5, 0.9), limit=None)
    assert max(norms) > 0.6
    with pytest.raises(AssertionError):
        assert_same_losses(losses, expected, rtol)


def peft_model(model: nn.Module, *targets: str) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), lora_dropout=0.0)
    return peft.get_peft_model(model, config)


def train(model: nn.Module, batches: list[Tensor], package: Any = pyfast.optim) -> Losses:
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = package.AdamW(params, lr=2e-2)
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """What is not an adapter's."""
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}


def assert_same_state(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lora_on_patched(batches: list[Tensor]) -> None:
    """Adapters for nn.MultiheadAttention and nn.Linear, losses as on the stock model."""
    targets = ("attention", "linear1", "linear2")
    expected = train(peft_model(make_model(is_patched=False), *targets), batches, torch.optim)
    assert expected[-1] < 0.98 * expected[0]
    model = peft_model(make_model(), *targets)
    base = model.base_model.model
    assert type(base.attention.base_layer) is pyfast.nn.MultiheadAttention
    assert type(base.dropout) is pyfast.nn.Dropout
    before = base_state(model)
    assert_same_losses(train(model, batches), expected)
    after = base_state(model)
    for name in list(before):  # peft adds to these in each forward, and subtracts afterwards
        if "attention" in name:
            torch.testing.assert_close(after.pop(name), before.pop(name), rtol=0, atol=1e-5)
    assert_same_state(after, before)

    model.eval()
    with torch.no_grad():
        y = model(batches[0])
        plain = make_model().eval()(batches[0])
        merged = model.merge_and_unload()
        assert type(merged.attention) is pyfast.nn.MultiheadAttention
        torch.testing.assert_close(merged(batches[0]), y, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, plain, rtol=1e-2, atol=1e-2)

    with_dropout = peft_model(make_model(0.2), *targets)
    losses = train(with_dropout, batches)
    assert losses[-1] < losses[0]
    with pytest.raises(AssertionError):
        assert_same_losses(losses, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [Int8WeightOnly(), Int8DynamicActivationInt8Weight()])
def test_lora_on_int8(batches: list[Tensor], config: Any, dtype: torch.dtype) -> None:
    """Adapters train on frozen int8 weights. Merging is refused until these are dequantized."""
    base = make_model().to(dtype)
    quantize_(base, config, lambda module, path: path != "head")
    model = peft_model(base, "linear1", "linear2", "head")
    assert type(base.linear1.base_layer) is pyfast.nn.Int8Linear
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 6 and all("lora_" in n for n in names)
    before = base_state(model)
    losses = train(model, batches)
    assert losses[-1] < 0.97 * losses[0]
    assert_same_state(base_state(model), before)

    model.eval()
    with torch.no_grad():
        y = model(batches[0])
        assert y.dtype == dtype
        with pytest.raises(RuntimeError, match="can't be cast"):
            model.merge_adapter()
        assert_same_state(base_state(model), before)
        assert torch.equal(model(batches[0]), y)
        dequantize_(model)
        merged = model.merge_and_unload()
        assert type(merged.linear1) is nn.Linear
        # One more rounding of each weight to its dtype; with int8_dynamic, inputs were rounded.
        error = (merged(batches[0]) - y).float().norm() / y.float().norm()
        assert error < (1e-5 if (dtype, config.mode) == (torch.float32, "weight_only") else 3e-2)


def test_lora_on_transformers_int8(batches: list[Tensor], tmp_path: Path) -> None:
    """The Trainer accepts the model with adapters, and they are saved without the base."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    peft = pytest.importorskip("peft")
    integration = importlib.import_module("pyfast.integrations.transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    load = functools.partial(
        transformers.AutoModelForCausalLM.from_pretrained,
        tmp_path / "base",
        quantization_config=integration.PyfastConfig("int8_dynamic"),
    )
    model = peft_model(load(), "q_proj", "v_proj", "up_proj", "down_proj")
    before = base_state(model)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=3e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = torch.cat(batches)
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(
        model, args, train_dataset=data, **integration.trainer_kwargs(args)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS and losses[-1] < 0.97 * losses[0]
    assert_same_state(base_state(model), before)
    model.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert_same_state(again.state_dict(), model.state_dict())
    assert torch.equal(again(rows[:2]).logits, model(rows[:2]).logits)


@pytest.mark.parametrize("kind", ["patched", "int8"])
def test_safetensors(batches: list[Tensor], tmp_path: Path, kind: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")

    def make() -> nn.Module:
        model = make_model(is_patched=kind == "patched")
        model.head.weight = nn.Parameter(model.embedding.weight.detach() * 2)
        if kind == "int8":
            report = quantize_(model, Int8WeightOnly(embeddings=True))
            assert len(report.changed) == 5
        return model.eval()

    model, file = make(), str(tmp_path / "model.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randint_like(parameter, -127, 128))
    safetensors.save_model(model, file)
    other = make()
    with pytest.raises(AssertionError):
        assert_same_state(dict(other.state_dict()), dict(model.state_dict()))
    missing, unexpected = safetensors.load_model(other, file)
    assert not missing and not unexpected
    assert_same_state(dict(other.state_dict()), dict(model.state_dict()))
    with torch.no_grad():
        assert torch.equal(other(batches[0]), model(batches[0]))
    if kind == "int8":
        stored = safetensors.load_file(file)
        assert stored["linear1.weight"].dtype == torch.int8
        assert stored["linear1.weight_scale"].dtype == torch.float32
        with pytest.raises(RuntimeError, match="weight_scale"):
            safetensors.load_model(make_model(), file)
