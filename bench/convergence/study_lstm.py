"""Train a byte-level LSTM with PyTorch DDP over MPI, with every option of the study.

    mpirun -n 4 python bench/convergence/study_lstm.py --global-batch 16 --density 0.01 --log run.json

Text, options and log are those of study_gpt.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import options
import text_task
import torch
import torch.nn.functional as F
from gpt_model import VOCAB
from text_task import Settings, TextTask
from torch import Tensor, nn
from trainer import run


class LSTM(nn.Module):
    """One recurrent layer between an embedding and a head, 263,936 parameters."""

    def __init__(self, *, embedding: int = 64, width: int = 192) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, embedding)
        self.lstm = nn.LSTM(embedding, width, batch_first=True)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of predicting ``y`` from ``x``, int64 ``(batch, time)`` each, in nats per byte."""
        hidden, _ = self.lstm(self.tokens(x))
        return F.cross_entropy(self.head(hidden).view(-1, VOCAB), y.reshape(-1))


class LSTMTask(TextTask):
    """Prediction of the next byte by an LSTM; a ``Task``."""

    def build(self) -> nn.Module:
        """Returns the untrained LSTM."""
        torch.manual_seed(self.settings.seed)
        return LSTM()


def parse(arguments: Sequence[str] | None) -> Settings:
    """Parses and checks the command line; exits with status 2 and one message if it is wrong."""
    parser, training = options.make_parser(__doc__ or "", steps=3000, batch=8, lr=3e-3)
    text_task.add_options(training)
    return options.parse(parser, Settings, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    settings = parse(arguments)
    torch.set_num_threads(1)
    return run(settings, LSTMTask(settings, text_task.load(settings), "LSTM"))


if __name__ == "__main__":
    raise SystemExit(main())
