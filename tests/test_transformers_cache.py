"""The cache that appends in place: what transformers' own gives, without copying it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
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


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("grad", [False, True])
def test_is_what_concatenation_gives(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        check_steps(GrowingCache(), DynamicCache())


@pytest.mark.usefixtures("no_grad")
def test_check_rejects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is taken for that of the cache although it is another's."""
    monkeypatch.setattr(_transformers_cache._Room, "holds", lambda self, kept: True)
    with pytest.raises((AssertionError, RuntimeError)):
        check_steps(GrowingCache(), DynamicCache())


@pytest.mark.usefixtures("no_grad")
def test_appends_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transformers_cache, "MIN_ROOM", 100)
    cache = GrowingCache()
    cache.update(*states(4, 0), layer_idx=0)
    first, _ = cache.update(*states(1, 0), layer_idx=0)
    for step in range(90):
        keys, values = cache.update(*states(1, step), layer_idx=0)
        assert keys.data_ptr() == first.data_ptr() and keys.shape[2] == 6 + step
    assert keys.data_ptr() != values.data_ptr()
    cache.crop(-3)
    assert cache.update(*states(1, 0), layer_idx=0)[0].data_ptr() == first.data_ptr()


def test_gradients_see_what_was_there() -> None:
    """Frozen keys, and queries that need a gradient: two steps, then backward."""
    queries = torch.ones(2, 2, 1, 4, requires_grad=True)
    grads = []
    for cache in (GrowingCache(), DynamicCache()):
        with torch.inference_mode():
            cache.update(*states(2, 0), layer_idx=0)
        steps = [cache.update(*states(1, seed), layer_idx=0)[0] for seed in (1, 2)]
        loss = sum((queries @ keys.mT).square().sum() for keys in steps)
        grads.append(torch.autograd.grad(loss, queries)[0])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("way", ["set back", "copy", "reset", "cut by hand", "pickle"])
def test_overwrites_nothing_that_is_in_use(way: str) -> None:
    cache = GrowingCache()
    cache.update(*states(5, 0), layer_idx=0)
    cache.update(*states(1, 1), layer_idx=0)
    layer = cache.layers[0]
    saved = layer.keys, layer.values
    held, _ = cache.update(*states(1, 2), layer_idx=0)
    before, prefix = held.clone(), saved[0].clone()
    if way == "set back":
        layer.keys, layer.values = saved
    elif way == "copy":
        layer = copy.copy(layer)
    elif way == "pickle":
        assert len(pickle.dumps(layer)) < 3 * held.numel() * 4 + 2000
        layer = pickle.loads(pickle.dumps(layer))
    elif way == "reset":
        layer.reset()
    else:
        layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
    got, _ = layer.update(*states(1, 3))
    assert torch.equal(held, before) and torch.equal(saved[0], prefix)
    expected = {"copy": before, "pickle": before, "reset": before[:, :, :0]}.get(way, prefix)
    assert torch.equal(got, torch.cat([expected, states(1, 3)[0]], 2))


@pytest.mark.usefixtures("no_grad")
def test_what_does_not_fit_is_as_in_torch() -> None:
    for cache in (GrowingCache(), DynamicCache()):
        cache.update(*states(2, 0, 1), layer_idx=0)
        cache.update(*states(1, 0, 1), layer_idx=0)
        with pytest.raises(RuntimeError):
            cache.update(*states(1, 1, 3), layer_idx=0)
        half = [t.bfloat16() for t in states(1, 1, 1)]
        assert cache.update(*half, layer_idx=0)[0].dtype == torch.float32


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
