"""transformers' Trainer with pyfast's AdamW: the losses of torch's, on text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pyfast
from pyfast.demo.data import load_corpus, spaced_windows

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from pyfast.integrations.transformers import trainer_kwargs  # noqa: E402

CONTEXT = 32
STEPS = 12


@pytest.fixture(scope="module")
def data() -> list[dict[str, torch.Tensor]]:
    """Bytes of the standard library's sources."""
    windows = spaced_windows(load_corpus(None, CONTEXT).train, 4 * STEPS, CONTEXT)[:, :-1]
    return [{"input_ids": row, "labels": row} for row in windows]


def make_model() -> Any:
    """GPT-2, so that there are biases, norms and dropout."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def make_args(folder: Path, **changes: Any) -> Any:
    return transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "adam_beta2": 0.95,
            "weight_decay": 0.3,
            "max_grad_norm": 0.5,
            "optim": "adamw_torch",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **changes,
        }
    )


class Recording(transformers.Trainer):  # type: ignore[misc]
    """The losses before they are rounded for the log."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        losses = self.__dict__.setdefault("losses", [])
        losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
        return loss


def train(args: Any, data: Any, model: Any = None, resume: str | None = None, **kwargs: Any) -> Any:
    trainer = Recording(model or make_model(), args, train_dataset=data, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_losses(losses: list[float], expected: list[float]) -> None:
    assert len(losses) == len(expected) > 0
    # The two round differently in the last place; twelve steps of training multiply that.
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)


def test_losses_are_those_of_torch(tmp_path: Path, data: Any) -> None:
    args = make_args(tmp_path)
    expected = train(args, data)
    assert type(expected.optimizer.optimizer) is torch.optim.AdamW
    assert expected.losses[-1] < 0.8 * expected.losses[0]
    made_by_trainer = train(args, data, **trainer_kwargs(args))
    assert type(made_by_trainer.optimizer.optimizer) is pyfast.optim.AdamW
    assert_same_losses(made_by_trainer.losses, expected.losses)

    model = make_model()
    made_before = train(args, data, model, **trainer_kwargs(args, model))
    assert_same_losses(made_before.losses, expected.losses)
    for trainer in (made_by_trainer, made_before):
        for group, torch_group in zip(
            trainer.optimizer.param_groups, expected.optimizer.param_groups, strict=True
        ):
            assert [p.shape for p in group["params"]] == [p.shape for p in torch_group["params"]]
            for name in ("initial_lr", "lr", "betas", "eps", "weight_decay"):
                assert group[name] == torch_group[name]


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.0}, {"adam_beta2": 0.999}, {"learning_rate": 1.01e-2}]
)
def test_comparison_rejects(tmp_path: Path, data: Any, change: dict[str, float]) -> None:
    """Mutants: an argument that is not passed on."""
    args, model = make_args(tmp_path), make_model()
    expected = train(args, data)
    other = train(args, data, model, **trainer_kwargs(make_args(tmp_path, **change), model))
    with pytest.raises(AssertionError):
        assert_same_losses(other.losses, expected.losses)


def test_checkpoint_of_torch_is_resumed(tmp_path: Path, data: Any) -> None:
    args = make_args(tmp_path, save_strategy="steps", save_steps=STEPS // 2)
    expected = train(args, data)
    checkpoint = str(tmp_path / f"checkpoint-{STEPS // 2}")
    resumed = train(args, data, resume=checkpoint, **trainer_kwargs(args))
    assert_same_losses(resumed.losses, expected.losses[STEPS // 2 :])


def test_options_of_the_optimizer(tmp_path: Path, data: Any) -> None:
    args = make_args(tmp_path, max_grad_norm=0)
    options = {"state_dtype": "int8", "max_grad_norm": 0.5}
    trainer = train(args, data, **trainer_kwargs(args, **options))
    optimizer = trainer.optimizer.optimizer
    assert optimizer.grad_norm > 0
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.uint8}
    torch.testing.assert_close(
        torch.tensor(trainer.losses),
        torch.tensor(train(make_args(tmp_path), data).losses),
        rtol=0.02,
        atol=0,
    )


def test_rejects(tmp_path: Path) -> None:
    args = make_args(tmp_path)
    with pytest.raises(TypeError, match=r"args must be transformers.TrainingArguments, got dict"):
        trainer_kwargs({})
    with pytest.raises(ValueError, match=r"'adamw_torch_fused'.*, got 'adafactor'"):
        trainer_kwargs(make_args(tmp_path, optim="adafactor"))
    with pytest.raises(ValueError, match=r"args.max_grad_norm must be 0, got 0.5"):
        trainer_kwargs(args, max_grad_norm=1.0)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        trainer_kwargs(args, [])
    with pytest.raises(ValueError, match="a parameter that needs a gradient"):
        trainer_kwargs(args, make_model().requires_grad_(False))
