"""What was taken out of a bucket's memory for one step, with what undoes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch

from sparsecomm import kernels
from sparsecomm.compress.places import Places
from sparsecomm.feedback.corrections import Correction, rewind
from sparsecomm.feedback.memory import BucketMemory

__all__ = ["Taken"]


@cache
def _nothing(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(0, dtype=torch.uint32, device=device), torch.empty(0, device=device)


@dataclass(slots=True)
class Taken:
    """What was added to a bucket's memory and taken out of it, and all that is needed to undo both.

    Attributes:
        bucket: whose memory it was.
        grad: the gradient as it came, shape (n,); must be unchanged when `undo` is called without a copy (`before`).
        scale: factor that brings the gradient into the residual's units.
        nonfinite: elements that were NaN or infinite.
        indices: uint32, shape (nnz,), ascending; empty for a dense exchange.
        values: float32, shape (nnz,).
        source: what was added to the residual: the gradient (times scale), or the velocity; None if nothing was.
        momentum: the options of momentum or Adam correction, if in use.
        clip: factor by which it clipped the gradient.
        held: elements whose residual and moments were put aside, with their content.
        capacity: how many pairs the compressor may take from this bucket in a step.
        accumulated: whether `source` has been added to the residual.
        whole: whether all of the residual is sent, not only what `indices` names.
        direct: whether the gradient itself is sent whole, since the residual is zero, and stays so.
        places: what is sent of the residual, and leaves it only when the step is final.
        left: of what is sent whole or at `places`, float32: what this rank's rounding dropped; None for nothing.
        before: residual and moments, each with a copy of what it was, if the gradient will not last until `undo`.
    """

    bucket: BucketMemory
    grad: torch.Tensor
    scale: float
    nonfinite: int
    indices: torch.Tensor
    values: torch.Tensor
    source: torch.Tensor | None
    momentum: Correction | None = None
    clip: float = 1.0
    held: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    capacity: int = 0
    accumulated: bool = False
    whole: bool = False
    direct: bool = False
    places: Places | None = None
    left: torch.Tensor | None = None
    before: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def commit(self) -> None:
        """Makes the step final after the exchange has succeeded.

        What was sent whole or at `places` leaves the residual, but for what rounding dropped; the velocity is zeroed
        where something was selected (DGC's factor masking); what was put aside comes back, beside what the exchange may
        have left there in the meantime.
        """
        residual, velocity = self.bucket.residual, self.bucket.velocity
        if self.whole and residual is not None and not self.direct:
            residual.zero_() if self.left is None else residual.copy_(self.left)
            self.bucket.empty = self.left is None and not any(bool(content.any()) for _, content in self.held)
        if self.places is not None and residual is not None:
            self.places.fill(residual, 0.0) if self.left is None else self.places.put(self.left, residual)
        if self.momentum is not None and self.momentum.masking and velocity is not None:
            if self.places is not None:
                self.places.fill(velocity, 0.0)
            elif self.values.numel():
                velocity[self.indices.to(torch.int64)] = 0.0
        for place, content in self.held:
            place.add_(content)
        self.held = []

    def put_back(self) -> torch.Tensor:
        """Returns what was selected to the residual, as if only the gradient had been added.

        Returns:
            Where it was, uint32, shape (nnz,), ascending.
        """
        residual, indices = self.bucket.residual, self.indices
        if residual is not None:
            kernels.scatter_add(residual, indices, self.values)
        self.indices, self.values = _nothing(indices.device)
        return indices

    def undo(self) -> None:
        """Returns residual and moments to what they were before the step; to rounding, if no copy was kept."""
        if self.before:
            for memory, content in self.before:
                memory.copy_(content)
            self.held = []
            return
        residual, velocity = self.bucket.residual, self.bucket.velocity
        if self.accumulated and residual is not None and self.source is not None:
            step = self.source if self.momentum is not None else self.grad.to(torch.float32) * self.scale
            if self.nonfinite:
                # Where the sum was not finite the kernel had left the residual alone: adding the step again tells.
                residual.sub_(torch.where(torch.isfinite(residual + step), step, torch.zeros_like(step)))
            else:
                residual.sub_(step)
            chosen = self.indices.to(torch.int64)
            residual[chosen] = self.values - torch.nan_to_num(step[chosen], nan=0.0, posinf=0.0, neginf=0.0)
        if self.momentum is not None and velocity is not None and self.source is not None:
            rewind(self.momentum, velocity, self.bucket.second_moment, self.grad, self.scale * self.clip)
        for place, content in self.held:
            place.copy_(content)
        self.held = []
