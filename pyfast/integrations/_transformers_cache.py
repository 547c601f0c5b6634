"""A cache of keys and values for transformers' models that appends in place."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

_cache: Any = importlib.import_module("transformers.cache_utils")

MIN_ROOM = 256  # tokens


class _Room:
    """Memory for more tokens than there are."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def append(self, kept: Tensor | None, new: Tensor) -> Tensor:
        """(B, H, L, E) and (B, H, n, E) as one view of (B, H, L + n, E). ``kept`` is what the call
        before gave, cut at the end or not, or any other tensor, which is copied."""
        length = 0 if kept is None or kept.numel() == 0 else kept.shape[2]
        total = length + new.shape[2]
        memory = self._memory
        if memory is None or not self._holds(memory, kept, length, total, new):
            room = total + max(MIN_ROOM, total // 4)
            memory = new.new_empty((*new.shape[:2], room, new.shape[3]))
            if length:
                memory[:, :, :length].copy_(kept)  # type: ignore[arg-type]
            self._memory = memory
        memory[:, :, length:total].copy_(new)
        return memory[:, :, :total]

    @staticmethod
    def _holds(memory: Tensor, kept: Tensor | None, length: int, total: int, new: Tensor) -> bool:
        return (
            total <= memory.shape[2]
            and memory.shape[:2] == new.shape[:2]
            and (memory.shape[3], memory.dtype, memory.device)
            == (new.shape[3], new.dtype, new.device)
            and not (memory.is_inference() and not torch.is_inference_mode_enabled())
            and (
                length == 0
                or (
                    kept is not None
                    and kept.data_ptr() == memory.data_ptr()
                    and kept.stride() == memory.stride()
                )
            )
        )


class _GrowingLayer(_cache.DynamicLayer):  # type: ignore[misc]
    keys: Any
    values: Any

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._rooms = _Room(), _Room()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        needs_grad = torch.is_grad_enabled() and (
            key_states.requires_grad or value_states.requires_grad
        )
        if needs_grad or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._rooms[0].append(self.keys, key_states)
        self.values = self._rooms[1].append(self.values, value_states)
        return self.keys, self.values


class GrowingCache(_cache.DynamicCache):  # type: ignore[misc]
    """Replaces ``transformers.DynamicCache``, for decoding: new tokens are written behind the old.

    transformers' own concatenates, which reads and writes the whole cache for every token. This one
    keeps a quarter more memory than there are tokens (at least 256 tokens a layer) and copies only
    when that is full. Differences: what ``update`` returned before a ``crop`` changes when tokens
    are appended after it; keys and values are views with a stride between heads. Layers with a
    sliding window, and other special ones, stay transformers'. Where keys need a gradient, and in
    compiled code, it concatenates. Beam search reorders the cache, and copies it, at each step.

    Args:
        config: the model's, which tells the kinds of its layers. Default: all attend to everything
        options: as for ``DynamicCache``.
    """

    layers: list[Any]

    def __init__(self, config: Any = None, **options: Any) -> None:
        super().__init__(config=config, **options)
        self.layers = [
            _GrowingLayer() if type(layer) is _cache.DynamicLayer and not layer.is_initialized
            else layer
            for layer in self.layers
        ]  # fmt: skip
        if getattr(self, "layer_class_to_replicate", None) is _cache.DynamicLayer:
            self.layer_class_to_replicate = _GrowingLayer
