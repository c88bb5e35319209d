"""Train a small CNN on handwritten digits with PyTorch DDP over MPI, with every option of the study.

    mpirun -n 2 python bench/convergence/study_digits.py --density 0.01 --log run.json

The 1,797 real images of 8 x 8 pixels come with scikit-learn; nothing is downloaded. The split into training, validation
and test images is fixed. Options and log are those of study_gpt.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import options
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer import Batch, run

SPLIT = {"train": 997, "validation": 300, "test": 500}  # images, after one fixed shuffle
HELD_OUT_BATCH = 50  # divides validation and test, so that every image counts once


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Images and their classes.

    Attributes:
        images: float32 ``(n, 1, 8, 8)`` by part of ``SPLIT``, pixels in [0, 1].
        classes: int64 ``(n,)`` by part, 0 to 9.
        digest: Hash of the data and their split.
    """

    images: dict[str, Tensor]
    classes: dict[str, Tensor]
    digest: str


def load_digits() -> Digits:
    """Reads the images from the installed scikit-learn.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn import datasets

    data = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = (data.images[order] / 16.0).astype(np.float32)[:, None]
    classes = data.target[order].astype(np.int64)
    sizes = list(SPLIT.values())
    return Digits(
        images=dict(zip(SPLIT, torch.split(torch.from_numpy(images), sizes), strict=True)),
        classes=dict(zip(SPLIT, torch.split(torch.from_numpy(classes), sizes), strict=True)),
        digest=hashlib.sha256(repr(sizes).encode() + images.tobytes() + classes.tobytes()).hexdigest()[:16],
    )


class CNN(nn.Module):
    """Two convolutions, a pooling and two dense layers, 85,066 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.head = nn.Linear(64, 10)

    def logits(self, images: Tensor) -> Tensor:
        """Maps float32 ``(batch, 1, 8, 8)`` to ``(batch, 10)``."""
        x = F.relu(self.conv2(F.relu(self.conv1(images))))
        x = F.relu(self.hidden(F.max_pool2d(x, 2).flatten(1)))
        out: Tensor = self.head(x)
        return out

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """Returns the mean cross-entropy, in nats per image."""
        return F.cross_entropy(self.logits(images), classes)


class DigitsTask:
    """Classification of digits; a ``Task``.

    Args:
        settings: The command line.
        digits: The images.
    """

    items = "images"
    items_per_example = 1
    trajectory: tuple[str, ...] = ()

    def __init__(self, settings: options.Settings, digits: Digits) -> None:
        self.settings, self.digits = settings, digits
        self.title = "CNN on scikit-learn's digits"
        self.facts: dict[str, Any] = {
            "data": "scikit-learn's digits",
            "data_digest": digits.digest,
            "loss_unit": "nats per image",
        }

    def build(self) -> nn.Module:
        """Returns the untrained CNN."""
        torch.manual_seed(self.settings.seed)
        return CNN()

    def batch(self, rank: int, step: int) -> Batch:
        """Returns images and classes, drawn with replacement."""
        random = np.random.default_rng([self.settings.seed, rank, step])
        chosen = torch.from_numpy(random.integers(0, SPLIT["train"], size=self.settings.batch))
        return self.digits.images["train"][chosen], self.digits.classes["train"][chosen]

    def held_out(self) -> list[Batch]:
        """Returns the fixed validation or test batches."""
        part = self.settings.judge
        images, classes = self.digits.images[part], self.digits.classes[part]
        starts = range(0, len(images), HELD_OUT_BATCH)
        return [(images[i : i + HELD_OUT_BATCH], classes[i : i + HELD_OUT_BATCH]) for i in starts]

    def measure(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean loss, in nats per image, and the share classified correctly."""
        assert isinstance(model, CNN)
        logits = model.logits(inputs)
        return F.cross_entropy(logits, targets), (logits.argmax(1) == targets).float().mean()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser, _ = options.make_parser(__doc__ or "", steps=1000, batch=16, lr=2e-3)
    settings = options.parse(parser, options.Settings, arguments)
    torch.set_num_threads(1)
    try:
        digits = load_digits()
    except ImportError as error:
        options.fail(f"the digits come with scikit-learn: pip install 'sparsecomm[demo]' ({error})")
    return run(settings, DigitsTask(settings, digits))


if __name__ == "__main__":
    raise SystemExit(main())
