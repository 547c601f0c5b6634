"""pyfast in torch's registry of flash attention: ``activate_flash_attention_impl("pyfast")``.

The registry reaches attention wherever torch has chosen its flash attention: compiled graphs,
TorchScript, C++. On the CPU it does not choose it for dropout, nor where a mask needs a gradient.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import register_flash_attention_impl

from . import _backend
from ._backend import KERNEL_DTYPES
from .ops._op import Op
from .ops.attention import _backward_op, attention_op, limits
from .ops.scaled_dot_product_attention import _mask_4d

REGISTRY_NAME = "pyfast"
_forced = _backend.forced
_OPERATORS = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)


def _is_alone() -> bool:
    return threading.active_count() == 1


def why_no_kernel(op: Op, x: Tensor) -> str:
    """Why no kernel would serve the tensor, or nothing."""
    if x.dtype not in KERNEL_DTYPES or x.layout is not torch.strided or x.is_nested:
        return f"no kernel reads {str(x.dtype).removeprefix('torch.')} as {x.layout}"
    if (x.is_cpu and _backend.native is not None) or _forced() is not None:
        return ""
    return "" if op.backend_of(x) != "reference" else f"no kernel is usable on {x.device}"


def _why_no_flash(q: Tensor, k: Tensor, v: Tensor) -> str:
    return why_no_kernel(attention_op, q) or limits(q, k, v)


def _flash_mask(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    return mask if mask is None else _mask_4d(mask, q.shape[:2], q.shape[2], k.shape[2])


def _flash_rule(q: Tensor, is_causal: bool, scale: float | None) -> tuple[Any, ...]:
    """Threshold, scale, softcap, left, right, bottom_right."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return 0, scale, 0.0, -1, 0 if is_causal else -1, False


class FlashKernels:
    """torch's operators of flash attention on the CPU, served by pyfast: what the registry holds.

    Operators are given back only when no other Python thread is there to be calling them. Until
    then they pass calls on.
    """

    def __init__(self) -> None:
        self._library: torch.library.Library | None = None
        self._serves = False

    def register(self) -> FlashKernels:
        if self._library is None:
            self._originals = [torch.library.get_kernel(name, "CPU") for name in _OPERATORS]
            self._library = torch.library.Library("aten", "IMPL")
            with warnings.catch_warnings():  # that it overrides torch's kernel
                warnings.simplefilter("ignore", UserWarning)
                for name, kernel in zip(_OPERATORS, (self._forward, self._backward), strict=True):
                    self._library.impl(name, kernel, "CPU", with_keyset=True)
        self._serves = True
        return self

    def can_register(self) -> bool:
        """True where it is safe: no other thread may be in torch's dispatcher when it changes."""
        return self._library is not None or _is_alone()

    def remove(self) -> None:
        self._serves = False
        if self._library is not None and _is_alone():
            self._library._destroy()
            self._library = None

    def _forward(
        self,
        keys: torch._C.DispatchKeySet,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        if not self._serves or dropout_p or _why_no_flash(query, key, value):
            arguments = query, key, value, dropout_p, is_causal
            options = {"attn_mask": attn_mask, "scale": scale}
            return self._originals[0].call_boxed(keys, *arguments, **options)
        mask = _flash_mask(query, key, attn_mask)
        rule = _flash_rule(query, is_causal, scale)
        out, lse = attention_op.run(query, key, value, mask, None, None, None, None, 0, *rule)
        # As torch has it: strides are those of the query, and a row that sees nothing has 0.
        expected = torch.empty_like(query)
        lse = lse.masked_fill_(lse == -torch.inf, 0.0).transpose(1, 2).contiguous()
        if out.stride() != expected.stride():
            out = expected.copy_(out)
        return out, lse.transpose(1, 2)

    def _backward(
        self,
        keys: torch._C.DispatchKeySet,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        if not self._serves or dropout_p or _why_no_flash(query, key, value):
            tensors = grad_out, query, key, value, out, logsumexp
            options = {"attn_mask": attn_mask, "scale": scale}
            return self._originals[1].call_boxed(keys, *tensors, dropout_p, is_causal, **options)
        mask = _flash_mask(query, key, attn_mask)
        rule = _flash_rule(query, is_causal, scale)
        lse = logsumexp.contiguous()
        extras = mask, None, None, None, None, out, lse, 0, *rule, False, False
        grads = _backward_op.run(grad_out, torch.zeros_like(lse), query, key, value, *extras)
        return grads[:3]


flash_kernels = FlashKernels()
register_flash_attention_impl(REGISTRY_NAME, register_fn=flash_kernels.register)
