"""A call of every op, forward and backward where it has one, for ``python -m pyfast info``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _backend, optim
from ._explain import explain
from .nn import functional as F

Results = list[Tensor]
_DROPS: dict[str, Any] = {"p": 0.3, "seed": 7}


class _Inputs:
    """The same values on every device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device)

    def wanted(self, *shape: int) -> Tensor:
        """Values that need a gradient."""
        return self.normal(*shape).requires_grad_()


def _with_gradients(y: Any, inputs: list[Tensor], new: _Inputs) -> Results:
    return [y.detach(), *torch.autograd.grad(y, inputs, new.normal(*y.shape))]


def _attention(new: _Inputs) -> Results:
    qkv: Any = [new.wanted(2, heads, 70, 40) for heads in (4, 2, 2)]
    options: Any = {"dropout_p": 0.3, "is_causal": True, "enable_gqa": True, "seed": 7}
    return _with_gradients(F.scaled_dot_product_attention(*qkv, **options), qkv, new)


def _attention_with_kv_cache(new: _Inputs) -> Results:
    q, keys, values = new.normal(2, 4, 1, 40), new.normal(2, 2, 90, 40), new.normal(2, 2, 90, 40)
    added = new.normal(2, 2, 1, 40), new.normal(2, 2, 1, 40)
    y: Tensor = F.attention_with_kv_cache(q, keys, values, *added, cache_seqlens=60)
    return [y, keys, values]


def _attention_weights(new: _Inputs) -> Results:
    from .ops.multi_head_attention import multi_head_attention_forward

    x, weight, out_weight = new.normal(9, 2, 32), new.normal(96, 32), new.normal(32, 32)
    y, weights = multi_head_attention_forward(
        *(x, x, x, 32, 4, weight, None, None, None, False, 0.0, out_weight, None),
        training=False,
    )
    assert weights is not None
    return [y, weights]


def _dropout(new: _Inputs) -> Results:
    x = new.wanted(37, 264)
    return _with_gradients(F.dropout(x, 0.3, seed=7), [x], new)


def _bias_dropout_add(new: _Inputs) -> Results:
    inputs: Any = [new.wanted(37, 264), new.wanted(264), new.wanted(37, 264)]
    return _with_gradients(F.bias_dropout_add(*inputs, **_DROPS), inputs, new)


def _dropconnect_linear(new: _Inputs) -> Results:
    inputs: Any = [new.wanted(37, 264), new.wanted(30, 264)]
    return _with_gradients(F.dropconnect_linear(*inputs, **_DROPS), inputs, new)


def _dropout_add_norm(new: _Inputs) -> Results:
    inputs: Any = [new.wanted(37, 264), new.wanted(37, 264), new.wanted(264), new.wanted(264)]
    y, _ = F.dropout_add_norm(*inputs, prenorm=True, **_DROPS)
    return _with_gradients(y, inputs, new)


def _dropout_add_norm_int8(new: _Inputs) -> Results:
    x, residual = new.normal(37, 264), new.normal(37, 264)
    values, scale, y = F.dropout_add_norm(x, residual, None, None, 0.3, quantize=True, seed=7)
    return [F.dequantize_int8(values, scale), y]


def _quantize_int8(new: _Inputs) -> Results:
    return list(F.quantize_int8(new.normal(37, 264)))


def _cross_entropy(new: _Inputs) -> Results:
    logits, target = new.wanted(9, 130), torch.arange(9, device=new.device) * 14
    return _with_gradients(F.cross_entropy(logits, target, reduction="none"), [logits], new)


def _linear(new: _Inputs) -> Results:
    return [F.linear(new.normal(5, 70), new.normal(30, 70), new.normal(30))]


def _int8_linear(new: _Inputs) -> Results:
    weight, scale = F.quantize_int8(new.normal(30, 264))
    x = new.normal(37, 264)
    return [F.int8_linear(x, weight, scale, weight_only=only) for only in (False, True)]


def _int8_mm(new: _Inputs) -> Results:
    a, b = (F.quantize_int8(new.normal(n, 264))[0] for n in (37, 30))
    return [F.int8_mm(a, b.t())]


def _optimizer_step(new: _Inputs) -> Results:
    p = new.wanted(37, 264)
    p.grad = new.normal(37, 264)
    optimizer = optim.AdamW([p])
    optimizer.step()
    return [p.detach(), *optimizer.state[p].values()]


_CALLS: dict[str, Callable[[_Inputs], Results]] = {
    "attention": _attention,
    "attention_weights": _attention_weights,
    "attention_with_kv_cache": _attention_with_kv_cache,
    "bias_dropout_add": _bias_dropout_add,
    "dropconnect_linear": _dropconnect_linear,
    "dropout": _dropout,
    "dropout_add_norm": _dropout_add_norm,
    "dropout_add_norm_int8": _dropout_add_norm_int8,
    "int8_linear": _int8_linear,
    "linear": _linear,
    "cross_entropy": _cross_entropy,
    "int8_mm": _int8_mm,
    "optimizer_step": _optimizer_step,
    "quantize_int8": _quantize_int8,
}


def _agree(one: Tensor, other: Tensor) -> bool:
    """To rounding; a value on the edge of two int8 steps may fall to either."""
    one, other = one.cpu().float(), other.cpu().float()
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=2e-3)


def self_test() -> dict[str, str]:
    """Every op on every usable backend against the reference: ``{"op on backend": "ok"}``."""
    results = {}
    for op, row in _backend.backends().items():
        with _backend.use_backend("reference"):
            expected = _CALLS[op](_Inputs("cpu"))
        for backend, status in row.items():
            if not status.usable or backend == "reference":
                continue
            on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
            actual: Results = []

            def call(op: str = op, into: Results = actual, on_gpu: bool = on_gpu) -> None:
                into += _CALLS[op](_Inputs("cuda" if on_gpu else "cpu"))

            with _backend.use_backend(backend):
                served = {s.backend for s in explain(call) if s.op == op}
            agree = served == {backend} and all(map(_agree, actual, expected))
            results[f"{op} on {backend}"] = "ok" if agree else "WRONG RESULT"
    return results
