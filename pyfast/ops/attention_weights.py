"""The weights of attention, from the softmax denominator that the fused op has left.

``exp(scores - lse)`` is written block by block, averaged over the heads or not: beyond the result
nothing of size heads x L x S exists, and the backward pass computes the blocks again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.common.philox_reference import philox, shard_of
from ._native import compute_dtype
from ._op import Op
from ._rule import scale_of

BLOCK_SIZE = 1 << 20  # scores: small for a cache, large against the cost of a dozen calls
MIN_ROWS = 16
_is_autocast_enabled = torch._C._is_any_autocast_enabled


class _Block(NamedTuple):
    batch: slice
    rows: slice


def _blocks(batch: int, heads: int, rows: int, columns: int) -> Iterator[_Block]:
    """Parts of (batch, rows) with about BLOCK_SIZE scores each."""
    row_size = max(1, heads * columns)
    num_rows = max(1, min(rows, max(MIN_ROWS, BLOCK_SIZE // row_size)))
    num_batches = max(1, BLOCK_SIZE // (row_size * num_rows)) if num_rows >= rows else 1
    for n in range(0, batch, num_batches):
        for i in range(0, rows, num_rows):
            yield _Block(slice(n, min(n + num_batches, batch)), slice(i, min(i + num_rows, rows)))


def _part(x: Tensor, block: _Block) -> Tensor:
    """The block of (batch or 1, heads, L or 1, ...)."""
    everything = slice(None)
    return x[
        block.batch if x.shape[0] != 1 else everything,
        :,
        block.rows if x.shape[2] != 1 else everything,
    ]


def _kept(seed: int | Tensor, threshold: int, scores: Tensor, block: _Block) -> Tensor:
    """The dropout mask of a block times its scale: score_bits, each word computed once."""
    heads, columns, device = scores.shape[1], scores.shape[3], scores.device
    if isinstance(seed, Tensor):
        seed = seed.to(device)
    seed, place = shard_of(seed)
    first, stride = (0, heads) if place is None else place
    numbers = functools.partial(torch.arange, dtype=torch.int64, device=device)
    batch = numbers(block.batch.start, block.batch.stop)
    words = philox(
        seed,
        numbers((columns + 31) // 32 * 4).view(-1, 4),  # (32 columns, call)
        numbers(block.rows.start, block.rows.stop).view(-1, 1, 1),
        (first + batch[:, None] * stride + numbers(heads)).view(-1, heads, 1, 1, 1),
        numbers(1),
    )
    word = torch.stack(words, -2)  # (batch, heads, rows, 32 columns, word, call)
    bits = torch.stack((word & 0xFFFF, word >> 16), -1).flatten(-4)[..., :columns]
    return (bits >= threshold).to(scores.dtype) * scale_of(threshold)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, lse: Tensor, scale: float) -> Tensor:
    """The softmax before dropout, in the compute type."""
    compute = compute_dtype(q)
    scores = (q.to(compute) * scale) @ k.to(compute).transpose(-1, -2)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(mask.logical_not(), -torch.inf)
    elif mask is not None:
        scores = (scores + mask.to(compute)).masked_fill(mask == -torch.inf, -torch.inf)
    reached = lse.masked_fill(lse == -torch.inf, 0.0)  # -inf - -inf is not a number
    return torch.exp(scores - reached[..., None])


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Scores must be those that lse is of, not rounded by a matmul in a smaller dtype."""

    @functools.wraps(kernel)
    def call(q: Tensor, *arguments: Any) -> Any:
        if not _is_autocast_enabled():
            return kernel(q, *arguments)
        with torch.autocast(q.device.type, enabled=False):
            return kernel(q, *arguments)

    return call


@_without_autocast
def _weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    seed: int | Tensor,
    threshold: int,
    scale: float,
    average: bool,
    dtype: torch.dtype,
) -> Tensor:
    """(N, L, S) or (N, H, L, S) of (N, H, L, E), (N, H, S, E), the mask and (N, H, L)."""
    batch, heads, rows, columns = *q.shape[:3], k.shape[2]
    shape = (batch, rows, columns) if average else (batch, heads, rows, columns)
    weights = q.new_empty(shape, dtype=dtype)
    for block in _blocks(batch, heads, rows, columns):
        part = mask if mask is None else _part(mask, block)
        part_q, part_lse = q[block.batch, :, block.rows], lse[block.batch, :, block.rows]
        p = _probabilities(part_q, k[block.batch], part, part_lse, scale)
        if threshold:
            p = p * _kept(seed, threshold, p, block)
        if average:
            weights[block.batch, block.rows] = p.mean(1)
        else:
            weights[block.batch, :, block.rows] = p
    return weights


def _block_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    kept: Callable[[Tensor], Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of q, k, the scores and lse, in the compute type; grad broadcasts over the heads."""
    compute = compute_dtype(q)
    p = _probabilities(q, k, mask, lse, scale)
    grad_scores = p * grad.to(compute)
    if kept is not None:
        grad_scores = grad_scores * kept(p)
    grad_q = grad_scores @ k.to(compute) * scale
    grad_k = grad_scores.transpose(-1, -2) @ (q.to(compute) * scale)
    return grad_q, grad_k, grad_scores, -grad_scores.sum(-1)


@_without_autocast
def _weights_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    seed: int | Tensor,
    threshold: int,
    scale: float,
    average: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, rows, columns = *q.shape[:3], k.shape[2]
    grad = grad[:, None] / heads if average else grad
    grad_q, grad_lse = torch.empty_like(q), torch.empty_like(lse)
    grad_k = torch.zeros(k.shape, dtype=lse.dtype, device=k.device)
    with_mask = with_mask and mask is not None
    grad_mask = torch.zeros(
        mask.shape if mask is not None and with_mask else 0, dtype=lse.dtype, device=k.device
    )
    for block in _blocks(batch, heads, rows, columns):
        batches, rows_ = block
        kept = functools.partial(_kept, seed, threshold, block=block) if threshold else None
        block_q, block_k, grad_scores, block_lse = _block_gradients(
            grad[batches, :, rows_],
            q[batches, :, rows_],
            k[batches],
            mask if mask is None else _part(mask, block),
            lse[batches, :, rows_],
            kept,
            scale,
        )
        grad_q[batches, :, rows_] = block_q.to(q.dtype)
        grad_k[batches] += block_k
        grad_lse[batches, :, rows_] = block_lse
        if with_mask:
            part = _part(grad_mask, block)
            part += grad_scores.sum_to_size(part.shape)
    if mask is not None:
        grad_mask = grad_mask.to(mask.dtype if with_mask else lse.dtype)
    return grad_q, grad_k.to(k.dtype), grad_mask, grad_lse


_PLAIN = ("cpu", "cuda", "triton", "reference")  # plain torch, with which no backend differs


_weights_backward_op = Op(
    "attention_weights_backward(Tensor grad, Tensor q, Tensor k, Tensor? mask, Tensor lse,"
    " Tensor seed, int threshold, float scale, bool average, bool with_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    dict.fromkeys(_PLAIN, _weights_backward),
    fake=lambda grad, q, k, mask, lse, *rule: (
        torch.empty_like(q),
        k.new_empty(k.shape),
        lse.new_empty(0) if mask is None or not rule[-1] else mask.new_empty(mask.shape),
        torch.empty_like(lse),
    ),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, mask, lse, seed, *rule, _ = inputs
    ctx.seed = seed if isinstance(seed, int) else None
    ctx.rule = tuple(rule)
    ctx.save_for_backward(q, k, mask, lse, None if isinstance(seed, int) else seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, mask, lse, seed = ctx.saved_tensors
    seed = ctx.seed if seed is None else seed
    threshold, scale, average = ctx.rule
    with_mask = ctx.needs_input_grad[2]
    if torch.is_grad_enabled():
        # A second derivative is wanted: the same formulas as one block that autograd can follow.
        whole = _Block(slice(0, q.shape[0]), slice(0, q.shape[2]))
        kept = functools.partial(_kept, seed, threshold, block=whole) if threshold else None
        grad = grad[:, None] / q.shape[1] if average else grad
        grad_q, grad_k, grad_mask, grad_lse = _block_gradients(grad, q, k, mask, lse, kept, scale)
        if with_mask:
            grad_mask = grad_mask.sum_to_size(mask.shape).to(mask.dtype)
        grad_q, grad_k = grad_q.to(q.dtype), grad_k.to(k.dtype)
    else:
        grad_q, grad_k, grad_mask, grad_lse = _weights_backward_op(
            grad, q, k, mask, lse, seed, *ctx.rule, with_mask
        )
    return (grad_q, grad_k, grad_mask if with_mask else None, grad_lse, *(None,) * 5)


attention_weights_op = Op(
    "attention_weights(Tensor q, Tensor k, Tensor? mask, Tensor lse, Tensor seed, int threshold,"
    " float scale, bool average, ScalarType dtype) -> Tensor",
    dict.fromkeys(_PLAIN, _weights),
    fake=lambda q, k, mask, lse, seed, threshold, scale, average, dtype: q.new_empty(
        (*(q.shape[:1] if average else q.shape[:2]), q.shape[2], k.shape[2]), dtype=dtype
    ),
    setup_context=_setup_context,
    backward=_backward,
    differentiable=(0, 1, 2),
)
