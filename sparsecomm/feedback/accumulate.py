"""Steps 1 and 2 of an exchange: add a gradient to the memory of a bucket and take out the elements to send."""

from __future__ import annotations

import torch

from sparsecomm import kernels
from sparsecomm.compress.base import Compressor, SelectionBuffers
from sparsecomm.feedback.added import Added, Incoming, set_aside_and_correct
from sparsecomm.feedback.memory import BucketMemory, Empty
from sparsecomm.feedback.options import ErrorFeedback
from sparsecomm.feedback.taken import GradientTaken, PlacesTaken, SelectedTaken, WholeTaken
from sparsecomm.runtime.arena import Arena

__all__ = ["ChunkNorms", "accumulate", "take_all", "take_some"]

ChunkNorms = tuple[int, torch.Tensor]
"""Elements per chunk, and a float32 buffer for the L1 norms of all chunks."""


def take_some(memory: BucketMemory, incoming: Incoming, compressor: Compressor, k: int, arena: Arena) -> SelectedTaken:
    """Adds a gradient to the memory of a bucket and takes out about k elements.

    Args:
        memory: memory of the bucket, with a residual. Mutated.
        incoming: the gradient.
        compressor: selects the elements.
        k: number of elements to select.
        arena: allocates the buffers.

    Returns:
        The selected elements. The caller must call `commit` or `undo` on the result, exactly once.
    """
    residual, grad = memory.residual, incoming.grad
    assert residual is not None, "a sparse exchange needs a residual"
    added = set_aside_and_correct(memory, incoming, arena)
    capacity = compressor.capacity(k, grad.numel())
    if added.source is None:
        return SelectedTaken(added, capacity=capacity)
    try:
        out = SelectionBuffers(
            indices=arena.get((memory.index, "indices"), capacity, torch.uint32),
            values=arena.get((memory.index, "values"), capacity, torch.float32),
        )
        selection = compressor.select(added.source, residual, k, memory.selector, out, scale=added.factor)
    except BaseException:
        added.undo(None)
        raise
    added.in_residual = True
    added.nonfinite += selection.nonfinite
    if memory.watch is not None:
        memory.watch.look(added.hidden)
    return SelectedTaken(added, (out.indices[: selection.nnz], out.values[: selection.nnz]), capacity)


def take_all(
    memory: BucketMemory, incoming: Incoming, arena: Arena, *, exact: bool = False
) -> WholeTaken | GradientTaken:
    """Adds a gradient to the memory of a bucket and takes the whole residual.

    In a bucket without a residual, the gradient itself is sent.

    Args:
        memory: memory of the bucket. Mutated.
        incoming: the gradient.
        arena: allocates the buffers.
        exact: whether values are sent without rounding. Then a residual that is zero is bypassed.

    Returns:
        WholeTaken, or GradientTaken for a residual that was bypassed. The caller must call `commit` or `undo` on the
        result, exactly once.
    """
    feedback = incoming.feedback
    if exact and memory.empty != Empty.UNKNOWN and (feedback is None or isinstance(feedback, ErrorFeedback)):
        return GradientTaken(Added(memory, incoming, incoming.grad))
    return WholeTaken(_add_to_residual(memory, incoming, arena, None))


def accumulate(memory: BucketMemory, incoming: Incoming, arena: Arena, norms: ChunkNorms | None = None) -> PlacesTaken:
    """Adds a gradient to the memory of a bucket, before all ranks find common places to send.

    Args:
        memory: memory of the bucket. Mutated.
        incoming: the gradient.
        arena: allocates the buffers.
        norms: filled with the chunk norms of the residual after the addition; None to compute none.

    Returns: A `PlacesTaken`, of which the method sets `places`. The caller must call `commit` or `undo` on the result,
        exactly once.
    """
    return PlacesTaken(_add_to_residual(memory, incoming, arena, norms))


def _add_to_residual(memory: BucketMemory, incoming: Incoming, arena: Arena, norms: ChunkNorms | None) -> Added:
    added = set_aside_and_correct(memory, incoming, arena)
    if memory.residual is not None and added.source is not None:
        if norms is None:
            added.nonfinite += kernels.accumulate_dense(added.source, memory.residual, scale=added.factor)
        else:
            added.nonfinite += kernels.accumulate_norms(added.source, memory.residual, *norms, scale=added.factor)
        added.in_residual = True
    return added
