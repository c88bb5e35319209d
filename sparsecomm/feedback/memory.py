"""The memory of one bucket: everything that it keeps between steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch

from sparsecomm.compress.base import SelectorMemory
from sparsecomm.feedback.alignment import Alignment
from sparsecomm.feedback.layout import BucketLayout
from sparsecomm.feedback.watch import Watch

__all__ = ["BucketMemory", "Empty", "PendingStep"]


class PendingStep(Protocol):
    """An exchanged step that can still be undone. Exactly one of the methods is called, once."""

    def commit(self) -> None:
        """Makes the step final."""

    def undo(self) -> None:
        """Undoes the step."""


class Empty(Enum):
    """Ranks on which nothing is known to wait in a bucket: its residual is zero, or there is none."""

    UNKNOWN = "none"
    HERE = "this one"
    EVERYWHERE = "all, and all of them know it"


@dataclass(slots=True)
class BucketMemory:
    """Everything that one bucket keeps between steps.

    Attributes:
        index: bucket number, the same on all ranks.
        layout: the parameters of the bucket.
        residual: float32, shape (layout.numel,); None if all exchanges are dense and exact.
        selector: memory of the compressor.
        velocity: float32, shape (layout.numel,), the momentum of momentum or Adam correction; None without it.
        second_moment: float32, shape (layout.numel,), the second moment of Adam correction; None without it.
        alignment: how far the ranks agree in this bucket; measured only if the feedback asks for it.
        delivered: step, position and unscaled value of an element of an average, from the last step that measured the
            alignment; None for none. `sparsecomm.optim` compares it with what reaches the optimizer.
        age: number of the next step among those that update the moments, from 1.
        shared: object that the exchange method keeps for this bucket, the same on all ranks. It is lost when this
            memory is replaced or the options change.
        pending: the last exchanged step, while the optimizer may still skip it.
        empty: on which ranks nothing is known to wait in this bucket.
        watch: sees how long elements wait; None if nobody asks.
    """

    index: int
    layout: BucketLayout
    residual: torch.Tensor | None = None
    selector: SelectorMemory = field(default_factory=SelectorMemory)
    velocity: torch.Tensor | None = None
    second_moment: torch.Tensor | None = None
    alignment: Alignment = field(default_factory=Alignment)
    delivered: tuple[int, int, float] | None = None
    age: int = 1
    shared: object = None
    pending: PendingStep | None = None
    empty: Empty = Empty.UNKNOWN
    watch: Watch | None = None

    def finish_step(self, *, skipped: bool = False) -> None:
        """Commits the last exchanged step, or undoes it if the optimizer skips it."""
        step, self.pending = self.pending, None
        if step is not None:
            step.undo() if skipped else step.commit()
