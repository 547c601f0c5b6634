"""Registration with transformers, and what its masks become: mutants of both are rejected."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfast
from pyfast.integrations import transformers as integration

transformers = pytest.importorskip("transformers", minversion="4.53")

from transformers_models import (  # noqa: E402
    BATCH,
    CLOSE,
    LAYERS,
    LENGTH,
    NAME,
    config_of,
    grouped,
    inputs_of,
    logits_of,
    make_model,
    padding_mask,
)

from pyfast.integrations import _transformers_attention as functions  # noqa: E402

masking = pytest.importorskip("transformers.masking_utils")
ATTENTION, MASKS = transformers.AttentionInterface, transformers.AttentionMaskInterface


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    integration.register(NAME)
    yield
    integration.unregister(NAME)


@pytest.fixture
def borrowed() -> Iterator[Callable[..., str]]:
    """Registers functions of the test's own; they are gone after it."""
    names = []

    def borrow(attention: Any = None, mask: Any = None, name: str = "borrowed") -> str:
        names.append(name)
        for interface, function in ((ATTENTION, attention), (MASKS, mask)):
            if function is not None:
                interface.register(name, function)
        return name

    yield borrow
    for name in names:
        for interface in (ATTENTION, MASKS):
            interface._global_mapping.pop(name, None)


def is_close(name: str, padding: str, implementation: str) -> bool:
    model = make_model(name, "eager")
    arguments, real = inputs_of(name, padding)
    expected = logits_of(model, "eager", arguments)[real]
    actual = logits_of(model, implementation, arguments)[real]
    return torch.allclose(actual, expected, **CLOSE)


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_attention_without_its_mask_function_is_rejected(
    borrowed: Callable[..., str], name: str, padding: str
) -> None:
    mutant = borrowed(attention=functions.attention_forward)
    assert is_close(name, padding, NAME)
    # A causal model does not look at padding that comes behind its tokens.
    assert is_close(name, padding, mutant) == (name == "llama" and padding == "right")


def without(*dropped: str) -> Callable[..., Any]:
    def attention(*arguments: Any, **more: Any) -> Any:
        more |= {name: None for name in dropped if name in more}
        return functions.attention_forward(*arguments, **more)

    return attention


def not_causal(module: Any, *arguments: Any, **more: Any) -> Any:
    return functions.attention_forward(module, *arguments, **{**more, "is_causal": False})


def without_window(**arguments: Any) -> Any:
    arguments |= {"local_size": None, "mask_function": masking.causal_mask_function}
    return functions.attention_mask(**arguments)


@pytest.mark.parametrize(
    ("name", "attention", "mask"),
    [
        ("gemma2", without("softcap"), functions.attention_mask),
        ("gpt_oss", without("s_aux"), functions.attention_mask),
        ("t5", without("position_bias"), functions.attention_mask),
        ("llama", not_causal, functions.attention_mask),
        ("mistral", functions.attention_forward, without_window),
    ],
)
def test_mutants_are_rejected(
    borrowed: Callable[..., str], name: str, attention: Any, mask: Any
) -> None:
    assert is_close(name, "none", NAME)
    assert not is_close(name, "none", borrowed(attention, mask))


class Calls(list[dict[str, Any]]):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
        self.append({"mask": rest[0], "causal": rest[2], "key": key, **more})
        call = pyfast.nn.functional.scaled_dot_product_attention
        return call(query, key, value, *rest, **more)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What reaches pyfast's attention."""
    record = Calls()
    monkeypatch.setattr(functions, "scaled_dot_product_attention", record)
    return record


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "gemma2", "gpt_oss"])
def test_the_kernel_is_told_instead_of_masked(calls: Calls, name: str, padding: str) -> None:
    assert is_close(name, padding, NAME)
    windows = {"mistral": [(4, 0)] * 2, "gemma2": [(4, 0), None], "gpt_oss": [(4, 0), None]}
    assert [call["window"] for call in calls] == windows.get(name, [None] * LAYERS)
    for call in calls:
        assert call["causal"] == (name != "bert")
        assert call["key"].shape[1] == (4 if name == "bert" else 2)  # as the model made them
        if padding == "none":
            assert call["mask"] is None
        else:
            assert torch.equal(call["mask"], padding_mask(padding).bool()[:, None, None])


@pytest.mark.parametrize("padding", ["none", "left"])
def test_decoding_has_no_mask_unless_padded(calls: Calls, padding: str) -> None:
    model = make_model("llama")
    arguments, _ = inputs_of("llama", padding)
    model.generate(**arguments, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    steps = calls[LAYERS:]
    assert len(steps) == 2 * LAYERS
    for call in steps:
        assert (call["mask"] is None) == (padding == "none") and not call["causal"]
        assert call["key"].is_contiguous()


def visible(note: Any, num_queries: int, num_keys: int) -> Tensor:
    """The mask that a note stands for, by the words of scaled_dot_product_attention."""
    shift = num_keys - num_queries if note.alignment == "bottom_right" else 0
    distance = torch.arange(num_queries)[:, None] + shift - torch.arange(num_keys)
    result = torch.ones(BATCH, 1, num_queries, num_keys, dtype=torch.bool)
    if note.is_causal:
        result = result & (distance >= 0)
    if note.window is not None:
        result = result & (distance < note.window)
    return result if note.keys is None else result & note.keys


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("window", [None, 3, 5])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "q_offset", "kv_offset"),
    [(12, 12, 0, 0), (4, 12, 8, 0), (4, 12, 0, 0), (4, 7, 8, 5), (4, 12, 3, 0), (1, 12, 11, 0)],
)
def test_note_says_what_the_mask_does(
    padding: str | None,
    window: int | None,
    num_queries: int,
    num_keys: int,
    q_offset: int,
    kv_offset: int,
) -> None:
    function = masking.causal_mask_function
    if window is not None:
        function = masking.sliding_window_causal_mask_function(window)
    arguments = {
        "batch_size": BATCH,
        "q_length": num_queries,
        "kv_length": num_keys,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": None if padding is None else padding_mask(padding).bool(),
        "local_size": window,
    }
    mask = functions.attention_mask(**arguments)
    plain = masking.sdpa_mask(**arguments)
    assert (mask is None) == (plain is None)
    if mask is None or plain is None:
        return
    assert torch.equal(mask, plain)
    note = getattr(mask, "_pyfast_pattern", None)
    places = q_offset - kv_offset in (0, num_keys - num_queries)
    assert (note is not None) == (places and num_queries > 1)
    if note is not None:
        assert torch.equal(visible(note, num_queries, num_keys), mask)
        assert not torch.equal(visible(note._replace(is_causal=False), num_queries, num_keys), mask)


@pytest.mark.parametrize("change", ["in place", "sliced", "window", "none"])
def test_notes_that_no_longer_hold_are_not_used(calls: Calls, change: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, BATCH, 2, LENGTH, 16).unbind()
    arguments: dict[str, Any] = {"batch_size": BATCH, "q_length": LENGTH, "kv_length": LENGTH}
    arguments |= {"q_offset": 0, "kv_offset": 0, "local_size": 5}
    arguments["mask_function"] = masking.sliding_window_causal_mask_function(5)
    mask = functions.attention_mask(**arguments)
    assert mask is not None
    window: int | None = 5
    if change == "in place":
        mask = mask.contiguous() if not mask.is_contiguous() else mask
        mask[:, :, 3] = True
    elif change == "sliced":
        mask, k, v = mask[..., :7], k[..., :7, :], v[..., :7, :]
    elif change == "window":  # chunked attention, or a layer that does not tell its window
        window = None
    module = SimpleNamespace(is_causal=True)
    out, _ = functions.attention_forward(module, q, k, v, mask, sliding_window=window)  # type: ignore[arg-type]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-5, atol=1e-6)
    assert (calls[0]["mask"] is None) == (change == "none")


def test_packed_sequences_do_not_see_each_other() -> None:
    model = make_model("llama")
    ids = inputs_of("llama", "none")[0]["input_ids"][:1]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    apart = [model(input_ids=part).logits for part in (ids[:, :5], ids[:, 5:])]
    torch.testing.assert_close(packed, torch.cat(apart, 1), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("heads", [1, 4])
def test_masks_of_the_caller(dtype: torch.dtype, heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 16) for h, n in ((4, 1), (2, 9), (2, 9)))
    mask = torch.rand(2, heads, 1, 9) < 0.5
    if dtype != torch.bool:
        mask = torch.randn(2, heads, 1, 9)
    out, _ = functions.attention_forward(SimpleNamespace(), q, k, v, mask, scaling=0.3)  # type: ignore[arg-type]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask, scale=0.3
    )
    assert out.shape == (2, 1, 4, 16) and out.is_contiguous()
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-5, atol=1e-6)


def test_sinks_of_every_query() -> None:
    """Inkling's, as its eager code has them: one more score in the softmax of each query."""
    torch.manual_seed(0)
    q, k, v, sinks, weights = (torch.randn(2, 4, 6, size) for size in (16, 16, 16, 1, 16))
    inputs = [t.requires_grad_() for t in (q, k, v, sinks)]
    module = SimpleNamespace(is_causal=False)
    out, _ = functions.attention_forward(module, q, k, v, None, sinks=sinks)  # type: ignore[arg-type]
    scores = torch.cat((q @ k.mT / 4, sinks), -1).softmax(-1)
    expected = scores[..., :-1] @ v
    torch.testing.assert_close(out.transpose(1, 2), expected)
    grads = torch.autograd.grad((out.transpose(1, 2) * weights).sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad((expected * weights).sum(), inputs))


def test_layers_that_share_keys() -> None:
    """Gemma 4 drops queries before them, which must not take causality away."""
    kind = pytest.importorskip("transformers.models.gemma4").Gemma4TextConfig
    layers = ["sliding_attention", "full_attention"] * 2
    config = kind(
        **grouped(sliding_window=4, num_kv_shared_layers=2, layer_types=layers)
        | {"num_hidden_layers": 4},
        global_head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=99,
    )
    model = transformers.Gemma4ForCausalLM._from_config(config, attn_implementation="eager").eval()
    arguments = {"input_ids": inputs_of("llama", "none")[0]["input_ids"], "logits_to_keep": 3}
    expected = logits_of(model, "eager", arguments)
    torch.testing.assert_close(logits_of(model, NAME, arguments), expected, **CLOSE)


def test_compiles_fullgraph() -> None:
    model = make_model("mistral")
    arguments, real = inputs_of("mistral", "left")
    expected = model(**arguments).logits[real]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**arguments).logits[real], expected, **CLOSE)


def test_gradient_checkpointing() -> None:
    model = make_model("mistral").train()
    arguments, real = inputs_of("mistral", "right")
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**arguments, use_cache=False).logits[real].square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0])


def test_register_twice_changes_nothing() -> None:
    before = ATTENTION()[NAME], MASKS()[NAME]
    integration.register(NAME)
    assert (ATTENTION()[NAME], MASKS()[NAME]) == before
    integration.unregister(NAME)
    integration.unregister(NAME)
    assert NAME not in ATTENTION() and NAME not in MASKS()
    with pytest.raises(ValueError, match="pyfast"):
        transformers.AutoModel.from_config(config_of("bert"), attn_implementation=NAME)


@pytest.mark.parametrize("taken", ["attention", "mask", "both"])
def test_rejects_a_name_that_is_taken(borrowed: Callable[..., str], taken: str) -> None:
    function = without("nothing")
    name = borrowed(
        attention=None if taken == "mask" else function, mask=None if taken == "attention" else min
    )
    before = dict(ATTENTION()), dict(MASKS())
    for change in (integration.register, integration.unregister):
        with pytest.raises(ValueError, match=r"'borrowed' belongs to another function in .*Inter"):
            change(name)
        assert (dict(ATTENTION()), dict(MASKS())) == before


@pytest.mark.parametrize(
    "name", ["", "eager", "sdpa", "my_flash", "a/b", "paged|x", "flex_attention"]
)
def test_rejects_names_of_transformers(name: str) -> None:
    with pytest.raises(ValueError, match="register: name must consist of letters"):
        integration.register(name)
    with pytest.raises(TypeError, match="register: name must be a str, got NoneType"):
        integration.register(None)  # type: ignore[arg-type]


def test_models_that_are_not_reached_say_so() -> None:
    config = transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=99)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    with pytest.raises(ValueError, match="does not reach models of BloomConfig"):
        model(**inputs_of("llama", "left")[0])
    config = transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=99)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.set_attn_implementation(NAME)
    assert model.config._attn_implementation == "eager"
    assert model(**inputs_of("llama", "left")[0]).logits.isfinite().all()


def test_what_is_not_supported_says_so() -> None:
    q = torch.randn(1, 2, 3, 8)
    for name in ("indices", "block_indices", "head_mask"):
        with pytest.raises(NotImplementedError, match=f"does not support {name} of Linear"):
            functions.attention_forward(torch.nn.Linear(1, 1), q, q, q, None, **{name: q})
    model = make_model("llama")
    with pytest.warns(UserWarning, match="returns no weights for output_attentions=True"):
        model(**inputs_of("llama", "none")[0], output_attentions=True)


def test_import_is_light() -> None:
    code = (
        "import sys, pyfast.integrations.transformers as module\n"
        "assert 'transformers' not in sys.modules\n"
        "assert 'register' in dir(module) and not hasattr(module, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
