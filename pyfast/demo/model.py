"""A byte-level GPT made of torch's own modules: nothing in this file knows of pyfast."""

from __future__ import annotations

from torch import Tensor, nn

VOCABULARY = 256


class GPT(nn.Module):
    """Predicts the next byte at every position.

    Args:
        layers: number of transformer layers.
        width: of the embeddings; the hidden layers are four times as wide.
        heads: attention heads of each layer.
        context: the longest sequence.
        dropout: of the embeddings, the attention, the hidden layers and the residual branches.
    """

    mask: Tensor  # [context, context]

    def __init__(
        self, *, layers: int, width: int, heads: int, context: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [batch, length] -> [batch, length, 256]
        length = x.shape[1]
        y = self.dropout(self.bytes(x) + self.positions.weight[:length])
        for block in self.blocks:
            y = block(y, self.mask[:length, :length], is_causal=True)
        logits: Tensor = self.head(self.norm(y))
        return logits
