"""The loss of transformers' causal language models from logits in their own dtype."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.cross_entropy import cross_entropy

_losses: Any = importlib.import_module("transformers.loss.loss_utils")
_models: Any = importlib.import_module("transformers.modeling_utils")


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Replaces transformers' ``ForCausalLMLoss``: the same number, in float32, without a copy of
    the logits in it; see :func:`pyfast.nn.functional.cross_entropy`."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = cross_entropy(
        logits.reshape(-1, vocab_size),
        shift_labels.reshape(-1).to(logits.device),
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
        dtype=torch.float32,
    )
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def find(model: nn.Module) -> list[Any]:
    """The models in ``model`` whose loss this is."""
    found = []
    for module in model.modules():
        if isinstance(module, _models.PreTrainedModel):
            with contextlib.suppress(AttributeError, NotImplementedError):  # models without either
                has_head = module.get_output_embeddings() is not None
                if has_head and module.loss_function is _losses.ForCausalLMLoss:
                    found.append(module)
    return found


def replace(model: Any) -> None:
    model.loss_function = causal_lm_loss


def restore(model: Any) -> None:
    if vars(model).get("_loss_function") is causal_lm_loss:
        del model._loss_function
