"""The attention and mask functions that transformers' models call under pyfast's name.

The mask function returns what transformers' own does for "sdpa": a boolean mask or None. To a mask
it attaches what it consists of (padding, causality, a window), which the attention function then
passes to the kernel instead of the mask. Where a model slices, moves or changes the mask, that
note is lost or out of date, and the mask itself is used.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nn.functional import scaled_dot_product_attention
from ..ops._op import is_eager

_masking: Any = importlib.import_module("transformers.masking_utils")
_is_compiling = torch.compiler.is_compiling

# Arguments of some models that change the result and that "sdpa" would not serve either.
_UNSUPPORTED = ("indices", "block_indices", "head_mask")


class _Pattern(NamedTuple):
    """What a mask consists of: everything that is visible is so by all of these."""

    keys: Tensor | None  # (B, 1, 1, K) bool
    is_causal: bool
    alignment: str
    window: int | None
    version: int  # of the mask when this was true


def _padding(attention_mask: Tensor | None, length: int, offset: int) -> Tensor | None:
    """The (B, K) mask of a caller as (B, 1, 1, K), or None where all is visible."""
    if attention_mask is None:
        return None
    keys = attention_mask[:, offset : offset + length]
    if keys.shape[1] < length:  # a static cache is longer than what is known of its tokens
        keys = torch.nn.functional.pad(keys, (0, length - keys.shape[1]))
    return None if bool(keys.all()) else keys[:, None, None, :]


def _pattern(mask: Tensor, arguments: dict[str, Any], skips_causal: bool) -> _Pattern | None:
    """The pattern of a mask that was made from ``arguments``, or None where it is another one.

    transformers allows a causal mask to be left out (``skips_causal``) where nothing was combined
    with it but padding and, with ``local_size``, a window or chunks.
    """
    names = ("q_length", "kv_length", "q_offset", "kv_offset")
    sizes: list[Any] = [arguments.get(name) for name in names]
    padding = arguments.get("attention_mask")
    if (
        not all(isinstance(size, int) for size in sizes)
        or arguments.get("use_vmap")
        or mask.is_inference()
        or not (padding is None or (padding.dim() == 2 and padding.dtype == torch.bool))
    ):
        return None
    num_queries, num_keys, q_offset, kv_offset = sizes
    if num_queries == 1:
        return None
    local_size, function = arguments.get("local_size"), arguments.get("mask_function")
    alignment = "top_left" if q_offset == kv_offset else "bottom_right"
    if skips_causal and (local_size is not None or function is _masking.causal_mask_function):
        if alignment == "bottom_right" and q_offset - kv_offset != num_keys - num_queries:
            return None
        is_causal = True
    elif (
        arguments.get("allow_is_bidirectional_skip")
        and local_size is None
        and function is getattr(_masking, "bidirectional_mask_function", None)
    ):
        is_causal = False
    else:
        return None
    keys = _padding(padding, num_keys, kv_offset)
    return _Pattern(keys, is_causal, alignment, local_size, mask._version)


_reached: dict[type, bool] = {}


def _check_reached(config: Any) -> None:
    """ValueError for a model whose code would take our mask but never call our attention."""
    kind = type(config)
    if kind not in _reached:
        _reached[kind] = _is_reached(kind)
    if not _reached[kind]:
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} does not reach models of "
            f"{kind.__name__}: their code does not go through transformers' AttentionInterface; "
            "build them without attn_implementation"
        )


def _is_reached(config_type: type) -> bool:
    module_name = config_type.__module__.replace(".configuration_", ".modeling_")
    module = sys.modules.get(module_name)
    for model in list(vars(module).values()) if module is not None else ():
        can_set = getattr(model, "_can_set_attn_implementation", None)
        if isinstance(model, type) and model.__module__ == module_name and can_set is not None:
            try:
                return can_set() or "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(model)
            except (OSError, TypeError):
                return True
    return True


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """``transformers.masking_utils.sdpa_mask``, with a note on the mask for attention_forward.

    Returns:
        (B, 1, Q, K) bool, True for visible, or None where the attention function knows as much
        from its arguments.
    """
    config = kwargs.get("config")
    if config is not None and not _is_compiling():
        _check_reached(config)
    skips_causal = kwargs.get("allow_is_causal_skip", True)
    if getattr(config, "num_kv_shared_layers", 0) and kwargs.get("q_length") != 1:
        # Gemma 4 drops queries of layers that share keys, and asks for "sdpa" by name whether a
        # mask that was left out stands in the way.
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = _masking.sdpa_mask(*args, **kwargs)
    if mask is not None and not args and is_eager(mask):
        pattern = _pattern(mask, kwargs, skips_causal)
        if pattern is not None:
            mask._pyfast_pattern = pattern  # type: ignore[attr-defined]
    return mask


def _pattern_of(mask: Tensor, query: Tensor, key: Tensor, window: Any) -> _Pattern | None:
    """The note on a mask, if it holds for this call."""
    if _is_compiling():
        return None
    pattern: _Pattern | None = getattr(mask, "_pyfast_pattern", None)
    if (
        pattern is None
        or pattern.version != mask._version
        or mask.shape[2:] != (query.shape[2], key.shape[2])
        # Chunked attention has a size too; only a layer that says so has a window.
        or (pattern.window is not None and pattern.window != window)
    ):
        return None
    return pattern


def _with_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    sliding_window: int | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it.

    Replaces ``transformers.integrations.sdpa_attention.sdpa_attention_forward``; the differences
    are told by :func:`pyfast.integrations.transformers.register`.

    Args:
        module: the layer; ``is_causal`` is read from it where the call does not say.
        query: (B, Hq, L, E).
        key: (B, Hk, S, E); Hk divides Hq.
        value: (B, Hk, S, Ev).
        attention_mask: broadcastable to (B, Hq, L, S): bool, True for visible, or floating point,
            added. None means causal for more than one query of a causal layer, from the first key
            on, and everything visible otherwise.
        dropout: probability; applied as given.
        position_bias: broadcastable to (B, Hq, L, S), added to the scores; may need a gradient.
        softcap: bound of the scores, None for none.
        s_aux: (Hq,): logits of one more key per head, whose value is zero.
        sinks: (Hq,) as s_aux, or (B, Hq, L, 1) with a logit per query.
        sliding_window: of the layer. It only tells what ``attention_mask`` consists of.
        kwargs: what other implementations need; ignored.

    Returns:
        (B, L, Hq, Ev), contiguous, and None in place of the weights.

    Raises:
        NotImplementedError: for attention that is sparse by indices, and for a head mask.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"pyfast's attention does not support {name} of {type(module).__name__}; "
                'use attn_implementation="eager"'
            )
    if output_attentions:
        warnings.warn(
            "pyfast's attention returns no weights for output_attentions=True; "
            'use attn_implementation="eager" for them',
            stacklevel=2,
        )
    mask, causal, alignment, window = attention_mask, False, "top_left", None
    if mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        if is_causal and query.shape[2] > 1:
            causal = True
    else:
        pattern = _pattern_of(mask, query, key, sliding_window)
        if pattern is not None:
            mask, causal, alignment = pattern.keys, pattern.is_causal, pattern.alignment
            window = None if pattern.window is None else (pattern.window - 1, 0)
        elif mask.shape[-1] > key.shape[2]:  # 4.x makes masks for the whole of a static cache
            mask = mask[..., : key.shape[2]]
    if position_bias is not None:
        mask = _with_bias(position_bias, mask)
    if sinks is not None and sinks.dim() == 1:
        s_aux, sinks = sinks, None
    heads, key_heads = query.shape[1], key.shape[1]
    packed = (
        mask is not None
        and heads != key_heads
        and query.shape[2] == 1
        and mask.shape[1:3] == (1, 1)
        and dropout == 0
        and s_aux is None
        and sinks is None
    )
    if packed:  # The query heads of a group as queries of one head: its keys are read once.
        query = query.reshape(query.shape[0], key_heads, -1, query.shape[3])
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        dropout,
        causal,
        scale=scaling,
        enable_gqa=heads != key_heads,
        window=window,
        softcap=softcap or 0.0,
        sinks=s_aux,
        causal_alignment=alignment,
        return_lse=sinks is not None,
    )
    if sinks is not None:  # What the keys have of a sum with one term more.
        out, lse = out
        out = out * torch.sigmoid(lse[..., None] - sinks).to(out.dtype)
    if packed:
        return out.reshape(out.shape[0], 1, heads, out.shape[3]), None
    return out.transpose(1, 2).contiguous(), None
