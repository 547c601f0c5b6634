"""pyfast in Hugging Face transformers: ``attn_implementation="pyfast"``, int8 weights, the Trainer.

transformers itself is imported by the functions, not by this module.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._transformers_cache import GrowingCache
    from ._transformers_int8 import PyfastConfig
    from ._transformers_trainer import trainer_kwargs

__all__ = ["GrowingCache", "PyfastConfig", "register", "trainer_kwargs", "unregister"]

_ELSEWHERE = {
    "GrowingCache": "._transformers_cache",
    "PyfastConfig": "._transformers_int8",
    "trainer_kwargs": "._transformers_trainer",
}
# transformers reads these words in a name as kinds of its own.
_RESERVED = ("eager", "flash", "flex_attention", "sdpa")


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(_ELSEWHERE[name], __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _interfaces() -> dict[str, Any]:
    try:
        package = importlib.import_module("transformers")
        return {
            "AttentionInterface": package.AttentionInterface,
            "AttentionMaskInterface": package.AttentionMaskInterface,
        }
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "pyfast.integrations.transformers needs transformers with AttentionInterface and "
            f"AttentionMaskInterface (4.53 or newer): {error}"
        ) from error


def _check_name(caller: str, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{caller}: name must be a str, got {type(name).__name__}")
    if not re.fullmatch(r"[\w.-]+", name) or any(word in name for word in _RESERVED):
        raise ValueError(
            f"{caller}: name must consist of letters, digits, '_', '-' and '.', without "
            f"{', '.join(map(repr, _RESERVED))}, which transformers takes for its own, got {name!r}"
        )


def _check_not_taken(caller: str, name: str, interfaces: dict[str, Any]) -> None:
    ours = f"{__package__}._transformers_attention"
    for interface_name, interface in interfaces.items():
        function = interface().get(name)
        if function is not None and getattr(function, "__module__", None) != ours:
            raise ValueError(
                f"{caller}: the name {name!r} belongs to another function in transformers' "
                f"{interface_name}: {function!r}; nothing was changed, choose another name"
            )


def register(name: str = "pyfast") -> None:
    """Register pyfast's attention with transformers, for all models of this process.

    Afterwards ``attn_implementation=name`` works in ``from_config`` and ``from_pretrained``, and
    ``model.set_attn_implementation(name)`` on a model that is there. The attention function and its
    mask function are registered together: without the second, transformers makes no masks.
    With transformers 5, checkpoints that were saved with :class:`PyfastConfig` can be loaded then,
    too. Calling it again changes nothing.

    It replaces transformers' "sdpa", with these differences: softcap (Gemma 2) and sinks (gpt-oss)
    are served; keys and values are not repeated for grouped queries; dropout happens in the kernel,
    with masks of pyfast's own generator; a learned position bias (T5) gets its gradient without a
    matrix per head and sequence where nothing is padded; padding, causality and sliding windows
    are told to the kernel instead of being read from a mask, so that hidden blocks cost nothing;
    a token that sees nothing (left padding) gives zeros. As with "sdpa", attention weights are not
    returned (``output_attentions=True`` warns).

    What it does not reach:

    * Models that do not go through ``AttentionInterface`` (in transformers 5.24 about 75, BLOOM,
      MPT, Falcon, GPT-Neo and DeBERTa among them). ``set_attn_implementation`` warns and changes
      nothing. With ``from_config`` those with a table of their own raise KeyError (Falcon,
      GPT-Neo), those that ask for a mask raise ValueError in their first call (BLOOM, MPT), and
      the others compute as with "eager" (DeBERTa): :func:`pyfast.explain` tells what was served.
    * Models with sparse attention by indices (DeepSeek V3.2, MiniMax M3): NotImplementedError.
    * Continuous batching and the Trainer's context parallelism, which accept "sdpa" by name.
    * Heads above 256 are served by the reference, in plain torch.

    Args:
        name: what models ask for. Default: ``"pyfast"``

    Raises:
        ImportError: without transformers, or with one older than 4.53.
        TypeError, ValueError: for a name that transformers would not take as a name of ours, or
            that another function has in one of the two interfaces, or where another package has
            the quantization method "pyfast"; nothing is registered then.
    """
    _check_name("register", name)
    interfaces = _interfaces()
    _check_not_taken("register", name, interfaces)
    functions = importlib.import_module("._transformers_attention", __package__)
    if int(importlib.import_module("transformers").__version__.split(".", 1)[0]) >= 5:
        importlib.import_module("._transformers_int8", __package__).register_quantizer()
    interfaces["AttentionMaskInterface"].register(name, functions.attention_mask)
    interfaces["AttentionInterface"].register(name, functions.attention_forward)


def unregister(name: str = "pyfast") -> None:
    """Undo :func:`register`; models that still ask for the name raise in their next call.

    A name that is not registered is left as it is.

    Raises:
        ImportError, TypeError, ValueError: as :func:`register`.
    """
    _check_name("unregister", name)
    interfaces = _interfaces()
    _check_not_taken("unregister", name, interfaces)
    for interface in interfaces.values():
        interface._global_mapping.pop(name, None)
