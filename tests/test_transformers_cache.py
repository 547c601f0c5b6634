"""The cache that appends in place: what transformers' own gives, without copying it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers.cache_utils import DynamicCache  # noqa: E402

from pyfast.integrations import _transformers_cache  # noqa: E402
from pyfast.integrations.transformers import GrowingCache, register  # noqa: E402

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, **HEADS),
    "mistral": lambda: transformers.MistralConfig(**SIZES, **HEADS, sliding_window=8),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97),
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    register()
    kind = transformers.AutoModelForCausalLM
    return kind.from_config(CONFIGS[name](), attn_implementation="pyfast").eval()


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is filled several times."""
    monkeypatch.setattr(_transformers_cache, "MIN_ROOM", 3)


def states(n: int, seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 2, n, 4, generator=generator) for _ in "kv")  # type: ignore[return-value]


def check_steps(cache: Any, other: Any) -> None:
    """A prompt, tokens one by one, a cut, more tokens, other batches."""
    seed = 0

    def add(n: int, batch: int = 2) -> None:
        nonlocal seed
        seed += 1
        results = [c.update(*states(n, seed, batch), layer_idx=0) for c in (cache, other)]
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert cache.get_seq_length() == other.get_seq_length()

    add(5)
    for _ in range(12):
        add(1)
    for c in (cache, other):
        c.crop(-6)
    add(3), add(9)
    copies = copy.deepcopy(cache), copy.deepcopy(other)
    for c in (cache, other):
        c.batch_repeat_interleave(2)
    add(1, 4), add(1, 4)
    for c in (cache, other):
        c.batch_select_indices(torch.tensor([3, 0]))
    add(1), add(4)
    for c in (cache, other):
        c.reorder_cache(torch.tensor([1, 0]))
    add(1), add(1)
    cache, other = copies
    add(2), add(1)
    for c in (cache, other):
        c.reset()
    add(4), add(1)


def test_is_what_concatenation_gives() -> None:
    check_steps(GrowingCache(), DynamicCache())


def test_check_rejects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is taken for that of the cache although it is another's."""
    monkeypatch.setattr(
        _transformers_cache._Room,
        "_holds",
        staticmethod(lambda memory, kept, length, total, new: total <= memory.shape[2]),
    )
    with pytest.raises((AssertionError, RuntimeError)):
        check_steps(GrowingCache(), DynamicCache())


def test_appends_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transformers_cache, "MIN_ROOM", 100)
    cache = GrowingCache()
    first, _ = cache.update(*states(5, 0), layer_idx=0)
    for step in range(90):
        keys, values = cache.update(*states(1, step), layer_idx=0)
        assert keys.data_ptr() == first.data_ptr() and keys.shape[2] == 6 + step
    assert keys.data_ptr() != values.data_ptr()


def test_inference_mode_and_gradients() -> None:
    cache, other = GrowingCache(), DynamicCache()
    with torch.inference_mode():
        for c in (cache, other):
            c.update(*states(2, 0), layer_idx=0)
    for c in (cache, other):
        c.update(*states(1, 1), layer_idx=0)
    keys, values = (t.requires_grad_() for t in states(1, 2))
    for c in (cache, other):
        got, _ = c.update(keys, values, layer_idx=0)
        (grad,) = torch.autograd.grad(got.square().sum(), keys)
        torch.testing.assert_close(grad, 2 * keys.detach())
    torch.testing.assert_close(cache.layers[0].keys, other.layers[0].keys, rtol=0, atol=0)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_generates_the_same(name: str, beams: int) -> None:
    model = model_of(name)
    ids = torch.arange(22).view(2, 11) % 97
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"max_new_tokens": 14, "num_beams": beams, "do_sample": False, "min_new_tokens": 14}
    expected = model.generate(ids, attention_mask=mask, **options)
    cache = GrowingCache(config=model.config)
    got = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(got, expected)
    kinds = {type(layer).__name__ for layer in cache.layers}
    assert kinds == {"DynamicSlidingWindowLayer" if name == "mistral" else "_GrowingLayer"}
