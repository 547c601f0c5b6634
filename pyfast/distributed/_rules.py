"""How the tensors of each op may be cut: the sharding rules of DTensor.

A rule takes the arguments of its op, tensors as DTensor's specifications, and yields pairs: the
placements of the results, and those of the leading arguments that they need, both along one
dimension of the mesh. Tensors that a pair does not mention are replicated. That everything may be
replicated is understood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.distributed.tensor import Partial, Placement, Replicate, Shard

Pair = tuple[Sequence[Placement], Sequence[Placement]]
Rule = Callable[..., Iterator[Pair]]

_WHOLE, _SUM = Replicate(), Partial()
_BATCH, _HEADS = Shard(0), Shard(1)


def _dropout(
    x: Any,
    seed: Any,
    threshold: int,
    stream: int,
    scale: float,
    shift: float,
    fill: float,
    mask_ndim: int,
) -> Iterator[Pair]:
    for dim in range(x.ndim):
        yield [Shard(dim)], [Shard(dim)]
    if shift == 0 and fill == 0:  # a linear map
        yield [_SUM], [_SUM]


def _row_dims(x: Any, threshold: int) -> range:
    """Dimensions along which the rows of ``x`` may be cut. Where they are numbered for dropout, the
    rows of a shard must follow one another."""
    return range(x.ndim - 1) if threshold == 0 else range(min(1, x.ndim - 1))


def _bias_dropout_add(x: Any, bias: Any, residual: Any, seed: Any, *rule: Any) -> Iterator[Pair]:
    threshold, last = rule[0], Shard(x.ndim - 1)
    for dim in _row_dims(x, threshold):
        yield [Shard(dim)], [Shard(dim), _WHOLE, Shard(dim)]
    if threshold == 0:
        yield [last], [last, Shard(0), last]


def _bias_dropout_add_backward(grad: Any, seed: Any, *rule: Any) -> Iterator[Pair]:
    threshold, last = rule[0], Shard(grad.ndim - 1)
    for dim in _row_dims(grad, threshold):
        yield [Shard(dim), _SUM], [Shard(dim)]
    if threshold == 0:
        yield [last, Shard(0)], [last]


def _has_even_rows(x: Any) -> bool:
    """True when a cut of the first dimension cuts the flattened rows as DTensor would cut them."""
    return bool(x.ndim == 2 or (x.ndim > 2 and x.shape[0] % x.mesh.size() == 0))


def _dropout_add_norm(
    x: Any, residual: Any, weight: Any, bias: Any, seed: Any, *rule: Any
) -> Iterator[Pair]:
    rms, keep_z = rule[-2:]
    if _has_even_rows(x):
        z, mean = _BATCH if keep_z else _WHOLE, _WHOLE if rms else _BATCH
        yield [_BATCH, z, mean, _BATCH], [_BATCH, _BATCH]


def _dropout_add_norm_backward(
    grad_y: Any, grad_z: Any, z: Any, weight: Any, mean: Any, rstd: Any, seed: Any, *rule: Any
) -> Iterator[Pair]:
    if _has_even_rows(z):
        rows = [_BATCH, _BATCH, _BATCH, _WHOLE, _WHOLE if rule[-1] else _BATCH, _BATCH]
        yield [_BATCH, _BATCH, _SUM, _SUM], rows


def _dropout_add_norm_int8(
    x: Any, residual: Any, weight: Any, bias: Any, seed: Any, *rule: Any
) -> Iterator[Pair]:
    for dim in _row_dims(x, rule[0]):
        yield [Shard(dim)] * 3, [Shard(dim)] * 2


def _dropconnect_linear(
    input: Any, weight: Any, bias: Any, seed: Any, threshold: int
) -> Iterator[Pair]:
    last = Shard(input.ndim - 1)
    for dim in range(input.ndim - 1):
        yield [Shard(dim)], [Shard(dim)]
    yield [last], [_WHOLE, Shard(0), Shard(0)]
    if bias is None:
        yield [_SUM], [last, Shard(1)]


def _along(tensor: Any, dim: int) -> Placement:
    """Cut along ``dim``, unless the tensor is broadcast there."""
    return Shard(dim) if tensor is not None and tensor.shape[dim] > 1 else _WHOLE


def _gradient_along(tensor: Any, dim: int, wanted: bool = True) -> Placement:
    """Of a tensor that was placed by ``_along``; whole where there is no gradient."""
    if tensor is None or not wanted:
        return _WHOLE
    return Shard(dim) if tensor.shape[dim] > 1 else _SUM


def _cuts_heads(q: Any, *keys: Any) -> bool:
    """True when each part of the query heads meets its own part of the key heads."""
    if q.shape[1] == keys[0].shape[1]:
        return True
    parts = 1
    for dim, size in enumerate(q.mesh.shape):
        if any(t.placements[dim] == _HEADS for t in (q, *keys)):
            parts *= size
    return parts > 1 and all(t.shape[1] % parts == 0 for t in (q, *keys))


def _attention(
    q: Any, k: Any, v: Any, mask: Any, slopes: Any, sinks: Any, cu_q: Any, *_: Any
) -> Iterator[Pair]:
    if cu_q is None:
        extras = [_along(mask, 0), _along(slopes, 0)]
        yield [_BATCH] * 2, [*[_BATCH] * 3, *extras]
    if _cuts_heads(q, k, v):
        yield [_HEADS] * 2, [*[_HEADS] * 3, _along(mask, 1), _HEADS, Shard(0)]


def _attention_backward(
    grad_out: Any,
    grad_lse: Any,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    slopes: Any,
    sinks: Any,
    cu_q: Any,
    cu_k: Any,
    *rest: Any,
) -> Iterator[Pair]:
    with_mask, with_slopes = rest[-2:]
    if cu_q is None:
        vectors = [
            _gradient_along(mask, 0, with_mask),
            _gradient_along(slopes, 0, with_slopes),
            _WHOLE if sinks is None else _SUM,
        ]
        extras = [_along(mask, 0), _along(slopes, 0), _WHOLE, _WHOLE, _WHOLE]
        yield [*[_BATCH] * 3, *vectors], [*[_BATCH] * 5, *extras, _BATCH, _BATCH]
    if _cuts_heads(q, k, v):
        vectors = [
            _gradient_along(mask, 1, with_mask),
            _HEADS if slopes is not None and with_slopes else _WHOLE,
            _WHOLE if sinks is None else Shard(0),
        ]
        extras = [_along(mask, 1), _HEADS, Shard(0), _WHOLE, _WHOLE]
        yield [*[_HEADS] * 3, *vectors], [*[_HEADS] * 5, *extras, _HEADS, _HEADS]


def _attention_with_kv_cache(
    q: Any, k: Any, v: Any, k_scale: Any, v_scale: Any, lengths: Any, slopes: Any, *_: Any
) -> Iterator[Pair]:
    yield [_BATCH] * 2, [*[_BATCH] * 6, _along(slopes, 0)]
    if _cuts_heads(q, k, v):
        yield [_HEADS] * 2, [*[_HEADS] * 5, _WHOLE, _HEADS, Shard(0)]


def _attention_weights(
    q: Any, k: Any, mask: Any, lse: Any, seed: Any, *rule: Any
) -> Iterator[Pair]:
    average = rule[-2]
    yield [_BATCH], [_BATCH, _BATCH, _along(mask, 0), _BATCH]
    if _cuts_heads(q, k) and (not average or q.shape[1] % q.mesh.size() == 0):
        out = Partial("avg") if average else _HEADS
        yield [out], [_HEADS, _HEADS, _along(mask, 1), _HEADS]


def _attention_weights_backward(
    grad: Any, q: Any, k: Any, mask: Any, lse: Any, seed: Any, *rule: Any
) -> Iterator[Pair]:
    average, with_mask = rule[-2:]
    out = [_BATCH, _BATCH, _gradient_along(mask, 0, with_mask), _BATCH]
    yield out, [_BATCH, _BATCH, _BATCH, _along(mask, 0), _BATCH]
    if _cuts_heads(q, k) and (not average or q.shape[1] % q.mesh.size() == 0):
        out = [_HEADS, _HEADS, _gradient_along(mask, 1, with_mask), _HEADS]
        yield out, [_WHOLE if average else _HEADS, _HEADS, _HEADS, _along(mask, 1), _HEADS]


def _quantize_int8(
    x: Any, scale: Any, smooth: Any, block_size: int, symmetric: bool
) -> Iterator[Pair]:
    for dim in range(x.ndim - 1):
        place = Shard(dim)
        given = scale is not None and scale.ndim > dim and scale.shape[dim] == x.shape[dim]
        whole = scale is None or scale.shape.numel() == 1
        if given or whole:
            out = [place, place, _WHOLE if symmetric else place]
            yield out, [place, _WHOLE if whole else place]


def _int8_linear(
    x: Any,
    weight: Any,
    weight_scale: Any,
    bias: Any,
    input_scale: Any,
    smooth: Any,
    weight_only: bool,
    activation: str,
    dtype: Any,
) -> Iterator[Pair]:
    last = Shard(x.ndim - 1)
    one_a_row = input_scale is not None and input_scale.ndim > 0 and x.ndim == input_scale.ndim + 1
    for dim in range(x.ndim - 1):
        scale = Shard(dim) if one_a_row else _WHOLE
        yield [Shard(dim)], [Shard(dim), _WHOLE, _WHOLE, _WHOLE, scale]
    yield [last], [_WHOLE, Shard(0), Shard(0), Shard(0)]
    if weight_only and bias is None and activation == "none":
        yield [_SUM], [last, Shard(1), _WHOLE, _WHOLE, _WHOLE, Shard(0)]


def _int8_mm(a: Any, b: Any) -> Iterator[Pair]:
    yield [Shard(0)], [Shard(0), _WHOLE]
    yield [Shard(1)], [_WHOLE, Shard(1)]
    yield [_SUM], [Shard(1), Shard(0)]


RULES: dict[str, Rule] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "attention_weights": _attention_weights,
    "attention_weights_backward": _attention_weights_backward,
    "attention_with_kv_cache": _attention_with_kv_cache,
    "bias_dropout_add": _bias_dropout_add,
    "bias_dropout_add_backward": _bias_dropout_add_backward,
    "dropconnect_linear": _dropconnect_linear,
    "dropout": _dropout,
    "dropout_add_norm": _dropout_add_norm,
    "dropout_add_norm_backward": _dropout_add_norm_backward,
    "dropout_add_norm_int8": _dropout_add_norm_int8,
    "int8_linear": _int8_linear,
    "int8_mm": _int8_mm,
    "quantize_int8": _quantize_int8,
}

WITHOUT_RULE = {
    "cross_entropy": "its caller hands shards to torch",
    "cross_entropy_backward": "it is called with plain tensors alone",
    "linear": "its caller hands shards to torch",
    "optimizer_step": "its caller hands it the shards of this rank, which it steps in place",
}
