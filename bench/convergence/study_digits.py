"""Train a small CNN on handwritten digits with PyTorch DDP over MPI, with every option of the study.

    mpirun -n 2 python bench/convergence/study_digits.py --density 0.01 --log run.json

The 1,797 real images of 8 x 8 pixels come with scikit-learn; nothing is downloaded. The split into training, validation
and test images is fixed. Options and log are those of study_gpt.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import options
import torch
import torch.nn.functional as F
from image_task import Classifier, Images, ImageTask
from torch import Tensor, nn
from trainer import run

SPLIT = {"train": 997, "validation": 300, "test": 500}  # images, after one fixed shuffle


def load_digits() -> Images:
    """Reads the images, float32 ``(n, 1, 8, 8)`` in [0, 1], from the installed scikit-learn.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn import datasets

    data = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = (data.images[order] / 16.0).astype(np.float32)[:, None]
    classes = data.target[order].astype(np.int64)
    sizes = list(SPLIT.values())
    return Images(
        name="scikit-learn's digits",
        images=dict(zip(SPLIT, torch.split(torch.from_numpy(images), sizes), strict=True)),
        classes=dict(zip(SPLIT, torch.split(torch.from_numpy(classes), sizes), strict=True)),
        held_out_batch=50,
        digest=hashlib.sha256(repr(sizes).encode() + images.tobytes() + classes.tobytes()).hexdigest()[:16],
    )


class CNN(Classifier):
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


class DigitsTask(ImageTask):
    """Classification of digits; a ``Task``."""

    def build(self) -> nn.Module:
        """Returns the untrained CNN."""
        torch.manual_seed(self.settings.seed)
        return CNN()


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
