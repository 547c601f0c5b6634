"""``pyfast.activate`` on models of other packages, against torch's functions.

In training the oracle is the same model on plain functions that drop what pyfast's seeds stand for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from activation_cases import next_seed, nothing_stays, served
from timm_alone import import_vision_transformer
from torch import Tensor

import pyfast

__all__ = ["nothing_stays"]
pytestmark = pytest.mark.usefixtures("nothing_stays")
P = 0.25  # its threshold is exact


class Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.bias = nn.Parameter(torch.randn(heads, 1, 16))  # learned: its gradient is wanted

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = torch.full((length, length), -torch.inf).triu(1) + self.bias[..., :length]
        p = P if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return F.dropout(self.proj(y.transpose(1, 2).reshape(x.shape)), P, self.training)


class Gpt(nn.Module):
    """As people write it by hand: with functional calls, a mask of its own, and one module."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.drop = nn.Embedding(11, 16), nn.Dropout(P)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.attentions = nn.ModuleList(Attention(16, 2) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(self.embedding(ids))
        for i in range(2):
            x = x + self.attentions[i](self.norms[2 * i](x))
            y = self.mlps[i](self.norms[2 * i + 1](x)).relu()
            x = x + F.dropout(y, p=P, training=self.training)
        return x @ self.embedding.weight.T


def make_gpt() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Gpt(), (torch.randint(11, (2, 9)),)


def make_vit() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = import_vision_transformer().VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5,
        drop_rate=P, pos_drop_rate=P, proj_drop_rate=P, attn_drop_rate=P,
    )  # fmt: skip
    return model, (torch.randn(2, 3, 16, 16),)


def make_x_transformer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    x_transformers = pytest.importorskip("x_transformers")
    layers = x_transformers.Decoder(
        dim=32, depth=2, heads=4, attn_kv_heads=2, attn_flash=True,
        attn_dropout=P, ff_dropout=P, rotary_pos_emb=True,
    )  # fmt: skip
    model = x_transformers.TransformerWrapper(
        num_tokens=13, max_seq_len=16, attn_layers=layers, emb_dropout=P
    )
    return model, (torch.randint(13, (2, 10)),)


def make_diffusers_block() -> tuple[nn.Module, tuple[Tensor, ...]]:
    attention = pytest.importorskip("diffusers.models.attention")
    processors = pytest.importorskip("diffusers.models.attention_processor")
    block = attention.BasicTransformerBlock(
        dim=24, num_attention_heads=3, attention_head_dim=8, dropout=P, cross_attention_dim=12
    )
    assert isinstance(block.attn1.processor, processors.AttnProcessor2_0)
    return block, (torch.randn(2, 9, 24), None, torch.randn(2, 5, 12))  # type: ignore[return-value]


def make_encoder() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, P, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return model, (torch.randn(2, 7, 16),)


MODELS = {
    "gpt": (make_gpt, 2, 5),
    "timm": (make_vit, 2, 8),
    "x_transformers": (make_x_transformer, 2, 3),
    "diffusers": (make_diffusers_block, 2, 3),
    "torch": (make_encoder, 2, 6),
}
every_model = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(1)
    return MODELS[name][0]()


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output, and the gradient of each parameter that has one."""
    torch.manual_seed(7)
    y = model(*inputs)
    used = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
    grads = torch.autograd.grad(loss, list(used.values()), allow_unused=True)
    return {"": y.detach()} | {n: g for n, g in zip(used, grads, strict=True) if g is not None}


def plain_dropout(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if not training or p == 0:
        return x
    return x * (pyfast.dropout_mask(x.shape, p, next_seed()) / (1 - p))


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    if dropout_p:
        keep = pyfast.dropout_mask(weights.shape, dropout_p, next_seed(), stream=0)
        weights = weights * (keep / (1 - dropout_p))
    return weights @ v


@contextlib.contextmanager
def plain_functions(attention: Callable[..., Any] = plain_attention) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", plain_dropout)
        patch.setattr(F, "scaled_dot_product_attention", attention)
        yield


@every_model
def test_evaluation_matches_torch(name: str) -> None:
    model, inputs = make(name)
    model.eval()
    expected = run(model, inputs)
    with pyfast.activate():
        got = run(model, inputs)
    assert got.keys() == expected.keys()
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@every_model
def test_every_call_is_reached(name: str) -> None:
    model, inputs = make(name)
    with torch.no_grad(), pyfast.activate():
        ops = served(lambda: model.train()(*inputs))
        in_evaluation = served(lambda: model.eval()(*inputs))
    _, attentions, dropouts = MODELS[name]
    assert ops.count("attention:cpu") == attentions
    assert ops.count("dropout:cpu") == dropouts
    assert in_evaluation == ["attention:cpu"] * attentions
    assert served(lambda: model.train()(*inputs)) == []


@every_model
def test_training_drops_what_pyfast_drops(name: str) -> None:
    model, inputs = make(name)
    model.train()
    stock = run(model, inputs)
    with plain_functions():
        expected = run(model, inputs)
    with pyfast.activate():
        got = run(model, inputs)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    again = run(model, inputs)
    assert all(torch.equal(again[n], stock[n]) for n in stock)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(stock, expected, atol=2e-5, rtol=1e-4)


def test_a_wrong_mask_is_noticed() -> None:
    def without_mask(*args: Any, **kwargs: Any) -> Tensor:
        return plain_attention(*args, **{**kwargs, "attn_mask": None})

    model, inputs = make("gpt")
    with plain_functions(without_mask):
        wrong = run(model, inputs)
    with pyfast.activate(), pytest.raises(AssertionError):
        torch.testing.assert_close(run(model, inputs), wrong, atol=2e-5, rtol=1e-4)


def test_padding_of_an_encoder() -> None:
    """Torch's fast path is off: outputs agree where there is something."""
    model, (x,) = make("torch")
    model.eval()
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        with pyfast.activate():
            got = model(x, src_key_padding_mask=padding)
            unpadded = model(x)
    torch.testing.assert_close(got[~padding], expected[~padding])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(unpadded[~padding], expected[~padding])


def test_a_model_trains_while_it_is_on() -> None:
    model, (ids,) = make("gpt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    with pyfast.activate():
        for _ in range(40):
            logits = model(ids)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
