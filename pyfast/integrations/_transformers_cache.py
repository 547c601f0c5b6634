"""A cache of keys and values for transformers' models that appends in place."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

_cache: Any = importlib.import_module("transformers.cache_utils")

MIN_ROOM = 256  # tokens


class _Room:
    """Memory for more tokens than there are; ``used`` of them have been written."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.used = 0

    def holds(self, kept: Tensor) -> bool:
        """True where ``kept`` (B, H, L, E) is all that was written, so that more may follow."""
        memory = self.memory
        return (
            memory is not None
            and kept.data_ptr() == memory.data_ptr()
            and kept.stride() == memory.stride()
            and kept.shape[2] == self.used
            and not (memory.is_inference() and not torch.is_inference_mode_enabled())
        )

    def append(self, kept: Tensor | None, new: Tensor) -> Tensor:
        """(B, H, L, E) and (B, H, n, E) as one view of (B, H, L + n, E). None for no tokens."""
        length = 0 if kept is None else kept.shape[2]
        total = length + new.shape[2]
        memory = self.memory
        if memory is None or total > memory.shape[2] or kept is None or not self.holds(kept):
            room = total + max(MIN_ROOM, total // 4)
            memory = new.new_empty((*new.shape[:2], room, new.shape[3]))
            if kept is not None:
                memory[:, :, :length].copy_(kept)
            self.memory = memory
        memory[:, :, length:total].copy_(new)
        self.used = total
        return memory[:, :, :total]


def _fits(kept: Any, new: Tensor) -> bool:
    """True where ``new`` is of the kind of what is there; torch.cat promotes or refuses others."""
    return not isinstance(kept, Tensor) or kept.numel() == 0 or (
        (kept.shape[:2], kept.shape[3], kept.dtype, kept.device)
        == (new.shape[:2], new.shape[3], new.dtype, new.device)
    )  # fmt: skip


class _GrowingLayer(_cache.DynamicLayer):  # type: ignore[misc]
    keys: Any
    values: Any

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._rooms = _Room(), _Room()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        pairs = ((self.keys, key_states), (self.values, value_states))
        # With gradients, what a query was multiplied with must not change any more.
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or not (self.is_initialized and all(_fits(*pair) for pair in pairs))
        ):
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        self.keys, self.values = (
            room.append(kept if kept.numel() else None, new)
            for room, (kept, new) in zip(self._rooms, pairs, strict=True)
        )
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        held = [
            isinstance(kept, Tensor) and room.holds(kept)
            for room, kept in zip(self._rooms, (self.keys, self.values), strict=True)
        ]
        super().crop(tokens_to_remove)
        for room, kept, was_held in zip(self._rooms, (self.keys, self.values), held, strict=True):
            if was_held:
                room.used = kept.shape[2]

    def reset(self) -> None:
        super().reset()
        self._rooms = _Room(), _Room()

    def offload(self) -> None:
        super().offload()
        self._rooms = _Room(), _Room()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have no room: it would be shared, or saved."""
        state = self.__dict__ | {"_rooms": (_Room(), _Room())}
        kept = {name: state.get(name) for name in ("keys", "values")}
        return state | {name: t.clone() for name, t in kept.items() if isinstance(t, Tensor)}


class GrowingCache(_cache.DynamicCache):  # type: ignore[misc]
    """Replaces ``transformers.DynamicCache``, for decoding: new tokens are written behind the old.

    transformers' own concatenates, which reads and writes the whole cache for every token. This one
    keeps a quarter more memory than there are tokens (at least 256 tokens a layer) and copies only
    when that is full. Differences: what ``update`` returned before a ``crop`` changes when tokens
    are appended after it; keys and values are views with a stride between heads. Layers with a
    sliding window, and other special ones, stay transformers'. Where gradients are enabled (not in
    ``generate``), in compiled code and for the first tokens, it concatenates. Beam search reorders
    the cache, and copies it, at each step.

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
