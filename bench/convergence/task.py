"""A model with its data, as the trainer sees it, and the examples that a rank draws in a step."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from options import Settings
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Indices = npt.NDArray[np.int64]


class Task(Protocol):
    """A model and its data.

    Attributes:
        title: Model and data in a few words.
        facts: Entries for the log's ``meta``: the data, ``data_digest`` and ``loss_unit``.
        items: Name of the units of data, in the plural.
        items_per_example: Number of items in one example.
        examples: Number of training examples to draw from.
        trajectory: Settings of this task that a resumed run must repeat.
    """

    title: str
    facts: dict[str, Any]
    items: str
    items_per_example: int
    examples: int
    trajectory: tuple[str, ...]

    def build(self) -> nn.Module:
        """Returns the untrained model, equal on every rank, which maps inputs and targets to the mean loss."""
        ...

    def batch(self, chosen: Indices) -> Batch:
        """Returns the training examples of these numbers, each below ``examples``."""
        ...

    def held_out(self) -> list[Batch]:
        """Returns the fixed held-out batches of equal size that ``--judge`` names."""
        ...

    def measure(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the mean loss of a batch and the share classified correctly (None if that is not measured)."""
        ...


def rank_batch(settings: Settings, size: int) -> int:
    """Returns the number of examples of one rank in a step."""
    return settings.batch if settings.global_batch is None else settings.global_batch // size


def draw(task: Task, settings: Settings, *, rank: int, size: int, step: int) -> Batch:
    """Returns one rank's batch of one step, a pure function of the arguments: resuming needs no generator state.

    With ``--global-batch`` all ranks share out one draw, so that the examples of a step are the same for any number
    of ranks, and with them the dense training.
    """
    if settings.global_batch is None:
        random = np.random.default_rng([settings.seed, rank, step])
        return task.batch(random.integers(0, task.examples, size=settings.batch))
    random = np.random.default_rng([settings.seed, step])
    everyone = random.integers(0, task.examples, size=settings.global_batch)
    mine = rank_batch(settings, size)
    return task.batch(everyone[rank * mine : (rank + 1) * mine])
