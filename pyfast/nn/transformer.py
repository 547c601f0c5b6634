"""Transformer layers: subclasses of torch's whose attention is pyfast's and whose dropout, residual
and norm are one pass each."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as _module

from ..ops.multi_head_attention import canonical_mask
from . import functional as F
from ._fx import leaf
from .attention import MultiheadAttention
from .dropout import Dropout
from .int8_attention import Int8MultiheadAttention
from .linear import Linear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DROPOUTS = (nn.Dropout, Dropout)
_LINEARS: dict[type[nn.Module], Any] = {nn.Linear: nn.functional.linear, Linear: F.linear}
_CHILDREN = {nn.MultiheadAttention: MultiheadAttention, nn.Dropout: Dropout}


def _swap_children(layer: nn.Module) -> None:
    """What ``pyfast.patch`` does: the parameters, and the random numbers they took, stay."""
    for child in layer.children():
        target = _CHILDREN.get(type(child))
        if target is not None:
            child.__class__ = target


def _is_plain(module: nn.Module) -> bool:
    """True when a call of the module does what its class does, and nobody listens."""
    members = module.__dict__
    return "forward" not in members and not any(members[name] for name in _HOOKS)


def _has_global_hooks() -> bool:
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def _fuses(
    layer: nn.Module, base: type[nn.Module], num_parts: int, blocks: tuple[str, ...]
) -> bool:
    """True when the fused ops stand for exactly the modules and methods that they bypass."""
    kind, children = type(layer), layer._modules
    if _has_global_hooks():
        return False
    for name in blocks:
        if name in layer.__dict__ or getattr(kind, name) is not getattr(base, name):
            return False
    for i in range(1, num_parts + 1):
        norm, dropout = children.get(f"norm{i}"), children.get(f"dropout{i}")
        if (
            type(norm) is not nn.LayerNorm
            or len(norm.normalized_shape) != 1
            or type(dropout) not in _DROPOUTS
            or not _is_plain(norm)
            or not _is_plain(dropout)  # type: ignore[arg-type]
        ):
            return False
    return True


def _options(dropout: Any) -> dict[str, Any]:
    """How the fused ops drop what the module would drop."""
    return {
        "p": dropout.p,
        "training": dropout.training,
        "generator": getattr(dropout, "generator", None),
        "seed": getattr(dropout, "seed", None),
    }


def _add_norm(x: Tensor, residual: Tensor, dropout: Any, norm: Any) -> Tensor:
    """``norm(residual + dropout(x))``"""
    options = _options(dropout)
    y = F.dropout_add_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, **options)
    return y  # type: ignore[return-value]


def _prenorm(x: Tensor, residual: Tensor, dropout: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """``(norm(z), z)`` of ``z = residual + dropout(x)``"""
    options = _options(dropout)
    return F.dropout_add_norm(  # type: ignore[return-value]
        x, residual, norm.weight, norm.bias, eps=norm.eps, prenorm=True, **options
    )


def _add_linear(linear: Any, hidden: Tensor, residual: Tensor, dropout: Any) -> Tensor:
    """``residual + dropout(linear(hidden))``"""
    function = _LINEARS.get(type(linear))
    if function is not None and _is_plain(linear):
        x, bias = function(hidden, linear.weight), linear.bias
    else:
        x, bias = linear(hidden), None
    return F.bias_dropout_add(x, bias, residual, **_options(dropout))


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Replaces :class:`torch.nn.TransformerEncoderLayer`: same constructor, initialisation,
    state_dict, arguments and errors.

    Differences: its attention is :class:`pyfast.nn.MultiheadAttention`, its dropouts are
    :class:`pyfast.nn.Dropout`, and ``norm(x + dropout(...))`` is one op, with the masks that these
    modules would draw. Training and evaluation run the same code. A query that may look at nothing
    gets zeros from the attention, and float masks are added (torch: NaN, and any non-zero of a mask
    for masked out, in its fast path). torch's own ``forward``, with its
    fast path where that applies, is called for nested tensors (which ``nn.TransformerEncoder``
    makes of padded batches), and where ``norm1``, ``norm2``, ``dropout1`` or ``dropout2`` is not a
    plain LayerNorm or Dropout, or has hooks, ``self_attn`` is of another class, or ``_sa_block`` or
    ``_ff_block`` is overridden.

    Args:
        d_model: E, the size of input and result.
        nhead: number of heads, a divisor of E.
        dim_feedforward: size of the hidden layer. Default: 2048
        dropout: of the weights of the attention, and of what the blocks give. Default: 0.1
        activation: ``"relu"``, ``"gelu"`` or a callable. Default: ``F.relu``
        layer_norm_eps: added to the variance. Default: 1e-5
        batch_first: inputs are (N, S, E) instead of (S, N, E). Default: ``False``
        norm_first: normalise before the blocks, not after. Default: ``False``
        bias: learn biases in linear layers and norms. Default: ``True``
        device, dtype: of the parameters.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _swap_children(self)

    @leaf
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """One layer of an encoder.

        Args:
            src: (S, N, E), (N, S, E) with ``batch_first``, or (S, E).
            src_mask: (S, S) or (N nhead, S, S): bool, True for masked out, or floats, added.
            src_key_padding_mask: (N, S) or (S,), as ``src_mask``.
            is_causal: ``src_mask`` is causal: believed, not checked. Default: ``False``

        Returns:
            The shape of ``src``.

        Raises:
            AssertionError, RuntimeError: torch's, for what torch refuses.
        """
        if (
            src.is_nested
            or (is_causal and src_mask is None)
            or type(self.self_attn) not in (MultiheadAttention, Int8MultiheadAttention)
            or not _fuses(self, nn.TransformerEncoderLayer, 2, ("_sa_block", "_ff_block"))
        ):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        padding = canonical_mask(
            src_key_padding_mask, "src_key_padding_mask", src_mask, "src_mask", src
        )
        mask = canonical_mask(src_mask, "src_mask", padding, "", src)
        x, options = src, {"need_weights": False, "is_causal": is_causal}
        y = self.norm1(x) if self.norm_first else x
        y = self.self_attn(y, y, y, padding, attn_mask=mask, **options)[0]
        if self.norm_first:
            y, x = _prenorm(y, x, self.dropout1, self.norm2)
        else:
            y = x = _add_norm(y, x, self.dropout1, self.norm1)
        hidden = self.dropout(self.activation(self.linear1(y)))
        if self.norm_first:
            return _add_linear(self.linear2, hidden, x, self.dropout2)
        return _add_norm(self.linear2(hidden), x, self.dropout2, self.norm2)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Replaces :class:`torch.nn.TransformerDecoderLayer`: same constructor, initialisation,
    state_dict, arguments and errors.

    Differences: as :class:`pyfast.nn.TransformerEncoderLayer`; torch's own ``forward`` is called
    where one of ``norm1`` to ``norm3`` or ``dropout1`` to ``dropout3`` is not a plain LayerNorm or
    Dropout, or has hooks, or ``_sa_block``, ``_mha_block`` or ``_ff_block`` is overridden.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype: as for :class:`pyfast.nn.TransformerEncoderLayer`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _swap_children(self)

    @leaf
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """One layer of a decoder.

        Args:
            tgt: (T, N, E), (N, T, E) with ``batch_first``, or (T, E).
            memory: (S, N, E), (N, S, E) or (S, E): what the encoder gave.
            tgt_mask: (T, T) or (N nhead, T, T): bool, True for masked out, or floats, added.
            memory_mask: (T, S) or (N nhead, T, S), as ``tgt_mask``.
            tgt_key_padding_mask: (N, T) or (T,), as ``tgt_mask``.
            memory_key_padding_mask: (N, S) or (S,), as ``tgt_mask``.
            tgt_is_causal: ``tgt_mask`` is causal: believed, not checked. Default: ``False``
            memory_is_causal: the same of ``memory_mask``. Default: ``False``

        Returns:
            The shape of ``tgt``.

        Raises:
            AssertionError, RuntimeError: torch's, for what torch refuses.
        """
        blocks = ("_sa_block", "_mha_block", "_ff_block")
        if not _fuses(self, nn.TransformerDecoderLayer, 3, blocks):
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        x, no_weights = tgt, {"need_weights": False}
        y = self.norm1(x) if self.norm_first else x
        masks = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask}
        y = self.self_attn(y, y, y, is_causal=tgt_is_causal, **masks, **no_weights)[0]
        if self.norm_first:
            y, x = _prenorm(y, x, self.dropout1, self.norm2)
        else:
            y = x = _add_norm(y, x, self.dropout1, self.norm1)
        masks = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask}
        y = self.multihead_attn(
            y, memory, memory, is_causal=memory_is_causal, **masks, **no_weights
        )[0]
        if self.norm_first:
            y, x = _prenorm(y, x, self.dropout2, self.norm3)
        else:
            y = x = _add_norm(y, x, self.dropout2, self.norm2)
        hidden = self.dropout(self.activation(self.linear1(y)))
        if self.norm_first:
            return _add_linear(self.linear2, hidden, x, self.dropout3)
        return _add_norm(self.linear2(hidden), x, self.dropout3, self.norm3)
