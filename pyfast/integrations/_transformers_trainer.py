"""transformers: what its Trainer takes to train with pyfast's AdamW."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from ..optim import AdamW

_SERVED = ("adamw_torch", "adamw_torch_fused")


def trainer_kwargs(args: Any, model: nn.Module | None = None, **options: Any) -> dict[str, Any]:
    """Arguments that make transformers' Trainer use :class:`pyfast.optim.AdamW`::

        trainer = Trainer(model, args, train_dataset=data, **trainer_kwargs(args))

    They replace ``torch.optim.AdamW``, which ``TrainingArguments(optim="adamw_torch")`` and
    ``"adamw_torch_fused"`` stand for: ``optim`` accepts no names of others. Learning rate, betas,
    epsilon and weight decay are those of ``args``, and biases and norms have no decay, as with
    torch's. Checkpoints of either optimizer can be resumed with the other.

    Without ``model``, the Trainer makes the optimizer when it needs it (``model_init``, FSDP and
    hyperparameter search need that). With it, the optimizer is made now, for
    ``Trainer(optimizers=(optimizer, scheduler))``: to be looked at, or to go with a scheduler of
    your own::

        optimizer, _ = trainer_kwargs(args, model)["optimizers"]
        trainer = Trainer(model, args, optimizers=(optimizer, OneCycleLR(optimizer, 1e-3, 100)))

    Args:
        args: ``transformers.TrainingArguments``.
        model: where it will be trained (on its device). Default: None
        options: further arguments of AdamW: ``state_dtype="int8"``, ``ema_decay=0.999``, ...
            ``max_grad_norm`` goes with ``TrainingArguments(max_grad_norm=0)``, because the Trainer
            clips too.

    Returns:
        ``{"optimizer_cls_and_kwargs": (AdamW, {...})}`` without ``model``, else
        ``{"optimizers": (optimizer, None)}``; for None the Trainer makes its scheduler.

    Raises:
        TypeError: if ``args`` is no TrainingArguments or ``model`` no module.
        ValueError: if ``args.optim`` is another optimizer than torch's AdamW, gradients would be
            clipped twice, or ``model`` has no parameter that needs a gradient.
    """
    transformers: Any = importlib.import_module("transformers")
    if not isinstance(args, transformers.TrainingArguments):
        raise TypeError(
            "trainer_kwargs: args must be transformers.TrainingArguments, "
            f"got {type(args).__name__}"
        )
    optim = getattr(args.optim, "value", args.optim)
    if optim not in _SERVED:
        raise ValueError(
            f"trainer_kwargs: args.optim must be {' or '.join(map(repr, _SERVED))}, which pyfast's "
            f"AdamW replaces, got {optim!r}"
        )
    if options.get("max_grad_norm") is not None and args.max_grad_norm:
        raise ValueError(
            "trainer_kwargs: max_grad_norm clips in the step of the optimizer, so that "
            f"args.max_grad_norm must be 0, got {args.max_grad_norm}"
        )
    values = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        **options,
    }
    if model is None:
        return {"optimizer_cls_and_kwargs": (AdamW, values)}
    return {"optimizers": (AdamW(_groups(transformers, args, model), **values), None)}


def _groups(transformers: Any, args: Any, model: nn.Module) -> list[dict[str, Any]]:
    """The Trainer's two groups: with weight decay, and without."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"trainer_kwargs: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("trainer_kwargs: model must have a parameter that needs a gradient")
    return [
        {
            "params": [p for name, p in named if (name in decayed) == has_decay],
            "weight_decay": args.weight_decay if has_decay else 0.0,
        }
        for has_decay in (True, False)
    ]
