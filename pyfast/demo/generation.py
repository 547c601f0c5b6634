"""Text of a trained GPT, byte by byte, with caches of the keys and values it has computed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfast

from .model import GPT

TEMPERATURE = 0.8


class Decoder:
    """A GPT that reads bytes and keeps their keys and values.

    Args:
        model: in eval mode; its layers may be pyfast's, and quantized.
        cache_dtype: the model's, or int8: then with one float32 scale for each token and head.
    """

    def __init__(self, model: GPT, cache_dtype: torch.dtype) -> None:
        self.model, self.length = model, 0
        self.context, width = model.positions.weight.shape
        self._layers: list[tuple[Any, Tensor, Tensor | None]] = []
        block: Any
        for block in model.blocks:
            heads = block.self_attn.num_heads
            shape = (2, 1, heads, self.context, width // heads)  # keys, values
            device = model.positions.weight.device
            cache = torch.zeros(shape, dtype=cache_dtype, device=device)
            scales = torch.zeros(shape[:-1], device=device) if cache_dtype == torch.int8 else None
            self._layers.append((block, cache, scales))

    def read(self, text: list[int]) -> Tensor:  # [256]
        """The logits of the byte that follows; ``length`` grows by that of the text."""
        model, end = self.model, self.length + len(text)
        x = torch.tensor([text], device=model.positions.weight.device)
        y = model.bytes(x) + model.positions.weight[self.length : end]
        for block, cache, scales in self._layers:
            y = y + self._attend(block.self_attn, block.norm1(y), cache, scales)
            y = y + block.linear2(block.activation(block.linear1(block.norm2(y))))
        self.length = end
        logits: Tensor = model.head(model.norm(y[0, -1]))
        return logits

    def _attend(self, attention: Any, y: Tensor, cache: Tensor, scales: Tensor | None) -> Tensor:
        if isinstance(attention, pyfast.nn.Int8MultiheadAttention):
            projected = attention._project(y, y, y)
        else:
            projected = F.linear(y, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in projected)
        k_scale, v_scale = (None, None) if scales is None else scales
        k_cache, v_cache = cache
        heads = pyfast.nn.functional.attention_with_kv_cache(
            q, k_cache, v_cache, k, v, self.length, True, k_scale=k_scale, v_scale=v_scale
        )
        result: Tensor = attention.out_proj(heads.transpose(1, 2).flatten(2))
        return result


@torch.no_grad()
def generate(
    model: GPT, prompt: bytes, length: int, seed: int, cache_dtype: torch.dtype = torch.float32
) -> bytes:
    """The prompt and ``length`` bytes more; less where a model gives NaN.

    Positions are learned, so that a full cache cannot move on: it is made anew of the last half of
    the context.
    """
    model.eval()
    decoder = Decoder(model, cache_dtype)
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    logits = decoder.read(text[-decoder.context :])
    for index in range(length):
        chances = (logits.float().cpu() / TEMPERATURE).softmax(0)
        if not chances.isfinite().all():
            break
        text.append(int(torch.multinomial(chances, 1, generator=generator)))
        if index + 1 == length:
            break
        if decoder.length == decoder.context:
            decoder.length = 0
            logits = decoder.read(text[-max(1, decoder.context // 2) :])
        else:
            logits = decoder.read(text[-1:])
    return bytes(text)


def readable(text: bytes) -> str:
    """As characters that a terminal shows."""
    return "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}"
        for c in text.decode(errors="replace")
    )
