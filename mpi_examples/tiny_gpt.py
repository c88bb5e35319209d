"""The model of the examples: a GPT over bytes, in plain PyTorch. It knows nothing of sparsecomm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # one token per byte


class TinyGPT(nn.Module):
    """A byte-level GPT with about 0.9 million parameters.

    Args:
        length: Longest sequence, in bytes.
        width: Features per byte.
        layers: Transformer blocks.
    """

    def __init__(self, length: int = 64, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross-entropy of the next byte, in nats.

        Args:
            inputs: int64 ``(batch, time)``.
            targets: int64 ``(batch, time)``, the byte that follows each byte of ``inputs``.
        """
        time = inputs.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(time)
        hidden = self.tokens(inputs) + self.positions.weight[:time]
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return F.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), targets.flatten())
