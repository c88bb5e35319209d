"""A byte-level GPT of nanoGPT's size class: pre-LN blocks, learned positions, tied embedding and head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 256  # one token per byte


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of the model.

    Attributes:
        layers: Transformer blocks.
        heads: Attention heads in each block; divides ``width``.
        width: Features per token.
        block: Longest sequence, in bytes.
        norm: "layer" for LayerNorm, "rms" for RMSNorm.
    """

    layers: int
    heads: int
    width: int
    block: int
    norm: str = "layer"


SIZES: dict[str, tuple[int, int, int, str]] = {  # name: layers, heads, width, norm
    "micro": (2, 2, 64, "layer"),  # about 0.14 M parameters
    "short": (2, 4, 112, "rms"),  # about 0.3 M
    "tiny": (4, 4, 128, "layer"),  # about 0.8 M
    "demo": (4, 4, 256, "layer"),  # about 3.2 M
    "25m": (8, 8, 512, "layer"),  # about 25.4 M
}
NORMS: dict[str, type[nn.LayerNorm | nn.RMSNorm]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class Block(nn.Module):
    """Pre-LN transformer block: causal self-attention, then a GELU network of four times the width."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        norm = NORMS[config.norm]
        self.norm1 = norm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)
        self.norm2 = norm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(batch, time, width)`` to the same shape."""
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, time, width))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class GPT(nn.Module):
    """The language model: maps bytes to the mean cross-entropy of the next byte."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(VOCAB, config.width)
        self.positions = nn.Embedding(config.block, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = NORMS[config.norm](config.width)
        self.head = nn.Linear(config.width, VOCAB, bias=False)
        self._initialise()
        self.head.weight = self.tokens.weight

    def _initialise(self) -> None:
        """Draws matrices from GPT-2's normal(0, 0.02), scaled down by sqrt(2 * layers) before the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            into_residual = name.endswith(("proj.weight", "down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if into_residual else 0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of predicting ``y`` from ``x``.

        Args:
            x: int64 ``(batch, time)``, bytes.
            y: int64 ``(batch, time)``, the byte that follows each byte of ``x``.

        Returns:
            Scalar, nats per byte.
        """
        hidden = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits.view(-1, VOCAB), y.reshape(-1))


def build(size: str, block: int, seed: int) -> GPT:
    """Builds one of ``SIZES``; the same seed gives every rank and every run the same start."""
    layers, heads, width, norm = SIZES[size]
    torch.manual_seed(seed)
    return GPT(GPTConfig(layers=layers, heads=heads, width=width, block=block, norm=norm))
