"""Records gradients of real training: small models on data that needs no download, two workers, error feedback.

The input of a compressor is the gradient plus the residual of earlier steps. It is therefore recorded while the same
exchange as in training runs at the density of interest, with one simulated rank for each worker.
"""

from __future__ import annotations

import functools
import importlib.util
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecomm as sc
from sparsecomm.errors import ConfigError
from sparsecomm.exchange import Plan, exchange
from sparsecomm.feedback import BucketLayout, BucketMemory
from sparsecomm.runtime.arena import Arena
from sparsecomm.tools.benches.tasks import transformer
from sparsecomm.transport import Channel, CollectiveSteps, SimulatedWorld
from sparsecomm.types import ValueCodec

__all__ = ["SOURCES", "Recording", "Source", "missing", "record"]

_WORKERS, _CONTEXT = 2, 64


@dataclass(frozen=True, slots=True)
class Source:
    """A model and its data.

    Attributes:
        name: Name in options and rows.
        data: Description of the data.
        build: Returns a fresh model, which depends only on ``torch.manual_seed``.
        draw: Returns inputs and int64 targets, given a generator and a number of examples.
        batch: Examples per worker and step.
        lr: Learning rate of AdamW.
        needs: Package that must be installed, if any.
    """

    name: str
    data: str
    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
    batch: int
    lr: float
    needs: str | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """The vectors that worker 0 was about to compress, at several steps of one training run.

    Attributes:
        source: Name of the model.
        density: Density of the exchange with error feedback.
        steps: Steps of the recordings, counted from 1.
        accumulated: Gradient plus residual at each of these steps, float32, shape (n,).
        losses: Mean losses over the first and over the last tenth of the steps, in nats, which show that it learns.
    """

    source: str
    density: float
    steps: tuple[int, ...]
    accumulated: tuple[Tensor, ...]
    losses: tuple[float, float]


def missing(source: Source) -> str:
    """Returns why the source cannot be recorded, which names the missing package; "" if it can."""
    if source.needs and importlib.util.find_spec(source.needs) is None:
        return f"{source.needs} is not installed"
    return ""


def record(source: Source, density: float, steps: int, moments: Sequence[int]) -> Recording:
    """Trains a model and records gradient plus residual. Repeated calls give the same recording.

    Args:
        source: Model and data.
        density: Fraction of the elements that each worker sends in a step.
        steps: Training steps.
        moments: Steps to record, ascending, each in 1..steps.

    Raises:
        ConfigError: A package that the source needs is missing.
    """
    problem = missing(source)
    if problem:
        raise ConfigError(f"model {source.name!r} cannot be trained: {problem}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = source.build()
        return _train(source, model, density, steps, moments)


def _train(source: Source, model: nn.Module, density: float, steps: int, moments: Sequence[int]) -> Recording:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=source.lr, betas=(0.5, 0.95))
    workers = _Workers(sum(p.numel() for p in parameters), density)
    generators = [torch.Generator().manual_seed(1 + worker) for worker in range(_WORKERS)]
    kept, losses = [], []
    for step in range(1, steps + 1):
        grads, loss = [], 0.0
        for generator in generators:
            optimizer.zero_grad()
            inputs, targets = source.draw(generator, source.batch)
            mine = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
            torch.autograd.backward(mine)
            grads.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
            loss += mine.item() / _WORKERS
        losses.append(loss)
        if step in moments:
            kept.append(workers.residual + grads[0])
        average = workers.exchange(grads, step)
        for p, part in zip(parameters, torch.split(average, [p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    tenth = max(1, steps // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return Recording(source.name, density, tuple(moments), tuple(kept), (first, last))


class _Workers:
    """Simulated ranks, each with one bucket for the whole model."""

    def __init__(self, numel: int, density: float) -> None:
        layout = BucketLayout(("model",), ((numel,),), ((1,),))
        self._world = SimulatedWorld(_WORKERS)
        self._buckets = [BucketMemory(0, layout, torch.zeros(numel, dtype=torch.float32)) for _ in range(_WORKERS)]
        self._arenas = [Arena() for _ in range(_WORKERS)]
        self._compressor = sc.TopK(density=density)

    @property
    def residual(self) -> Tensor:
        """The residual of worker 0."""
        residual = self._buckets[0].residual
        assert residual is not None
        return residual

    def exchange(self, grads: Sequence[Tensor], step: int) -> Tensor:
        """Returns the average that every worker receives. Mutates the gradients."""
        k = self._compressor.k_for(grads[0].numel(), step)
        plan = Plan(step, "allgather", self._compressor, k, ValueCodec.FP16)

        def steps_of(channel: Channel) -> CollectiveSteps[object]:
            r = channel.rank
            return exchange(channel, self._buckets[r], grads[r], plan, self._arenas[r])

        self._world.run(steps_of)
        return grads[0]


# --- models and data ----------------------------------------------------------------------------------------------


class _ByteGPT(nn.Module):
    """A causal transformer over bytes with tied embedding and head, 0.8M parameters."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width, dtype=torch.float32)
        self.positions = nn.Embedding(_CONTEXT, width, dtype=torch.float32)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = transformer(width, layers, heads)

    def forward(self, x: Tensor) -> Tensor:
        """Maps bytes, int64 (batch, time), to logits of the next bytes, (batch, time, 256)."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        hidden = self.blocks(self.tokens(x) + self.positions.weight[: x.shape[1]], mask=mask, is_causal=True)
        return F.linear(hidden, self.tokens.weight)


class _TextCNN(nn.Module):
    """A character-level CNN (Zhang et al. 2015) that predicts the package of a piece of source code."""

    def __init__(self, classes: int, width: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, 16, dtype=torch.float32)
        self.layers = nn.Sequential(
            nn.Conv1d(16, width, 7, dtype=torch.float32),
            nn.ReLU(),
            nn.MaxPool1d(3),
            nn.Conv1d(width, 2 * width, 5, dtype=torch.float32),
            nn.ReLU(),
            nn.Conv1d(2 * width, 2 * width, 3, dtype=torch.float32),
            nn.ReLU(),
        )
        self.head = nn.Linear(2 * width, classes, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Maps bytes, int64 (batch, time), to logits of packages, (batch, classes)."""
        logits: Tensor = self.head(self.layers(self.tokens(x).transpose(1, 2)).amax(2))
        return logits


def _image_cnn() -> nn.Module:
    """Returns two convolutions and two linear layers for 8 x 8 images, 85k parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, dtype=torch.float32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, dtype=torch.float32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 16, 64, dtype=torch.float32),
        nn.ReLU(),
        nn.Linear(64, 10, dtype=torch.float32),
    )


@functools.cache
def _packages() -> tuple[Tensor, ...]:
    """Returns the source code of the 16 largest packages of Python's standard library, each as uint8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for package in sorted(p for p in root.iterdir() if (p / "__init__.py").is_file() and p.name != "test"):
        texts.append(b"\n".join(f.read_bytes() for f in sorted(package.rglob("*.py"))))
    largest = sorted(texts, key=len, reverse=True)[:16]
    return tuple(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in largest)


@functools.cache
def _text() -> Tensor:
    return torch.cat(_packages())


def _windows(text: Tensor, generator: torch.Generator, examples: int, length: int) -> Tensor:
    starts = torch.randint(text.numel() - length, (examples,), generator=generator)
    return text[starts[:, None] + torch.arange(length, dtype=torch.int64)].long()


def _next_bytes(generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
    windows = _windows(_text(), generator, examples, _CONTEXT + 1)
    return windows[:, :-1], windows[:, 1:]


def _code_of_packages(generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(len(_packages()), (examples,), generator=generator)
    windows = [_windows(_packages()[label], generator, 1, 128) for label in labels.tolist()]
    return torch.cat(windows), labels


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.as_tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.as_tensor(found.target)


def _some_digits(generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
    images, labels = _digits()
    chosen = torch.randint(len(labels), (examples,), generator=generator)
    return images[chosen], labels[chosen].long()


_LIBRARY = "Python's standard library"

SOURCES = {
    source.name: source
    for source in (
        Source("gpt", f"next byte, {_LIBRARY}", _ByteGPT, _next_bytes, batch=8, lr=3e-3),
        Source(
            "text-cnn",
            f"package of 128 bytes, {_LIBRARY}",
            lambda: _TextCNN(len(_packages())),
            _code_of_packages,
            batch=32,
            lr=3e-3,
        ),
        Source(
            "digits-cnn", "digit, scikit-learn's images", _image_cnn, _some_digits, batch=32, lr=3e-3, needs="sklearn"
        ),
    )
}
"""Sources by name."""
