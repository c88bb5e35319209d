"""Train a CNN with normalisation layers on Fashion-MNIST with PyTorch DDP over MPI, with every option of the study.

    mpirun -n 4 python bench/convergence/study_fashion.py --global-batch 64 --density 0.01 --log run.json

``python bench/convergence/study_data.py`` fetches the 70,000 images of 28 x 28 pixels, once. Options and log are those
of study_gpt.py. The normalisation is GroupNorm, which looks at one image at a time. BatchNorm would see 32 images a
rank with two ranks and 4 with sixteen, so that dense training itself would change with the number of ranks.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import options
import study_data
import torch
import torch.nn.functional as F
from gpt_data import DataError
from image_task import Classifier, Images, ImageTask
from torch import Tensor, nn
from trainer import run

VALIDATION = 12  # one of so many training images is held out to tune on
HELD_OUT_BATCH = 100  # at most; must divide validation and test
MEAN, DEVIATION = 0.286, 0.353  # of the training pixels in [0, 1]


@dataclass(frozen=True, kw_only=True)
class Settings(options.Settings):
    """The parsed command line; ``--help`` explains each option."""

    data: str


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Reads a gzipped array of bytes in the idx format.

    Raises:
        DataError: The file cannot be read, or is no such array.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing{study_data.hint(path)}") from error
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    # two zeros, the type (8: bytes), the number of dimensions, and each dimension as a big-endian int32
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{path} is no array of bytes in the idx format")
    shape = np.frombuffer(content, ">i4", count=min(content[3], len(content) // 4 - 1), offset=4)
    numbers = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
    if len(shape) != content[3] or numbers.size != np.prod(shape):
        raise DataError(f"{path} holds {numbers.size} bytes, which its dimensions {shape.tolist()} deny")
    return numbers.reshape(shape)


def load_fashion(folder: Path) -> Images:
    """Reads the images, uint8 ``(n, 1, 28, 28)``.

    Raises:
        DataError: A file is missing, or is not what its name says.
    """
    arrays = [read_idx(folder / name) for name in study_data.FASHION_FILES]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]
    pictures, labels, tests, test_labels = (torch.from_numpy(array.copy()) for array in arrays)
    if len(pictures) != len(labels) or len(tests) != len(test_labels) or not len(labels) > VALIDATION:
        raise DataError(f"the images of {folder} do not match their labels")
    held_out = torch.arange(len(labels)) % VALIDATION == 0
    images = {"train": pictures[~held_out], "validation": pictures[held_out], "test": tests}
    classes = {"train": labels[~held_out], "validation": labels[held_out], "test": test_labels}
    return Images(
        name="Fashion-MNIST",
        images={part: array[:, None] for part, array in images.items()},
        classes={part: array.long() for part, array in classes.items()},
        held_out_batch=int(np.gcd.reduce([HELD_OUT_BATCH, len(classes["validation"]), len(test_labels)])),
        digest=digest,
    )


class NormedCNN(Classifier):
    """Three convolutions with GroupNorm and two dense layers, 79,770 parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.GroupNorm(8, after)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(64 * 3 * 3, 96)
        self.head = nn.Linear(96, 10)

    def logits(self, images: Tensor) -> Tensor:
        """Maps uint8 ``(batch, 1, 28, 28)`` to ``(batch, 10)``."""
        x = self.features((images.float() / 255.0 - MEAN) / DEVIATION).flatten(1)
        out: Tensor = self.head(F.relu(self.hidden(x)))
        return out


class FashionTask(ImageTask):
    """Classification of clothes; a ``Task``."""

    def build(self) -> nn.Module:
        """Returns the untrained CNN."""
        torch.manual_seed(self.settings.seed)
        return NormedCNN()


def parse(arguments: Sequence[str] | None) -> Settings:
    """Parses and checks the command line; exits with status 2 and one message if it is wrong."""
    parser, training = options.make_parser(__doc__ or "", steps=3000, batch=16, lr=3e-3)
    training.add_argument(
        "--data", metavar="DIR", default=str(study_data.FASHION), help="folder of the images (default %(default)s)"
    )
    return options.parse(parser, Settings, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    settings = parse(arguments)
    torch.set_num_threads(1)
    try:
        images = load_fashion(Path(settings.data))
    except DataError as error:
        options.fail(str(error))
    return run(settings, FashionTask(settings, images))


if __name__ == "__main__":
    raise SystemExit(main())
