"""The tasks of the training benches: small models and data from which they can learn.

A batch depends only on seed, rank and step, so that all methods see the same examples in the same order.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecomm.errors import ConfigError

__all__ = ["TASKS", "Task", "task", "transformer"]

_CLASSES, _LATENT = 10, 16
_HELD_OUT = 2**20  # step number of the held-out batch, which no run reaches


@dataclass(frozen=True, slots=True)
class Task:
    """A model and an endless stream of examples.

    Attributes:
        name: Name in `TASKS`.
        build: Returns a fresh model, which depends only on ``torch.manual_seed``.
        draw: Returns inputs and int64 targets, given a generator and a number of examples.
        batch: Examples per rank and step.
        lr: Learning rate of SGD with momentum 0.9 that suits plain averaging.
        held_out: Number of examples on which the loss is reported.
    """

    name: str
    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
    batch: int
    lr: float
    held_out: int

    def examples(self, seed: int, rank: int, step: int) -> tuple[Tensor, Tensor]:
        """Returns the batch of a rank at a step."""
        generator = torch.Generator().manual_seed((seed * 4099 + rank) * 2**21 + step)
        return self.draw(generator, self.batch)

    def held_out_examples(self, seed: int) -> tuple[Tensor, Tensor]:
        """Returns examples that no step trains on."""
        generator = torch.Generator().manual_seed((seed * 4099) * 2**21 + _HELD_OUT)
        return self.draw(generator, self.held_out)

    @staticmethod
    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross-entropy, a scalar in nats."""
        logits: Tensor = model(inputs)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def task(name: str) -> Task:
    """Returns the task of this name.

    Raises:
        ConfigError: It does not exist.
    """
    if name not in TASKS:
        raise ConfigError(f"task {name!r} does not exist; known are {', '.join(TASKS)}")
    return TASKS[name]


@functools.cache
def _teacher(inputs: int) -> tuple[Tensor, Tensor]:
    """Returns the maps from latents to inputs, shape (latent, inputs), and to classes, shape (latent, classes)."""
    generator = torch.Generator().manual_seed(7)
    spread = torch.randn(_LATENT, inputs, generator=generator, dtype=torch.float32) / _LATENT**0.5
    return spread, torch.randn(_LATENT, _CLASSES, generator=generator, dtype=torch.float32)


def _labelled(shape: tuple[int, ...], generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
    """Draws noisy images of random latents, and labels of the latents by a fixed teacher."""
    numel = int(torch.Size(shape).numel())
    spread, classes = _teacher(numel)
    latent = torch.randn(examples, _LATENT, generator=generator, dtype=torch.float32)
    noise = 0.1 * torch.randn(examples, numel, generator=generator, dtype=torch.float32)
    return (latent @ spread + noise).view(examples, *shape), (latent @ classes).argmax(1)


def _mlp() -> nn.Module:
    """Returns six square layers of width 2048 and a head, 25.2M parameters."""
    layers: list[nn.Module] = []
    for _ in range(6):
        linear = nn.Linear(2048, 2048, dtype=torch.float32)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(2048, _CLASSES, dtype=torch.float32))


def _cnn() -> nn.Module:
    """Returns three convolutions and a head for 16 x 16 images, 0.3M parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, dtype=torch.float32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, dtype=torch.float32),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1, dtype=torch.float32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128 * 16, 100, dtype=torch.float32),
        nn.ReLU(),
        nn.Linear(100, _CLASSES, dtype=torch.float32),
    )


def transformer(width: int, layers: int, heads: int) -> nn.TransformerEncoder:
    """Returns the blocks of a GPT: float32, batches first, a norm before each part and one at the end."""
    block = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float32
    )
    return nn.TransformerEncoder(block, layers, nn.LayerNorm(width, dtype=torch.float32), enable_nested_tensor=False)


class _ByteGPT(nn.Module):
    """A causal transformer over bytes, 0.8M parameters."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width, dtype=torch.float32)
        self.positions = nn.Embedding(context, width, dtype=torch.float32)
        self.blocks = transformer(width, layers, heads)
        self.head = nn.Linear(width, 256, bias=False, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Maps bytes, int64 (batch, time), to logits of the next bytes, (batch, time, 256)."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        hidden = self.tokens(x) + self.positions.weight[: x.shape[1]]
        logits: Tensor = self.head(self.blocks(hidden, mask=mask, is_causal=True))
        return logits


@functools.cache
def _text() -> Tensor:
    """Returns source code of Python's standard library as uint8, which needs no download."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def _bytes(generator: torch.Generator, examples: int, context: int = 64) -> tuple[Tensor, Tensor]:
    text = _text()
    starts = torch.randint(text.numel() - context - 1, (examples,), generator=generator)
    windows = text[starts[:, None] + torch.arange(context + 1, dtype=torch.int64)].long()
    return windows[:, :-1], windows[:, 1:]


TASKS = {
    t.name: t
    for t in (
        Task("mlp", _mlp, functools.partial(_labelled, (2048,)), batch=8, lr=0.003, held_out=256),
        Task("cnn", _cnn, functools.partial(_labelled, (1, 16, 16)), batch=8, lr=0.03, held_out=512),
        Task("gpt", _ByteGPT, _bytes, batch=8, lr=0.1, held_out=64),
    )
}
"""Tasks by name."""
