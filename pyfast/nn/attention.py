"""Multi-head attention as a module: a subclass of torch's, with its parameters."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from ..ops.multi_head_attention import Layer, attend, is_regular
from ._fx import leaf


class MultiheadAttention(nn.MultiheadAttention):
    """Replaces :class:`torch.nn.MultiheadAttention`: same constructor, initialisation, state_dict,
    attributes, errors and masks (True in a bool mask means masked out).

    See :func:`pyfast.nn.functional.multi_head_attention_forward` for the differences. Further:

    * the same code serves training and evaluation, with any mask and any number of heads; torch's
      own fast path is taken for nested tensors alone;
    * inputs with ``batch_first`` are not transposed, and the result is contiguous;
    * ``need_weights=True``, the default, costs one more pass; the memory is that of what is
      returned.

    Args:
        embed_dim: E, the size of query and result.
        num_heads: H, a divisor of E.
        dropout: probability of a weight to be zeroed in training. Default: 0.0
        bias: learn biases of the projections. Default: ``True``
        add_bias_kv: learn one more key and value. Default: ``False``
        add_zero_attn: add a key and a value of zeros. Default: ``False``
        kdim, vdim: sizes of key and value. Default: E
        batch_first: inputs are (N, L, E) instead of (L, N, E). Default: ``False``
        device, dtype: of the parameters.
    """

    @leaf
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` to ``key`` and ``value``.

        Args:
            query: (L, N, E), (N, L, E) with ``batch_first``, or (L, E).
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S) or (S,): bool, True for masked out, or floating point, added.
            need_weights: return the weights too. Default: ``True``
            attn_mask: (L, S) or (N H, L, S), as ``key_padding_mask``.
            average_attn_weights: the mean of the weights over the heads. Default: ``True``
            is_causal: ``attn_mask`` is causal: believed, not checked. Default: ``False``

        Returns:
            The result in the layout of ``query``, and the weights or None: (N, L, S), or
            (N, H, L, S) if not averaged.

        Raises:
            AssertionError, RuntimeError: torch's, for what torch refuses.
        """
        separate = None
        if not self._qkv_same_embed_dim:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        layer = Layer(
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout if self.training else 0.0,
            self.out_proj.weight,
            self.out_proj.bias,
            separate,
            self.batch_first,
        )
        masks = (key_padding_mask, need_weights, attn_mask)
        if not is_regular(layer, query, key, value, *masks, is_causal):
            return super().forward(query, key, value, *masks, average_attn_weights, is_causal)
        return attend(layer, query, key, value, *masks, average_attn_weights, is_causal)
