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

import options
import text_task
import torch
from gpt_data import Corpus
from gpt_model import SIZES, build
from text_task import TextTask
from torch import nn
from trainer import run


@dataclass(frozen=True, kw_only=True)
class Settings(text_task.Settings):
    """The parsed command line; ``--help`` explains each option."""

    size: str


class GPTTask(TextTask):
    """Prediction of the next byte by a GPT; a ``Task``.

    Args:
        settings: The command line.
        corpus: The text.
    """

    trajectory = ("size", *TextTask.trajectory)
    settings: Settings

    def __init__(self, settings: Settings, corpus: Corpus) -> None:
        super().__init__(settings, corpus, f"GPT '{settings.size}'")

    def build(self) -> nn.Module:
        """Returns the untrained GPT."""
        return build(self.settings.size, self.settings.block, self.settings.seed)


def parse(arguments: Sequence[str] | None) -> Settings:
    """Parses and checks the command line; exits with status 2 and one message if it is wrong."""
    parser, training = options.make_parser(__doc__ or "", steps=400, batch=8, lr=1e-3)
    training.add_argument("--size", choices=tuple(SIZES), default="demo", help="model (default %(default)s)")
    text_task.add_options(training)
    return options.parse(parser, Settings, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    settings = parse(arguments)
    torch.set_num_threads(1)
    return run(settings, GPTTask(settings, text_task.load(settings)))


if __name__ == "__main__":
    raise SystemExit(main())
