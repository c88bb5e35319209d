"""The model of the examples: a GPT over bytes, in plain PyTorch. It knows nothing of sparsecomm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
        hidden = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        hidden = through(self.blocks, hidden)
        return mean_loss(self.head(self.norm(hidden)), targets)


class Attention(nn.Module):
    """The attention of a block with a layer each for queries, keys and values, so that ranks can share out the heads.

    Args:
        whole: The attention of a block of `TinyGPT`, whose values it takes over.
    """

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        assert isinstance(whole, nn.MultiheadAttention)
        self.features = whole.head_dim
        self.queries, self.keys, self.values = (nn.Linear(whole.embed_dim, whole.embed_dim) for _ in range(3))
        weights, biases = whole.in_proj_weight.chunk(3), whole.in_proj_bias.chunk(3)
        for layer, weight, bias in zip((self.queries, self.keys, self.values), weights, biases, strict=True):
            layer.weight, layer.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
        self.out = whole.out_proj

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Returns the causal attention, and None for the weights: a block calls it as `nn.MultiheadAttention`.

        Args:
            hidden: float ``(batch, time, features)``.
        """
        layers = (self.queries, self.keys, self.values)
        q, k, v = (layer(hidden).unflatten(-1, (-1, self.features)).transpose(1, 2) for layer in layers)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2)), None


class Stage(nn.Module):
    """The layers of one rank of a pipeline. Its parameters have the names that they have in the whole model.

    Args:
        whole: The model. The stage shares its layers.
        index: Number of this stage, from 0. The first one has the embeddings, the last one the head.
        stages: Number of stages.
    """

    def __init__(self, whole: TinyGPT, index: int, stages: int) -> None:
        super().__init__()
        first, last = (len(whole.blocks) * i // stages for i in (index, index + 1))
        self.blocks = nn.ModuleDict({str(i): whole.blocks[i] for i in range(first, last)})
        self.begins, self.ends = index == 0, index == stages - 1
        if self.begins:
            self.tokens, self.positions = whole.tokens, whole.positions
        if self.ends:
            self.norm, self.head = whole.norm, whole.head

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the output of the last block here, ``(batch, time, features)``, or of the head.

        Args:
            hidden: Output of the stage before; int64 ``(batch, time)`` in the first stage.
        """
        if self.begins:
            hidden = self.tokens(hidden) + self.positions.weight[: hidden.shape[1]]
        hidden = through(self.blocks.values(), hidden)
        return self.head(self.norm(hidden)) if self.ends else hidden


def through(blocks: Iterable[nn.Module], hidden: Tensor) -> Tensor:
    """Returns the output of the last of some blocks, of which each byte sees the bytes before it.

    Args:
        blocks: The blocks, in order.
        hidden: float ``(batch, time, features)``.
    """
    mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1])
    for block in blocks:
        hidden = block(hidden, src_mask=mask, is_causal=True)
    return hidden


def mean_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean cross-entropy of the output of the last `Stage` in nats.

    Args:
        scores: float ``(batch, time, VOCABULARY)``.
        targets: int64 ``(batch, time)``.
    """
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten())
