"""Prediction of the next byte of real text: the part that the language models' scripts share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import gpt_data
import options
from gpt_data import Corpus, DataError
from task import Batch, Indices
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Settings(options.Settings):
    """The parsed command line; ``--help`` explains each option."""

    text: str | None
    block: int
    held_out: int | None


def add_options(training: argparse._ArgumentGroup) -> None:
    """Adds the options of the text."""
    training.add_argument("--text", metavar="FILE", help="text to learn (default: Python's standard library)")
    training.add_argument("--block", type=options.positive, default=64, help="bytes per sequence (default %(default)s)")
    usual = ", ".join(f"{count} of {part}" for part, count in gpt_data.HELD_OUT_BATCHES.items())
    training.add_argument(
        "--held-out",
        type=options.positive,
        help=f"held-out batches of {gpt_data.HELD_OUT_BATCH} sequences (default {usual})",
    )


def load(settings: Settings) -> Corpus:
    """Reads the text; exits with status 2 and one message if it cannot be used."""
    try:
        return gpt_data.load_corpus(settings.text, settings.block)
    except DataError as error:
        options.fail(str(error))


class TextTask:
    """Prediction of the next byte; a ``Task`` without its model.

    Args:
        settings: The command line.
        corpus: The text.
        model: Name of the model.
    """

    items = "bytes"
    trajectory: tuple[str, ...] = ("block", "held_out")

    def __init__(self, settings: Settings, corpus: Corpus, model: str) -> None:
        self.settings, self.corpus = settings, corpus
        self.title = f"{model}, sequences of {settings.block} bytes, text: {corpus.name}"
        self.facts: dict[str, Any] = {
            "text": corpus.name,
            "data_digest": corpus.digest,
            "loss_unit": "nats per byte",
        }
        self.items_per_example = settings.block
        self.examples = len(corpus.train) - settings.block

    def batch(self, chosen: Indices) -> Batch:
        """Returns the sequences that begin there: inputs and targets, int64 ``(batch, block)`` each."""
        return gpt_data.sequences(self.corpus.train, chosen, self.settings.block)

    def held_out(self) -> list[Batch]:
        """Returns the fixed validation or test batches."""
        s = self.settings
        return gpt_data.held_out_batches(self.corpus, s.judge, s.block, s.held_out)

    def measure(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        """Returns the mean loss, in nats per byte, and no accuracy."""
        loss: Tensor = model(inputs, targets)
        return loss, None
