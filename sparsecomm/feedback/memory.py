"""What one bucket keeps from step to step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsecomm.feedback.taken import Taken

from dataclasses import dataclass, field

import torch

from sparsecomm.compress.base import SelectorMemory
from sparsecomm.feedback.layout import BucketLayout

__all__ = ["BucketMemory"]


@dataclass(slots=True)
class BucketMemory:
    """What one bucket keeps from step to step.

    Attributes:
        index: bucket number, the same on all ranks.
        layout: the parameters in it.
        residual: float32, shape (layout.numel,); None where every exchange is dense and nothing is ever left over.
        memory: the compressor's.
        velocity: float32, shape (layout.numel,), the momentum of momentum or Adam correction; None without it.
        second_moment: float32, shape (layout.numel,), of Adam correction; None without it.
        age: steps the moments have seen when the next exchange is done.
        shared: what the collective remembers of this bucket, the same on all ranks; lost with the bucket.
        unsettled: an exchanged step that may still have to be taken back, because the optimizer may skip it.
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
    unsettled: Taken | None = None
    empty: bool = False

    def settle(self, *, skipped: bool = False) -> None:
        """Makes the last exchanged step final, or takes it back if the optimizer skips it."""
        taken, self.unsettled = self.unsettled, None
        if taken is not None:
            taken.undo() if skipped else taken.commit()
