"""From a gradient and a bucket's memory to what is taken out of it for sending, and how to undo that."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sparsecomm import kernels
from sparsecomm.compress.base import Compressor, SelectionBuffers
from sparsecomm.feedback.corrections import Correction, advance, work_space
from sparsecomm.feedback.memory import BucketMemory
from sparsecomm.feedback.options import ErrorFeedback, Feedback
from sparsecomm.feedback.taken import Taken, _nothing
from sparsecomm.runtime.arena import Arena

__all__ = ["ChunkNorms", "accumulate", "take_all", "take_some"]


Span = tuple[int, int]
"""First element and one past the last."""

ChunkNorms = tuple[int, torch.Tensor]
"""Elements of a chunk, and where the L1 norm of every chunk is written: float32."""


def take_some(
    bucket: BucketMemory,
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
    bucket: BucketMemory,
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
    bucket: BucketMemory,
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
    bucket: BucketMemory,
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
