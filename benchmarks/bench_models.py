"""Whole models of transformers, as they are and with pyfast: a training step with the dropout of
their configurations and AdamW, and decoding with a cache of keys and values.

Rows: ``torch`` is the stock model with attention "sdpa" and torch's fused AdamW; ``activated`` the
same in ``pyfast.activate()`` with pyfast's AdamW; ``pyfast`` has pyfast's attention registered, its
modules patched, its optimizer, and its cache; ``pyfast int8``, decoding, has int8 weights as well.
Weights are random, and all in the dtype of the case.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import pyfast
from pyfast.ops._op import registered
from pyfast.quantization import Int8WeightOnly, dequantize_, quantize_

from .cases import (
    BaseCase,
    Call,
    Prepared,
    difference,
    first_line,
    parametrize,
    run_with_pytest,
)

if TYPE_CHECKING:
    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture

LAYERS = 4
CACHED = 2000  # tokens
NEW_TOKENS = 8  # of a call: activation is entered once for them
CHECK_SHAPE = (2, 100)
ROUNDED = "rounded weights"  # the stock model with the weights that int8 ones stand for


def _with_sdpa(cls: Any, config: Any) -> Any:
    return cls._from_config(config, attn_implementation="sdpa")


def _bert(**options: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(num_hidden_layers=LAYERS, **options)
    return _with_sdpa(BertForSequenceClassification, config)


def _gpt2(**options: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=LAYERS, **options)
    return _with_sdpa(GPT2LMHeadModel, config)


def _llama(width: int, **options: Any) -> Any:
    """Heads of 64, four for each head of keys, and a vocabulary of 32,000; those of width 2048 are
    the layers of Llama 3.2 1B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        num_hidden_layers=LAYERS,
        vocab_size=32000,
        max_position_embeddings=4096,
        **options,
    )
    return _with_sdpa(LlamaForCausalLM, config)


@dataclass(frozen=True)
class ModelCase(BaseCase):
    """A model over ``shape`` = (batch, tokens); decoding is eight tokens after so many.

    Attributes:
        build: makes the model; takes options of its configuration.
        trains: a training step; otherwise decoding.
    """

    build: Callable[..., Any]
    trains: bool = True

    @property
    def num_bytes(self) -> int:
        """The parameters once, for each token that is decoded."""
        with torch.device("meta"):
            parameters: int = sum(p.numel() for p in self.build().parameters())
        return parameters * self.dtype.itemsize * (1 if self.trains else NEW_TOKENS)

    @property
    def implementations(self) -> tuple[str, ...]:
        names = "torch", "activated", "pyfast"
        return names if self.trains else (*names, "pyfast int8")

    def prepare(self, device: torch.device) -> PreparedModel:
        return PreparedModel(self, device)


class PreparedModel(Prepared):
    def __init__(self, case: ModelCase, device: torch.device) -> None:
        super().__init__(case, device)
        self.case = case
        torch.manual_seed(0)
        self.stock: Any = case.build().to(device, case.dtype)
        batch, length = case.shape
        vocabulary = self.stock.config.vocab_size
        self.tokens = torch.randint(vocabulary, (batch, length), device=device)

    def like(self) -> Tensor:
        return self.stock.get_input_embeddings().weight  # type: ignore[no-any-return]

    @property
    def backend(self) -> str:
        return registered()["attention"].backend_of(self.like())

    def _model(self, implementation: str) -> Any:
        model = copy.deepcopy(self.stock)
        if implementation == ROUNDED:
            quantize_(model, Int8WeightOnly())
            dequantize_(model, torch.float64)
        elif implementation.startswith("pyfast"):
            int8 = Int8WeightOnly() if implementation.endswith("int8") else None
            pyfast.patch(model, linear=not self.case.trains, int8=int8)
            _with_attention(model)
        return model.train(self.case.trains)

    def call(self, implementation: str) -> Call:
        model = self._model(implementation)
        step = self._training_step if self.case.trains else self._decoding_step
        made = step(model, implementation)
        return _activated(made) if implementation == "activated" else made

    def _training_step(self, model: nn.Module, implementation: str) -> Call:
        parameters = model.parameters()
        optimizer: torch.optim.Optimizer
        if implementation == "torch":
            optimizer = torch.optim.AdamW(parameters, 1e-5, fused=True)
        else:
            optimizer = pyfast.optim.AdamW(parameters, 1e-5)
        labels = self._labels(model)

        def step() -> None:
            model(input_ids=self.tokens, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _labels(self, model: nn.Module) -> Tensor:
        classifies = "Classification" in type(model).__name__
        return self.tokens[:, 0] % 2 if classifies else self.tokens

    def _decoding_step(self, model: Any, implementation: str) -> Call:
        """The next tokens, one at a time, and then again: the cache is cut back to its length."""
        cache = None
        if implementation.startswith("pyfast"):
            from pyfast.integrations.transformers import GrowingCache

            cache = GrowingCache(config=model.config)
        with torch.no_grad():
            inputs = {"input_ids": self.tokens, "past_key_values": cache}
            cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        token = self.tokens[:, -1:]

        def step() -> Tensor:
            with torch.no_grad():
                for _ in range(NEW_TOKENS):
                    logits: Tensor = model(input_ids=token, past_key_values=cache).logits
            cache.crop(-NEW_TOKENS)
            return logits

        return step

    def check(self) -> str:
        """What is wrong with logits and gradients of a few tokens in evaluation, against the stock
        model in float64; empty if nothing."""
        if self.case.shape != CHECK_SHAPE:
            return PreparedModel(replace(self.case, shape=CHECK_SHAPE), self.device).check()
        try:
            found = [self._difference(name) for name in self.case.implementations[1:]]
        except Exception as error:
            return first_line(error)
        return "; ".join(filter(None, found))

    def _difference(self, implementation: str) -> str:
        formula = ROUNDED if implementation == "pyfast int8" else "torch"
        exact, rounded = self._results(formula, torch.float64), self._results(formula)
        results = self._results(implementation)
        found = (
            difference(f"{implementation}: {name}", results[name], exact[name], rounded[name])
            for name in exact
        )
        return "; ".join(filter(None, found))

    def _results(self, implementation: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        model = self._model(implementation).to(dtype or self.case.dtype).eval()

        def run() -> dict[str, Tensor]:
            if not self.case.trains:
                return {"logits": self._decoding_step(model, implementation)()}
            output = model(input_ids=self.tokens, labels=self._labels(model))
            output.loss.backward()
            grad = model.get_input_embeddings().weight.grad
            return {"logits": output.logits.detach(), "gradient of the embedding": grad}

        return (_activated(run) if implementation == "activated" else run)()


def _with_attention(model: Any) -> None:
    from pyfast.integrations.transformers import register

    register()
    model.set_attn_implementation("pyfast")


def _activated(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with pyfast.activate():
            return call()

    return run


_case = functools.partial(ModelCase, "models")
_DTYPES = (torch.float32, torch.bfloat16)
_FLOOR = {torch.float32: 1.4, torch.bfloat16: 1.6}
CASES = [
    *(
        _case(name, shape, dtype, build, floors={"torch": _FLOOR[dtype]})
        for name, shape, build in (
            ("BERT, 4 layers, training", (4, 512), _bert),
            ("GPT-2, 4 layers, training", (2, 512), _gpt2),
        )
        for dtype in _DTYPES
    ),
    *(
        _case(
            f"Llama, 4 layers of {width}, decoding",
            (batch, CACHED),
            torch.bfloat16,
            functools.partial(_llama, width),
            trains=False,
            floors={"torch": 2.0},
        )
        for width in (1024, 2048)
        for batch in (1, 8, 16)
    ),
]
if importlib.util.find_spec("transformers") is None:
    CASES = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, CASES)


def test_models(benchmark: BenchmarkFixture, case: BaseCase, implementation: str) -> None:
    run_with_pytest(benchmark, case, implementation)
