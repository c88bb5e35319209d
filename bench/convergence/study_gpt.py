"""Train a byte-level GPT with PyTorch DDP over MPI, with every option of the study.

    mpirun -n 4 python bench/convergence/study_gpt.py --density 0.01 --log run.json --plot run.png

``--compressor none`` trains the same model with plain DDP, the baseline. The text is Python's standard library, or
``--text FILE``. ``--out DIR`` keeps checkpoints, and ``--resume`` continues from the newest one, residuals included: a
resumed run has the numbers of one that was never interrupted. The plain form of this script is
mpi_examples/train_gpt.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gpt_data
import options
import torch
from gpt_data import Corpus, DataError, load_corpus
from gpt_model import SIZES, build
from torch import Tensor, nn
from trainer import Batch, run


@dataclass(frozen=True, kw_only=True)
class Settings(options.Settings):
    """The parsed command line; ``--help`` explains each option."""

    size: str
    text: str | None
    block: int


class TextTask:
    """Prediction of the next byte of real text; a ``Task``.

    Args:
        settings: The command line.
        corpus: The text.
    """

    items = "bytes"
    trajectory: tuple[str, ...] = ("size", "block")

    def __init__(self, settings: Settings, corpus: Corpus) -> None:
        self.settings, self.corpus = settings, corpus
        self.title = f"GPT '{settings.size}', sequences of {settings.block} bytes, text: {corpus.name}"
        self.facts: dict[str, Any] = {
            "text": corpus.name,
            "data_digest": corpus.digest,
            "loss_unit": "nats per byte",
        }
        self.items_per_example = settings.block

    def build(self) -> nn.Module:
        """Returns the untrained GPT."""
        return build(self.settings.size, self.settings.block, self.settings.seed)

    def batch(self, rank: int, step: int) -> Batch:
        """Returns inputs and targets, int64 ``(batch, block)`` each."""
        s = self.settings
        return gpt_data.training_batch(self.corpus, seed=s.seed, rank=rank, step=step, batch=s.batch, block=s.block)

    def held_out(self) -> list[Batch]:
        """Returns the fixed validation or test batches."""
        return gpt_data.held_out_batches(self.corpus, self.settings.judge, self.settings.block)

    def measure(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        """Returns the mean loss, in nats per byte, and no accuracy."""
        loss: Tensor = model(inputs, targets)
        return loss, None


def parse(arguments: Sequence[str] | None) -> Settings:
    """Parses and checks the command line; exits with status 2 and one message if it is wrong."""
    parser, training = options.make_parser(__doc__ or "", steps=400, batch=8, lr=1e-3)
    training.add_argument("--size", choices=tuple(SIZES), default="demo", help="model (default %(default)s)")
    training.add_argument("--text", metavar="FILE", help="text to learn (default: Python's standard library)")
    training.add_argument("--block", type=options.positive, default=64, help="bytes per sequence (default %(default)s)")
    return options.parse(parser, Settings, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    settings = parse(arguments)
    torch.set_num_threads(1)
    try:
        corpus = load_corpus(settings.text, settings.block)
    except DataError as error:
        options.fail(str(error))
    return run(settings, TextTask(settings, corpus))


if __name__ == "__main__":
    raise SystemExit(main())
