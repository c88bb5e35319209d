"""The memory of one bucket: everything that it keeps from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from sparsecomm.compress.base import SelectorMemory
from sparsecomm.feedback.layout import BucketLayout

__all__ = ["BucketMemory", "PendingStep"]


class PendingStep(Protocol):
    """A step that was exchanged and may still have to be taken back. Exactly one of the two methods is called, once."""

    def commit(self) -> None:
        """Makes the step final."""

    def undo(self) -> None:
        """Takes the step back."""


@dataclass(slots=True)
class BucketMemory:
    """Everything that one bucket keeps from step to step.

    Attributes:
        index: bucket number, the same on all ranks.
        layout: the parameters in it.
        residual: float32, shape (layout.numel,); None where every exchange is dense and nothing is ever left over.
        memory: the compressor's.
        velocity: float32, shape (layout.numel,), the momentum of momentum or Adam correction; None without it.
        second_moment: float32, shape (layout.numel,), of Adam correction; None without it.
        age: number of the step that comes next, counted from the first one that the moments have seen.
        shared: object that the exchange method keeps for this bucket, the same on all ranks; lost with the memory.
        pending: the last exchanged step, while the optimizer may still skip it.
        empty: whether the residual is known to be zero everywhere.
    """

    index: int
    layout: BucketLayout
    residual: torch.Tensor | None = None
    memory: SelectorMemory = field(default_factory=SelectorMemory)
    velocity: torch.Tensor | None = None
    second_moment: torch.Tensor | None = None
    age: int = 1
    shared: object = None
    pending: PendingStep | None = None
    empty: bool = False

    def finish_step(self, *, skipped: bool = False) -> None:
        """Makes the last exchanged step final, or takes it back if the optimizer skips it."""
        step, self.pending = self.pending, None
        if step is not None:
            step.undo() if skipped else step.commit()
