"""From a gradient and a bucket's memory to what is taken out of it for sending, and how to undo that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from sparsecomm.arena import Arena
from sparsecomm.compress.base import Compressor, SelectionBuffers, SelectorMemory
from sparsecomm.compress.feedback import ErrorFeedback, Feedback
from sparsecomm.compress.moments import Correction, advance, rewind, work_space
from sparsecomm.compress.places import Places
from sparsecomm.compress.residuals import BucketLayout
from sparsecomm.kernels import dispatch as kernels

__all__ = ["Bucket", "ChunkNorms", "Taken", "accumulate", "take_all", "take_some"]


Span = tuple[int, int]
"""First element and one past the last."""

ChunkNorms = tuple[int, torch.Tensor]
"""Elements of a chunk, and where the L1 norm of every chunk is written: float32."""


@cache
def _nothing(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(0, dtype=torch.uint32, device=device), torch.empty(0, device=device)


@dataclass(slots=True)
class Bucket:
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

    bucket: Bucket
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


def take_some(
    bucket: Bucket,
    grad: torch.Tensor,
    compressor: Compressor,
    k: int,
    feedback: Feedback | None,
    arena: Arena,
    *,
    scale: float = 1.0,
    held: Sequence[Span] = (),
    clip_norm: float | None = None,
    lasting: bool = True,
) -> Taken:
    """Adds a gradient to a bucket's memory and takes out about k elements.

    The caller then calls `Taken.commit` or `Taken.undo`, exactly once.

    Args:
        bucket: Mutated.
        grad: shape (n,), float32, float16 or bfloat16.
        compressor: selects.
        k: how many elements to select.
        feedback: what to do with the rest; None forgets it.
        arena: gives the buffers.
        scale: factor that brings the gradient into the residual's units.
        held: elements of parameters that this rank did not use in this step (their gradient is zero): their memory
            stays as it is, since DDP would throw away what is sent for a parameter that no rank used.
        clip_norm: norm this bucket's gradient is clipped to, for momentum correction.
        lasting: whether the gradient stays as it is until commit or undo; else a copy of the memory is kept to undo by.
    """
    residual = bucket.residual
    assert residual is not None, "a sparse exchange needs a residual"
    taken = _begin(bucket, grad, feedback, arena, scale, held, clip_norm, lasting)
    capacity = taken.capacity = compressor.capacity(k, grad.numel())
    if taken.source is None:
        return taken
    unit = scale if taken.momentum is None else 1.0
    try:
        out = SelectionBuffers(
            indices=arena.get((bucket.index, "indices"), capacity, torch.uint32),
            values=arena.get((bucket.index, "values"), capacity, torch.float32),
        )
        selection = compressor.select(taken.source, residual, k, bucket.memory, out, scale=unit)
    except BaseException:
        taken.undo()
        raise
    taken.accumulated = True
    taken.nonfinite += selection.nonfinite
    taken.indices, taken.values = out.indices[: selection.nnz], out.values[: selection.nnz]
    return taken


def take_all(
    bucket: Bucket,
    grad: torch.Tensor,
    feedback: Feedback | None,
    arena: Arena,
    *,
    scale: float = 1.0,
    held: Sequence[Span] = (),
    clip_norm: float | None = None,
    lasting: bool = True,
    exact: bool = False,
) -> Taken:
    """Adds a gradient to a bucket's memory, to be sent whole: the residual then is what to send.

    Where nothing was ever left over (no residual) the gradient itself is what to send. Arguments as in `take_some`, and
    `exact`: nothing of it will be rounded off, so that a residual which is zero may be passed over. The caller then
    calls `Taken.commit` or `Taken.undo`, exactly once.
    """
    if exact and bucket.empty and (feedback is None or isinstance(feedback, ErrorFeedback)):
        return Taken(bucket, grad, scale, 0, *_nothing(grad.device), source=grad, whole=True, direct=True)
    taken = accumulate(bucket, grad, feedback, arena, scale=scale, held=held, clip_norm=clip_norm, lasting=lasting)
    taken.whole = True
    return taken


def accumulate(
    bucket: Bucket,
    grad: torch.Tensor,
    feedback: Feedback | None,
    arena: Arena,
    *,
    scale: float = 1.0,
    held: Sequence[Span] = (),
    clip_norm: float | None = None,
    lasting: bool = True,
    norms: ChunkNorms | None = None,
) -> Taken:
    """Adds a gradient to a bucket's memory; what to take out of it (`Taken.places`) is found out with the others.

    Arguments as in `take_some`, and `norms`, which becomes those of the residual. The caller then calls `Taken.commit`
    or `Taken.undo`, exactly once.
    """
    taken = _begin(bucket, grad, feedback, arena, scale, held, clip_norm, lasting)
    if bucket.residual is not None and taken.source is not None:
        unit = scale if taken.momentum is None else 1.0
        if norms is None:
            taken.nonfinite += kernels.accumulate_dense(taken.source, bucket.residual, scale=unit)
        else:
            taken.nonfinite += kernels.accumulate_norms(taken.source, bucket.residual, *norms, scale=unit)
        taken.accumulated = True
    return taken


def _begin(
    bucket: Bucket,
    grad: torch.Tensor,
    feedback: Feedback | None,
    arena: Arena,
    scale: float,
    held: Sequence[Span],
    clip_norm: float | None,
    lasting: bool,
) -> Taken:
    """Puts held memory aside and, with momentum or Adam correction, turns the gradient into what is to be added."""
    if feedback is None and bucket.residual is not None:
        bucket.residual.zero_()
    bucket.empty = False
    taken = Taken(bucket, grad, scale, 0, *_nothing(grad.device), source=grad)
    for name in ("residual", "velocity", "second_moment"):
        memory: torch.Tensor | None = getattr(bucket, name)
        if memory is not None:
            if not lasting:
                copy = arena.get((bucket.index, name, "before"), memory.numel(), torch.float32)
                taken.before.append((memory, copy.copy_(memory)))
            for start, end in held:
                place = memory[start:end]
                taken.held.append((place, place.clone()))
                place.zero_()
    if feedback is not None and not isinstance(feedback, ErrorFeedback):
        taken.momentum = feedback
        _accelerate(taken, feedback, arena, clip_norm)
    return taken


def _accelerate(taken: Taken, options: Correction, arena: Arena, clip_norm: float | None) -> None:
    """Updates the moments. NaN and infinity leave them as they were."""
    bucket, grad = taken.bucket, taken.grad
    assert bucket.velocity is not None, "momentum correction needs a velocity"
    n = grad.numel()
    low, high = (float(x) for x in torch.aminmax(grad)) if n else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        taken.nonfinite = n - int(torch.isfinite(grad).sum())
        taken.source = None
        return
    if clip_norm is not None and n:
        norm = float(torch.linalg.vector_norm(grad, dtype=torch.float32)) * abs(taken.scale)
        taken.clip = min(1.0, clip_norm / norm) if norm > 0 else 1.0
    factor = taken.scale * taken.clip
    space = work_space(options, arena, bucket.index, n)
    taken.source = advance(options, bucket.velocity, bucket.second_moment, grad, factor, bucket.age, space)
