"""Multi-head attention with its projections: what ``torch.nn.MultiheadAttention`` computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import (  # type: ignore[attr-defined]
    _canonical_mask,
    _in_projection,
    _in_projection_packed,
)
from torch.overrides import handle_torch_function, has_torch_function

from ._attention_arguments import autocasted
from ._op import is_eager
from ._rule import resolve_seed, threshold_of
from .attention_weights import attention_weights_op
from .scaled_dot_product_attention import scaled_dot_product_attention

_is_autocast_enabled = torch._C._is_any_autocast_enabled


class Layer(NamedTuple):
    """What of a call belongs to the layer; names as in torch's ``multi_head_attention_forward``.

    Attributes:
        dropout_p: 0 outside of training.
        separate: the projections of query, key and value where they are not one ``in_proj_weight``.
        batch_first: of query, key, value and the result.
        in_proj, out_proj: what projects instead of a product with the weights, in a dtype of its
            own: query, key and value, and the result.
    """

    embed_dim: int
    num_heads: int
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool
    dropout_p: float
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    separate: tuple[Tensor | None, Tensor | None, Tensor | None] | None
    batch_first: bool
    static_k: Tensor | None = None
    static_v: Tensor | None = None
    in_proj: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]] | None = None
    out_proj: Callable[[Tensor], Tensor] | None = None


def _sizes(x: Tensor, batch_first: bool) -> tuple[int, int]:
    """(batch, length) of an input."""
    if x.dim() == 2:
        return 1, x.shape[0]
    return (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])


def is_regular(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> bool:
    """False for nested tensors, and for what torch refuses: torch itself then knows the error."""
    if query.is_nested or key.is_nested or value.is_nested:
        return False
    dim = query.dim()
    if dim not in (2, 3) or key.dim() != dim or value.dim() != dim:
        return False
    batch, length = _sizes(query, layer.batch_first)
    key_batch, num_keys = _sizes(key, layer.batch_first)
    heads, head_size = layer.num_heads, layer.embed_dim // layer.num_heads
    if (
        query.shape[-1] != layer.embed_dim
        or head_size * heads != layer.embed_dim
        or key_batch != batch
        or key.shape[:-1] != value.shape[:-1]
        or (layer.bias_k is None) != (layer.bias_v is None)
        or not 0.0 <= layer.dropout_p <= 1.0
        or (is_causal and attn_mask is None)
        or (
            layer.out_proj is None
            and query.dtype != layer.out_proj_weight.dtype
            and not _is_autocast_enabled()
        )
    ):
        return False
    if layer.separate is not None:
        if any(weight is None for weight in layer.separate):
            return False
    elif layer.in_proj_weight is None or key.shape[-1] != value.shape[-1]:
        return False
    num_seen = num_keys
    if layer.static_k is not None or layer.static_v is not None:
        static: Tensor | None
        for static in (layer.static_k, layer.static_v):
            if static is not None:
                num_seen = static.shape[1] if static.dim() == 3 else -1
                if static.shape != (batch * heads, num_seen, head_size):
                    return False
        if layer.static_k is None or layer.static_v is None:
            if num_seen != num_keys:
                return False
        elif layer.static_k.shape != layer.static_v.shape:
            return False
        if layer.bias_k is not None:
            return False
    mask: Tensor | None
    for mask in (key_padding_mask, attn_mask):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            return False
    if key_padding_mask is not None and key_padding_mask.shape != (
        (num_seen,) if dim == 2 else (batch, num_seen)
    ):
        return False
    if attn_mask is None:
        return True
    if is_causal and key_padding_mask is None and not need_weights:
        return attn_mask.dim() in (2, 3)  # it is not looked at
    return num_seen == num_keys and attn_mask.shape in (
        (length, num_keys),
        (batch * heads, length, num_keys),
    )


def canonical_mask(
    mask: Tensor | None, name: str, other: Tensor | None, other_name: str, query: Tensor
) -> Tensor | None:
    """The mask with torch's warning and error. A bool mask stays bool where both masks are."""
    if mask is None or (mask.dtype == torch.bool and (other is None or other.dtype == torch.bool)):
        return mask
    canonical: Tensor | None = _canonical_mask(
        mask=mask,
        mask_name=name,
        other_type=None if other is None else other.dtype,
        other_name=other_name,
        target_type=query.dtype,
        check_other=bool(other_name),
    )
    return canonical


def _merged_mask(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, layer: Layer, batch: int
) -> Tensor | None:
    """Both masks as attention takes them, no larger than they are: 4-D, True for visible."""
    merged = None
    if attn_mask is not None:
        if attn_mask.dim() == 3:
            merged = attn_mask.unflatten(0, (batch, layer.num_heads))
        else:
            merged = attn_mask[None, None]
    if key_padding_mask is not None:
        padding = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask[None]
        padding = padding[:, None, None]
        if merged is None:
            merged = padding
        else:
            merged = merged | padding if merged.dtype == torch.bool else merged + padding
    if merged is None:
        return None
    num_more = int(layer.bias_k is not None) + int(layer.add_zero_attn)
    if num_more:
        merged = F.pad(merged, (0, num_more))
    return merged.logical_not() if merged.dtype == torch.bool else merged


def _project(
    layer: Layer, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections, as views of one where the inputs are one tensor."""
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    if layer.separate is not None:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return _in_projection(query, key, value, *layer.separate, *biases)  # type: ignore[no-any-return]
    assert weight is not None
    size = layer.embed_dim
    if key is value and query is key:
        q, k, v = F.linear(query, weight, bias).unflatten(-1, (3, size)).unbind(-2)
    elif key is value:
        weight_q, weight_kv = weight.split([size, 2 * size])
        bias_q, bias_kv = (None, None) if bias is None else bias.split([size, 2 * size])
        q = F.linear(query, weight_q, bias_q)
        k, v = F.linear(key, weight_kv, bias_kv).unflatten(-1, (2, size)).unbind(-2)
    else:
        q, k, v = _in_projection_packed(query, key, value, weight, bias)
    return q, k, v


def _with_bias(x: Tensor, bias: Tensor, batch_first: bool) -> Tensor:
    """One more key or value; bias is (1, 1, E)."""
    if x.dim() == 2:
        return torch.cat([x, bias[0]])
    if batch_first:
        return torch.cat([x, bias.expand(x.shape[0], 1, -1)], 1)
    return torch.cat([x, bias.expand(1, x.shape[1], -1)])


def _heads(x: Tensor, layer: Layer) -> Tensor:
    """A projection as (batch, heads, length, head size), a view."""
    x = x.unflatten(-1, (layer.num_heads, -1))
    if x.dim() == 3:
        return x.transpose(0, 1)[None]
    return x.transpose(1, 2) if layer.batch_first else x.permute(1, 2, 0, 3)


def attend(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """The result and the weights of a call that is regular."""
    causal = is_causal and key_padding_mask is None and not need_weights
    key_padding_mask = canonical_mask(
        key_padding_mask, "key_padding_mask", attn_mask, "attn_mask", query
    )
    if causal:
        attn_mask = None
    else:
        attn_mask = canonical_mask(attn_mask, "attn_mask", key_padding_mask, "", query)
    if layer.in_proj is None:
        q, k, v = _project(layer, query, key, value)
    else:
        q, k, v = layer.in_proj(query, key, value)
    if layer.bias_k is not None and layer.bias_v is not None:
        k = _with_bias(k, layer.bias_k, layer.batch_first)
        v = _with_bias(v, layer.bias_v, layer.batch_first)
    q, k, v = (_heads(x, layer) for x in (q, k, v))
    if layer.static_k is not None:
        k = layer.static_k.unflatten(0, q.shape[:2])
    if layer.static_v is not None:
        v = layer.static_v.unflatten(0, q.shape[:2])
    if layer.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    mask = _merged_mask(key_padding_mask, attn_mask, layer, q.shape[0])
    weights = None
    if need_weights:
        out, weights = _with_weights(q, k, v, mask, layer.dropout_p, average_attn_weights)
    else:
        out = scaled_dot_product_attention(q, k, v, mask, layer.dropout_p, causal)
    if query.dim() == 2:
        out = out[0].transpose(0, 1).flatten(1)
        weights = weights if weights is None else weights.squeeze(0)
    elif layer.batch_first:
        out = out.transpose(1, 2).flatten(2)
    else:
        out = out.permute(2, 0, 1, 3).flatten(2)
    if layer.out_proj is None:
        return F.linear(out, layer.out_proj_weight, layer.out_proj_bias), weights
    return layer.out_proj(out), weights


def _with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, average: bool
) -> tuple[Tensor, Tensor]:
    """Attention and its weights, both with one dropout mask."""
    dtype = q.dtype
    if _is_autocast_enabled():
        q, k, v, mask = autocasted(q, k, v, mask)
        dtype = torch.softmax(q.new_empty(0), -1).dtype  # the rule differs between devices
    threshold, eager = threshold_of(dropout_p), is_eager(q)
    seed = resolve_seed("multi_head_attention_forward", q, eager, None, None if threshold else 0)
    out, lse = scaled_dot_product_attention(q, k, v, mask, dropout_p, return_lse=True, seed=seed)
    call = attention_weights_op.eager if eager else attention_weights_op.traced
    scale = 1 / math.sqrt(q.shape[-1])
    return out, call(q, k, mask, lse, seed, threshold, scale, average, dtype)


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Project, attend with several heads, project: the function of ``MultiheadAttention``.

    Replaces :func:`torch.nn.functional.multi_head_attention_forward`, whose arguments, errors and
    surprises it has: True in a bool mask means masked out; ``is_causal`` needs ``attn_mask``,
    replaces it where neither ``key_padding_mask`` nor weights are given or asked for, and is
    ignored elsewhere. Differences:

    * a query that may look at nothing gets zeros and weights of zero (torch: NaN with
      ``need_weights``);
    * with ``need_weights`` the result is that of the fused attention too, and the weights are
      computed in a pass of their own, without a tensor of all heads where they are averaged;
    * dropout is that of :func:`pyfast.nn.functional.scaled_dot_product_attention`; the weights that
      are returned have the mask that the result was computed with, as torch's have;
    * masks are not expanded, and bool masks stay bool; a float mask may have any dtype.

    Args:
        query: (L, N, E) or (L, E), floating point.
        key: (S, N, E), or (S, N, Ek) with separate projections, or without N.
        value: (S, N, E), or (S, N, Ev) with separate projections, or without N.
        embed_dim_to_check: E.
        num_heads: H, a divisor of E.
        in_proj_weight: (3 E, E), unless ``use_separate_proj_weight``.
        in_proj_bias: (3 E,) or None.
        bias_k, bias_v: (1, 1, E) or None: one more key and value.
        add_zero_attn: a further key and value of zeros.
        dropout_p: probability of a weight to be zeroed.
        out_proj_weight, out_proj_bias: (E, E), and (E,) or None.
        training: ``False`` drops nothing. Default: ``True``
        key_padding_mask: (N, S) or (S,): bool, True for masked out, or floating point, added.
        need_weights: return the weights too. Default: ``True``
        attn_mask: (L, S) or (N H, L, S), as ``key_padding_mask``.
        use_separate_proj_weight: project with the three weights that follow. Default: ``False``
        q_proj_weight, k_proj_weight, v_proj_weight: (E, E), (E, Ek), (E, Ev).
        static_k, static_v: (N H, S, E / H): in place of the projected key or value.
        average_attn_weights: the mean of the weights over the heads. Default: ``True``
        is_causal: ``attn_mask`` is causal: believed, not checked. Default: ``False``

    Returns:
        (L, N, E) or (L, E), and the weights after dropout or None: (N, L, S), (N, H, L, S) if not
        averaged, without N for inputs without; S counts added keys. Both are differentiable twice.

    Raises:
        AssertionError, RuntimeError: torch's, for what torch refuses.
    """
    arguments = (
        *(query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias),
        *(bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training),
        *(key_padding_mask, need_weights, attn_mask, use_separate_proj_weight, q_proj_weight),
        *(k_proj_weight, v_proj_weight, static_k, static_v, average_attn_weights, is_causal),
    )
    tensors = (*arguments[:3], *arguments[5:9], out_proj_weight, out_proj_bias)
    if has_torch_function(tensors):
        return handle_torch_function(multi_head_attention_forward, tensors, *arguments)
    layer = Layer(
        embed_dim_to_check,
        num_heads,
        in_proj_weight,
        in_proj_bias,
        bias_k,
        bias_v,
        add_zero_attn,
        dropout_p if training else 0.0,
        out_proj_weight,
        out_proj_bias,
        (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None,
        False,
        static_k,
        static_v,
    )
    masks = (key_padding_mask, need_weights, attn_mask)
    if not is_regular(layer, query, key, value, *masks, is_causal):
        return F.multi_head_attention_forward(*arguments)
    return attend(layer, query, key, value, *masks, average_attn_weights, is_causal)
