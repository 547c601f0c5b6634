"""Models of transformers with ``attn_implementation="pyfast"`` against the same with "eager"."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfast
from pyfast import _backend
from pyfast.integrations import transformers as integration

transformers = pytest.importorskip("transformers", minversion="4.53")

from transformers_models import (  # noqa: E402
    BATCH,
    CLOSE,
    DECODERS,
    LAYERS,
    MODELS,
    NAME,
    NUM_CALLS,
    SEQ2SEQ,
    cases,
    inputs_of,
    logits_of,
    make_model,
)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    integration.register(NAME)
    yield
    integration.unregister(NAME)


@pytest.mark.parametrize(("name", "padding"), cases())
def test_logits_and_gradients_match_eager(name: str, padding: str) -> None:
    model = make_model(name)
    arguments, real = inputs_of(name, padding)
    results = {}
    for implementation in ("eager", NAME):
        model.zero_grad()
        logits = logits_of(model, implementation, arguments)[real]
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        (logits * weights).mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results[implementation] = logits.detach(), grads
    (expected, expected_grads), (actual, grads) = results["eager"], results[NAME]
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert grads.keys() == expected_grads.keys()
    for parameter, grad in grads.items():
        scale = expected_grads[parameter].abs().max().item()
        torch.testing.assert_close(
            grad, expected_grads[parameter], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=parameter
        )
    for learned in ("relative_attention_bias.weight", "sinks"):
        found = [grad for parameter, grad in grads.items() if parameter.endswith(learned)]
        assert bool(found) == (name == ("t5" if "bias" in learned else "gpt_oss"))
        assert all(grad.abs().max() > 0 for grad in found)


def generate(
    model: Any, implementation: str, arguments: dict[str, Tensor], **more: Any
) -> tuple[Tensor, Tensor]:
    """(ids, logits of every step)."""
    model.set_attn_implementation(implementation)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **more}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    output = model.generate(**arguments, **options)
    return output.sequences, torch.stack(output.logits)


def check_generated(name: str, padding: str, **more: Any) -> None:
    model = make_model(name)
    arguments, _ = inputs_of(name, padding)
    for unused in ("decoder_input_ids", "decoder_attention_mask"):
        arguments.pop(unused, None)
    expected_ids, expected = generate(model, "eager", arguments, **more)
    ids, logits = generate(model, NAME, arguments, **more)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_generate_matches_eager(name: str, padding: str) -> None:
    check_generated(name, padding)


@pytest.mark.parametrize("more", [{"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "t5"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generate_with_static_cache_and_beams(name: str, padding: str, more: Any) -> None:
    check_generated(name, padding, **more)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_chunks_of_a_prompt_match_the_whole(name: str) -> None:
    """Several queries after keys of a cache: neither square nor one query."""
    model = make_model(name)
    ids = inputs_of(name, "none")[0]["input_ids"]
    expected = logits_of(model, "eager", {"input_ids": ids})
    model.set_attn_implementation(NAME)
    cache = transformers.DynamicCache(config=model.config)
    names = inspect.signature(type(model.model.layers[0]).forward).parameters
    cache_argument = "cache" if "cache" in names else "past_key_values"
    chunks = []
    for begin, end in ((0, 4), (4, 9), (9, 10), (10, 12)):
        mask = torch.ones(BATCH, end, dtype=torch.long)
        output = model(ids[:, begin:end], attention_mask=mask, **{cache_argument: cache})
        chunks.append(output.logits)
    torch.testing.assert_close(torch.cat(chunks, 1), expected, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_is_served_by_pyfast(name: str) -> None:
    model = make_model(name)
    arguments, _ = inputs_of(name, "none" if name == "vit" else "right")
    served = pyfast.explain(model, **arguments)
    backend = "cpu" if _backend.native is not None else "reference"
    assert [(s.op, s.backend) for s in served] == [("attention", backend)] * NUM_CALLS[name]
    model.set_attn_implementation("eager")
    assert not pyfast.explain(model, **arguments)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_good_as_eager(name: str) -> None:
    model = make_model(name)
    arguments, real = inputs_of(name, "none" if name == "vit" else "right")
    exact = logits_of(model, "eager", arguments)[real]
    model.bfloat16()
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in arguments.items()}
    errors = [
        (logits_of(model, implementation, half)[real].float() - exact).square().mean().sqrt()
        for implementation in ("eager", NAME)
    ]
    assert errors[1] <= 2 * errors[0] + 1e-3 * exact.square().mean().sqrt()


@pytest.mark.parametrize("name", ["bert", "t5", "gemma2"])
def test_dropout_of_training(name: str) -> None:
    model = make_model(name)
    for module in model.modules():
        if type(module).__name__ == "BertSelfAttention":
            module.dropout.p = 0.3
        for attribute in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.3)
    arguments, real = inputs_of(name, "right")

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(**arguments).logits[real].detach()  # type: ignore[no-any-return]

    evaluated = run(0)
    assert torch.equal(run(1), evaluated)
    model.train()
    first = run(1)
    assert torch.equal(run(1), first)
    assert not torch.allclose(run(2), first, **CLOSE)
    assert not torch.allclose(first, evaluated, **CLOSE)
    model(**arguments).logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def layer(**attributes: Any) -> Any:
    return SimpleNamespace(**{"is_causal": False, "training": True, **attributes})


def attend(*arguments: Any, **more: Any) -> Tensor:
    function = transformers.AttentionInterface()[NAME]
    out, weights = function(*arguments, **more)
    assert weights is None and out.is_contiguous()
    return out  # type: ignore[no-any-return]


def test_dropout_drops_weights_with_the_right_expectation() -> None:
    """Equal scores and unit vectors as values: what comes out are the weights."""
    q, k = torch.zeros(2, 4, 64, 16), torch.zeros(2, 2, 64, 16)
    v = torch.eye(64).expand(2, 2, 64, 64)
    torch.manual_seed(5)
    weights = attend(layer(), q, k, v, None, dropout=0.25).transpose(1, 2) * 64
    torch.manual_seed(5)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    mask = pyfast.dropout_mask((2, 4, 64, 64), 0.25, seed, stream=0)
    torch.testing.assert_close(weights, mask / 0.75)
    assert abs(weights.mean().item() - 1) < 5 * (1 / 3 / mask.numel()) ** 0.5


def test_save_and_load(tmp_path: Path) -> None:
    model = make_model("llama")
    arguments, _ = inputs_of("llama", "left")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    assert loaded.config._attn_implementation == NAME
    assert torch.equal(loaded.eval()(**arguments).logits, model(**arguments).logits)
    assert len(pyfast.explain(loaded, **arguments)) == LAYERS
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation != NAME
