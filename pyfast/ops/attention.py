"""Scaled dot-product attention: the op. Its public functions are in files of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.attention.attention_reference import (
    attention_backward_reference,
    attention_reference,
)
from ..kernels.attention.attention_tiles import can_differentiate
from ._native import compute_dtype, empty, get_num_threads, native
from ._op import Op

MAX_HEAD_SIZE = 256  # of the kernels


def heads_last_dim(x: Tensor) -> Tensor:
    """The operand as the kernels take it: any strides but in the last dimension."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    return x.resolve_neg()


def empty_heads(batch: int, heads: int, length: int, size: int, like: Tensor) -> Tensor:
    """(batch, heads, length, size) in the order of memory that torch's attention gives, in which
    the heads of a token lie side by side."""
    return empty((batch, length, heads, size), like).transpose(1, 2)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous().resolve_neg()


def _forward_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: int | Tensor,
    *rule: Any,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    out = empty_heads(batch, heads, length, v.shape[-1], q)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    native.attention(
        heads_last_dim(q),
        heads_last_dim(k),
        heads_last_dim(v),
        out,
        lse,
        mask if mask is None else mask.resolve_neg(),
        _contiguous(alibi_slopes),
        _contiguous(sinks),
        _contiguous(cu_seqlens_q),
        _contiguous(cu_seqlens_k),
        None,
        None,
        None,
        seed,
        *rule,
        get_num_threads(),
    )
    return out, lse


def _backward_native(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: int | Tensor,
    threshold: int,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    bottom_right: bool,
    with_mask: bool,
    with_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length, size = q.shape
    _, key_heads, num_keys, value_size = v.shape
    grad_q = empty_heads(batch, heads, length, size, q)
    grad_k = empty_heads(batch, key_heads, num_keys, size, k)
    grad_v = empty_heads(batch, key_heads, num_keys, value_size, v)
    delta = torch.empty_like(lse)  # sum of p * grad_p of a row, less grad_lse
    grad_mask, grad_slopes = lse.new_empty(0), lse.new_empty(0)
    if with_mask and mask is not None:
        grad_mask = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    native.attention_backward(
        heads_last_dim(grad_out),
        _contiguous(grad_lse),
        heads_last_dim(q),
        heads_last_dim(k),
        heads_last_dim(v),
        heads_last_dim(out),
        lse.contiguous(),
        delta,
        mask if mask is None else mask.resolve_neg(),
        _contiguous(alibi_slopes),
        _contiguous(sinks),
        _contiguous(cu_seqlens_q),
        _contiguous(cu_seqlens_k),
        grad_q,
        grad_k,
        grad_v,
        grad_mask if with_mask else None,
        seed,
        threshold,
        scale,
        softcap,
        left,
        right,
        bottom_right,
        get_num_threads(),
    )
    if grad_mask.numel() and mask is not None:
        grad_mask = grad_mask.to(mask.dtype)
    return grad_q, grad_k, grad_v, grad_mask, grad_slopes, _sink_gradient(sinks, lse, delta)


def _forward_triton(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from ..kernels.attention.attention_triton import attention_triton

    mask, slopes, sinks, cu_q, cu_k, *rest = arguments
    tensors = (
        heads_last_dim(q),
        heads_last_dim(k),
        heads_last_dim(v),
        mask if mask is None else mask.resolve_neg(),
        _contiguous(slopes),
        _contiguous(sinks),
        _contiguous(cu_q),
        _contiguous(cu_k),
    )
    return attention_triton(*tensors, *rest)


def _backward_triton(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    from ..kernels.attention.attention_backward_triton import attention_backward_triton

    mask, slopes, sinks, cu_q, cu_k, out, lse, *rule, _ = arguments
    tensors = (
        heads_last_dim(grad_out),
        grad_lse.contiguous().resolve_neg(),
        heads_last_dim(q),
        heads_last_dim(k),
        heads_last_dim(v),
        mask if mask is None else mask.resolve_neg(),
        _contiguous(slopes),
        _contiguous(sinks),
        _contiguous(cu_q),
        _contiguous(cu_k),
        heads_last_dim(out),
        lse.contiguous(),
    )
    *grads, grad_mask, delta = attention_backward_triton(*tensors, *rule)
    if grad_mask.numel() and mask is not None:
        grad_mask = grad_mask.to(mask.dtype)
    return (*grads, grad_mask, lse.new_empty(0), _sink_gradient(sinks, lse, delta))


def _sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor:
    """From ``delta``, the sum of p * grad_p of a row less grad_lse; empty without sinks."""
    if sinks is None:
        return lse.new_empty(0)
    share = torch.exp(sinks[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
    return -(share * delta).sum((0, 2))


def limits(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str:
    if q.dtype == torch.float64:
        return "its kernel does not compute in float64"
    if not all(0 < t.shape[-1] <= MAX_HEAD_SIZE for t in (q, v)):
        return f"its kernel serves head sizes from 1 to {MAX_HEAD_SIZE}"
    return ""


def _limits_backward(grad_out: Tensor, grad_lse: Tensor, *arguments: Any) -> str:
    q, _, v, *_ = arguments
    if arguments[-1]:
        return "its kernel has no gradient of alibi_slopes"
    if q.is_cuda and not can_differentiate(q.device, q.dtype, max(q.shape[-1], v.shape[-1])):
        return "this GPU has too little shared memory for float32 gradients of heads above 128"
    return limits(*arguments)


def fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length = q.shape[:3]
    out = q.new_empty((batch, length, heads, v.shape[-1])).transpose(1, 2)
    return out, q.new_empty((batch, heads, length), dtype=compute_dtype(q))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    seed = inputs[8]
    ctx.seed = seed if isinstance(seed, int) else None
    ctx.rule = inputs[9:]
    ctx.set_materialize_grads(False)  # of DTensors torch makes plain zeros
    saved = (*inputs[:8], *output, None if ctx.seed is not None else seed)
    ctx.save_for_backward(*saved)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, out, lse, seed = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    needs = ctx.needs_input_grad
    if ctx.seed is not None:
        seed = ctx.seed
    grads = _backward_op(
        grad_out, grad_lse, *tensors, out, lse, seed, *ctx.rule, needs[3], needs[4]
    )
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
    return (*wanted, *(None,) * 9)


attention_op = Op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor seed, int threshold, float scale,"
    " float softcap, int left, int right, bool bottom_right) -> (Tensor, Tensor)",
    {"cpu": _forward_native, "triton": _forward_triton, "reference": attention_reference},
    fake=fake_forward,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=(0, 1, 2, 3, 4),
    limits=limits,
)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    mask, alibi_slopes, sinks = arguments[:3]
    with_mask, with_slopes = arguments[-2:]
    compute = compute_dtype(q)
    vectors = []
    for tensor, wanted in ((mask, with_mask), (alibi_slopes, with_slopes), (sinks, True)):
        if tensor is not None and wanted:
            vectors.append(tensor.new_empty(tensor.shape))
        else:
            vectors.append(q.new_empty(0, dtype=compute))
    heads = (
        t.transpose(1, 2).new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v)
    )
    return (*heads, *vectors)


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    seed = inputs[12]
    ctx.seed = seed if isinstance(seed, int) else None
    ctx.rule = inputs[13:]
    ctx.save_for_backward(*inputs[:12], None if ctx.seed is not None else seed)


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Through the reference, with the same dropout mask."""
    *tensors, out, lse, seed = ctx.saved_tensors
    if ctx.seed is not None:
        seed = ctx.seed
    wanted = [i for i in range(8) if ctx.needs_input_grad[i]]

    def first_order(*inputs: Tensor) -> tuple[Tensor, ...]:
        arguments = list(tensors)
        for i, value in zip(wanted, inputs, strict=True):
            arguments[i] = value
        grads: tuple[Tensor, ...] = attention_backward_reference(
            *arguments, out, lse, seed, *ctx.rule
        )
        return grads

    values, pullback = torch.func.vjp(  # type: ignore[misc]
        first_order, *(tensors[i] for i in wanted)
    )
    cotangents = (g.to(value.dtype) for g, value in zip(grads, values, strict=True))
    found = iter(pullback(tuple(cotangents)))
    first = [next(found) if i in wanted else None for i in range(8)]
    return (*first, *(None,) * (len(ctx.needs_input_grad) - 8))


_backward_op = Op(
    "attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v,"
    " Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, Tensor out, Tensor lse, Tensor seed, int threshold, float scale,"
    " float softcap, int left, int right, bool bottom_right, bool with_mask, bool with_slopes)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {
        "cpu": _backward_native,
        "triton": _backward_triton,
        "reference": attention_backward_reference,
    },
    fake=_fake_backward,
    setup_context=_setup_context_backward,
    backward=_double_backward,
    differentiable=(0, 1, 2, 3, 4, 5, 6),
    limits=_limits_backward,
)
