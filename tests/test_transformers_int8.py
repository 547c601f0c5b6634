"""transformers' models loaded with int8 weights: as ``quantize_`` makes them, saved and loaded."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyfast
from pyfast.quantization import Int8DynamicActivationInt8Weight, Int8WeightOnly, quantize_

transformers = pytest.importorskip("transformers", minversion="5.0")
safetensors_torch = pytest.importorskip("safetensors.torch")

from pyfast.integrations.transformers import PyfastConfig  # noqa: E402

CONFIGS: dict[str, Any] = {
    "int8_weight_only": Int8WeightOnly(),
    "int8_dynamic": Int8DynamicActivationInt8Weight(),
}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
IDS = torch.arange(14).view(2, 7) % 11
Models = dict[str, Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Folders of small models in floating point."""
    few = {"num_hidden_layers": 2, "num_key_value_heads": 2}
    configs = {
        "llama": transformers.LlamaConfig(**SIZES, **few),
        "llama_tied": transformers.LlamaConfig(**SIZES, **few, tie_word_embeddings=True),
        "mixtral": transformers.MixtralConfig(**SIZES, **few, num_local_experts=4),
        "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2),
    }
    torch.manual_seed(0)
    models = {
        name: transformers.AutoModelForCausalLM.from_config(config)
        for name, config in configs.items()
    }
    models["bert"] = transformers.BertForMaskedLM(
        transformers.BertConfig(**SIZES, num_hidden_layers=1)
    )
    models["t5"] = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, num_heads=4, num_layers=1, d_ff=48)
    )
    folders = {}
    for name, model in models.items():
        for parameter in model.parameters():  # biases and norms too
            nn.init.normal_(parameter, std=0.1) if parameter.dim() == 1 else None
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def load(folder: Path, auto: Any = None, **kwargs: Any) -> Any:
    return (auto or transformers.AutoModelForCausalLM).from_pretrained(folder, **kwargs)


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


@torch.no_grad()
def logits(model: Any) -> Tensor:
    kwargs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    result: Tensor = model(input_ids=IDS, **kwargs).logits
    return result


def int8_layers(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, pyfast.nn.Int8Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "mixtral", "bert", "t5"])
def test_is_what_quantize_makes(
    saved: Models, tmp_path: Path, architecture: str, name: str, dtype: torch.dtype
) -> None:
    """Weights and logits to the bit, and again after saving and loading."""
    auto = {
        "bert": transformers.AutoModelForMaskedLM,
        "t5": transformers.AutoModelForSeq2SeqLM,
    }.get(architecture)
    model = load(saved[architecture], auto, dtype=dtype, quantization_config=PyfastConfig(name))
    expected = load(saved[architecture], auto, dtype=dtype)
    layers = int8_layers(model)
    quantize_(expected, CONFIGS[name], lambda module, path: path in layers)
    assert_same_state(model, expected)
    assert logits(model).dtype == dtype
    assert torch.equal(logits(model), logits(expected))
    assert {m.dtype for m in model.modules() if type(m) is pyfast.nn.Int8Linear} == {dtype}

    model.save_pretrained(tmp_path)
    again = load(tmp_path, auto)
    assert_same_state(again, model)
    assert torch.equal(logits(again), logits(model))
    assert int8_layers(again) == layers
    assert not any(p.requires_grad for p in again.parameters() if p.dtype == torch.int8)


def test_which_layers(saved: Models) -> None:
    model = load(saved["llama"], quantization_config=PyfastConfig())
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert int8_layers(model) == [n for n in linears if n != "lm_head"]
    assert len(linears) == 15 and type(model.lm_head) is nn.Linear
    report = model.hf_quantizer.report
    assert [e.path for e in report.changed] == int8_layers(model)
    assert {e.path: e.reason for e in report.skipped} == {
        "lm_head": "left out by modules_to_not_convert"
    }
    float_bytes = sum(p.numel() * 4 for p in load(saved["llama"]).parameters())
    assert report.bytes_before >= float_bytes > report.bytes_after

    t5 = load(saved["t5"], transformers.AutoModelForSeq2SeqLM, quantization_config=PyfastConfig())
    reasons = {e.path.rpartition(".")[2]: e.reason for e in t5.hf_quantizer.report.skipped}
    assert reasons == {
        "wo": "transformers keeps it in float32",
        "lm_head": "its weight is also that of another module",
    }


def test_modules_to_not_convert(saved: Models, tmp_path: Path) -> None:
    config = PyfastConfig(modules_to_not_convert=["down_proj", r"model\.layers\.1\.self_attn"])
    model = load(saved["llama"], quantization_config=config)
    layers = int8_layers(model)
    assert layers == [
        *(f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"),
        *(f"model.layers.{i}.mlp.{x}_proj" for i in range(2) for x in ("gate", "up")),
        "lm_head",  # the list takes the place of the default
    ]
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert int8_layers(again) == layers
    assert_same_state(again, model)
    assert config.modules_to_not_convert == ["down_proj", r"model\.layers\.1\.self_attn"]

    tied = load(saved["llama_tied"], quantization_config=PyfastConfig("int8_dynamic", []))
    assert type(tied.lm_head) is nn.Linear
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_config_is_not_changed_by_models(saved: Models) -> None:
    """One configuration serves several models."""
    config = PyfastConfig("int8_dynamic")
    load(saved["bert"], transformers.AutoModelForMaskedLM, quantization_config=config)
    model = load(saved["llama"], quantization_config=config)
    assert config.modules_to_not_convert is None
    assert model.config.quantization_config.modules_to_not_convert == ["lm_head"]


def test_comparison_rejects(saved: Models) -> None:
    """Mutants: another mode, another scale, one value off by a step."""
    model = load(saved["llama"], quantization_config=PyfastConfig())
    other = load(saved["llama"], quantization_config=PyfastConfig("int8_dynamic"))
    assert_same_state(model, other)
    assert not torch.equal(logits(model), logits(other))
    for change in ("weight", "weight_scale"):
        other = copy.deepcopy(model)
        tensor = getattr(other.model.layers[1].mlp.up_proj, change)
        tensor.view(-1)[3] = tensor.view(-1)[3] + (
            1 if change == "weight" else tensor.view(-1)[3] / 127
        )
        with pytest.raises(AssertionError, match=f"up_proj.{change}"):
            assert_same_state(model, other)
        assert not torch.equal(logits(model), logits(other))


def test_new_layers_stay_floating_point(saved: Models, tmp_path: Path) -> None:
    """A head that the checkpoint has not is to be trained; so is a pooler."""
    masked = load(
        saved["bert"], transformers.AutoModelForMaskedLM, quantization_config=PyfastConfig()
    )
    assert len(int8_layers(masked)) == 7
    masked.save_pretrained(tmp_path / "int8")
    auto = transformers.AutoModelForSequenceClassification
    for model in (
        load(saved["bert"], auto, quantization_config=PyfastConfig()),
        load(tmp_path / "int8", auto),
    ):
        assert len(int8_layers(model)) == 6
        for layer in (model.classifier, model.bert.pooler.dense):
            assert type(layer) is nn.Linear
            assert layer.weight.requires_grad and layer.weight.is_floating_point()
            assert 0 < layer.weight.std() < 0.1
            assert set(layer.state_dict()) == {"weight", "bias"}
        reasons = {e.path: e.reason for e in model.hf_quantizer.report.skipped}
        assert re.match("the checkpoint has no .*weights for it", reasons["bert.pooler.dense"])
        model.save_pretrained(tmp_path / "classifier")
        assert_same_state(load(tmp_path / "classifier", auto), model)


def test_another_class_reads_what_was_saved(saved: Models, tmp_path: Path) -> None:
    model = load(saved["llama"], quantization_config=PyfastConfig("int8_dynamic"))
    model.save_pretrained(tmp_path)
    base = load(tmp_path, transformers.AutoModel)
    assert_same_state(base, model.model)
    assert len(int8_layers(base)) == 14


def test_other_sizes(saved: Models, tmp_path: Path) -> None:
    """ignore_mismatched_sizes: what does not fit is new, and stays floating point."""
    auto = transformers.AutoModelForSequenceClassification
    load(saved["llama"], auto, num_labels=3).save_pretrained(tmp_path)
    kwargs = {"num_labels": 5, "quantization_config": PyfastConfig(modules_to_not_convert=[])}
    model = load(tmp_path, auto, **kwargs, ignore_mismatched_sizes=True)
    assert type(model.score) is nn.Linear and model.score.weight.shape == (5, 32)
    assert len(int8_layers(model)) == 14
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path, auto, **kwargs)


def test_copies_generates_and_dequantizes(saved: Models, tmp_path: Path) -> None:
    model = load(saved["llama"], quantization_config=PyfastConfig())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_state(other, model)
        other.save_pretrained(tmp_path)
        assert_same_state(load(tmp_path), model)
    kwargs = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    tokens = model.generate(IDS, **kwargs)
    bf16 = load(tmp_path, dtype=torch.bfloat16)
    assert logits(bf16).dtype == torch.bfloat16
    assert all(m.weight_scale.dtype == torch.float32 for m in bf16.modules() if hasattr(m, "mode"))

    layer = model.model.layers[0].mlp.up_proj
    weights = pyfast.nn.functional.dequantize_int8(layer.weight, layer.weight_scale)
    model.dequantize()
    assert not int8_layers(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weights)
    assert torch.equal(model.generate(IDS, **kwargs), tokens)
    model.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float/config.json").read_text())


def test_rejects_arguments() -> None:
    with pytest.raises(ValueError, match="one of int8_weight_only, int8_dynamic, got 'int4'"):
        PyfastConfig("int4")
    with pytest.raises(ValueError, match="quant_method must be 'pyfast', got 'awq'"):
        PyfastConfig(quant_method="awq")
    with pytest.raises(TypeError, match="None or a list of strings, got 'lm_head'"):
        PyfastConfig(modules_to_not_convert="lm_head")  # type: ignore[arg-type]


def test_rejects_models(saved: Models, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel must have an nn.Linear .* Conv1D"):
        load(saved["gpt2"], quantization_config=PyfastConfig())
    with pytest.raises(ValueError, match="must not offload to the disk"):
        load(saved["llama"], quantization_config=PyfastConfig(), device_map={"": "disk"})

    model = load(saved["llama"])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 2] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        load(tmp_path, quantization_config=PyfastConfig())


def test_rejects_checkpoints(saved: Models, tmp_path: Path) -> None:
    load(saved["llama"], quantization_config=PyfastConfig()).save_pretrained(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    state = safetensors_torch.load_file(file)

    changed = json.loads(config.read_text())
    changed["quantization_config"]["modules_to_not_convert"].append("up_proj")
    before = config.read_text()
    config.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=f"int8 weights for {name}, which is left alone"):
        load(tmp_path)
    config.write_text(before)

    del state[f"{name}.weight_scale"]
    safetensors_torch.save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"no {name}.weight_scale"):
        load(tmp_path)


@pytest.fixture
def mappings() -> Iterator[list[dict[str, Any]]]:
    """transformers' registries, restored."""
    auto = importlib.import_module("transformers.quantizers.auto")
    found = [auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING]
    before = [dict(mapping) for mapping in found]
    modules = {k: m for k, m in sys.modules.items() if k.startswith("pyfast.integrations")}
    yield found
    sys.modules.update(modules)
    for mapping, old in zip(found, before, strict=True):
        mapping.clear()
        mapping.update(old)


def test_imported_twice(saved: Models, mappings: list[dict[str, Any]]) -> None:
    module = sys.modules.pop("pyfast.integrations._transformers_int8")
    again = importlib.import_module("pyfast.integrations._transformers_int8")
    assert again is not module and mappings[0]["pyfast"] is again.PyfastConfig
    model = load(saved["llama"], quantization_config=again.PyfastConfig())
    assert len(int8_layers(model)) == 14
    again.register_quantizer()
    assert mappings[0]["pyfast"] is again.PyfastConfig
    importlib.reload(again)


def test_register_is_enough(mappings: list[dict[str, Any]]) -> None:
    """Of the attention: transformers would read a saved int8 model as floats otherwise."""
    for mapping in mappings:
        mapping.pop("pyfast")
    pyfast.integrations.transformers.register()
    assert all("pyfast" in mapping for mapping in mappings)


def test_name_that_is_taken(mappings: list[dict[str, Any]]) -> None:
    class Other(mappings[1]["pyfast"]):  # type: ignore[misc]
        pass

    config = mappings[0].pop("pyfast")
    mappings[1]["pyfast"] = Other
    module = importlib.import_module("pyfast.integrations._transformers_int8")
    with pytest.raises(ValueError, match=r"'pyfast' of transformers is taken by .*Other"):
        module.register_quantizer()
    assert "pyfast" not in mappings[0] and mappings[1]["pyfast"] is Other
    assert config is PyfastConfig


def test_older_transformers(
    mappings: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    del sys.modules["pyfast.integrations._transformers_int8"]
    # pytest may hold the module that transformers has put itself in the place of.
    monkeypatch.setattr(importlib.import_module("transformers"), "__version__", "4.57.3")
    with pytest.raises(ImportError, match=r"needs transformers 5 or newer, .* got 4\.57\.3"):
        importlib.import_module("pyfast.integrations._transformers_int8")
    assert mappings[0]["pyfast"] is PyfastConfig
