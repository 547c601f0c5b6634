"""Small models of transformers with random weights, and what goes into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="4.53")

NAME = "pyfast"
BATCH, LENGTH, VOCABULARY, LAYERS = 3, 12, 99, 2
PADDINGS = ("none", "left", "right")
# float32, a few layers: differences are below 3e-6. What a mutant changes is above 1e-2.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def small(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        **more,
    }


def grouped(**more: Any) -> dict[str, Any]:
    return small(num_key_value_heads=2, head_dim=16, **more)


def config_of(name: str) -> Any:
    no_dropout = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    make: dict[str, Callable[[], Any]] = {
        "bert": lambda: transformers.BertConfig(**small(**no_dropout)),
        "vit": lambda: transformers.ViTConfig(**small(image_size=16, patch_size=4, **no_dropout)),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=64, n_head=4, n_layer=LAYERS, vocab_size=VOCABULARY, n_positions=64
        ),
        "llama": lambda: transformers.LlamaConfig(**grouped()),
        "mistral": lambda: transformers.MistralConfig(**grouped(sliding_window=5)),
        "gemma2": lambda: transformers.Gemma2Config(
            **grouped(sliding_window=5, attn_logit_softcapping=1.5, query_pre_attn_scalar=16)
        ),
        "gpt_oss": lambda: transformers.GptOssConfig(
            **grouped(sliding_window=5, num_local_experts=4, num_experts_per_tok=2)
        ),
        "t5": lambda: transformers.T5Config(
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=LAYERS,
            num_heads=4,
            vocab_size=VOCABULARY,
            decoder_start_token_id=0,
        ),
        "whisper": lambda: transformers.WhisperConfig(
            d_model=64,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            vocab_size=VOCABULARY,
            max_source_positions=20,
            max_target_positions=64,
            num_mel_bins=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=[],
            begin_suppress_tokens=[],
        ),
    }
    return make[name]()


DECODERS = ("gpt2", "llama", "mistral", "gemma2", "gpt_oss")
SEQ2SEQ = ("t5", "whisper")
MODELS = ("bert", "vit", *DECODERS, *SEQ2SEQ)
# Attention ops of a forward pass: encoder, decoder and what the decoder asks the encoder.
NUM_CALLS = {name: 3 * LAYERS if name in SEQ2SEQ else LAYERS for name in MODELS}


def make_model(name: str, implementation: str = NAME) -> Any:
    """A model whose weights are large enough for attention to matter; no dropout."""
    config = config_of(name)
    for attribute in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout_rate", "dropout"):
        if hasattr(config, attribute):
            setattr(config, attribute, 0.0)
    kind = {"bert": "MaskedLM", "vit": "ImageClassification", "t5": "Seq2SeqLM"}.get(name)
    kind = "SpeechSeq2Seq" if name == "whisper" else kind or "CausalLM"
    factory = getattr(transformers, f"AutoModelFor{kind}")
    model = factory.from_config(config, attn_implementation=implementation)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.normal_(0, 1, generator=generator)
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.12, generator=generator)
    return model.eval()


def padding_mask(padding: str) -> Tensor:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if padding == "left":
        mask[1, :4], mask[2, :7] = 0, 0
    elif padding == "right":
        mask[1, -4:], mask[2, -7:] = 0, 0
    return mask


def inputs_of(name: str, padding: str) -> tuple[dict[str, Tensor], Tensor]:
    """(arguments of the model, which of its outputs are of real tokens)."""
    torch.manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    mask = padding_mask(padding)
    if name == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 16, 16)}, torch.ones(BATCH).bool()
    if name == "t5":
        decoder = torch.randint(3, VOCABULARY, (BATCH, 6))
        arguments = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder}
        return arguments, torch.ones(BATCH, 6).bool()
    if name == "whisper":
        arguments = {"input_features": torch.randn(BATCH, 8, 40), "decoder_input_ids": ids}
        return {**arguments, "decoder_attention_mask": mask}, mask.bool()
    return {"input_ids": ids, "attention_mask": mask}, mask.bool()


def cases(names: tuple[str, ...] = MODELS) -> list[tuple[str, str]]:
    return [(n, p) for n in names for p in PADDINGS if p == "none" or n != "vit"]


def logits_of(model: Any, implementation: str, arguments: dict[str, Tensor]) -> Tensor:
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    return model(**arguments).logits  # type: ignore[no-any-return]
