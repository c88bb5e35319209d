"""Steps 1 and 2 of an exchange: adds a gradient to a bucket's memory and takes out what is sent."""

from __future__ import annotations

import torch

from sparsecomm import kernels
from sparsecomm.compress.base import Compressor, SelectionBuffers
from sparsecomm.feedback.added import Added, Incoming, begin
from sparsecomm.feedback.memory import BucketMemory
from sparsecomm.feedback.options import ErrorFeedback
from sparsecomm.feedback.taken import NothingTaken, PlacesTaken, SelectedTaken, WholeTaken
from sparsecomm.runtime.arena import Arena

__all__ = ["ChunkNorms", "accumulate", "take_all", "take_some"]

ChunkNorms = tuple[int, torch.Tensor]
"""Elements of a chunk, and the buffer for the L1 norm of every chunk: float32."""


def take_some(memory: BucketMemory, incoming: Incoming, compressor: Compressor, k: int, arena: Arena) -> SelectedTaken:
    """Adds a gradient to a bucket's memory and takes out about k elements.

    Args:
        memory: the bucket's, with a residual. Mutated.
        incoming: the gradient.
        compressor: selects.
        k: number of elements to select.
        arena: gives the buffers.

    Returns:
        The selection. The caller calls its `commit` or `undo`, exactly once.
    """
    residual, grad = memory.residual, incoming.grad
    assert residual is not None, "a sparse exchange needs a residual"
    added = begin(memory, incoming, arena)
    capacity = compressor.capacity(k, grad.numel())
    if added.source is None:
        return SelectedTaken(added, capacity=capacity)
    try:
        out = SelectionBuffers(
            indices=arena.get((memory.index, "indices"), capacity, torch.uint32),
            values=arena.get((memory.index, "values"), capacity, torch.float32),
        )
        selection = compressor.select(added.source, residual, k, memory.memory, out, scale=added.unit)
    except BaseException:
        added.undo(None)
        raise
    added.in_residual = True
    added.nonfinite += selection.nonfinite
    return SelectedTaken(added, (out.indices[: selection.nnz], out.values[: selection.nnz]), capacity)


def take_all(
    memory: BucketMemory, incoming: Incoming, arena: Arena, *, exact: bool = False
) -> WholeTaken | NothingTaken:
    """Adds a gradient to a bucket's memory, to be sent whole: the residual then is what to send.

    Where nothing was ever left over (no residual) the gradient itself is what to send.

    Args:
        memory: the bucket's. Mutated.
        incoming: the gradient.
        arena: gives the buffers.
        exact: whether nothing of it will be rounded off, so that a residual that is zero may be passed over.

    Returns:
        What to send. The caller calls its `commit` or `undo`, exactly once.
    """
    feedback = incoming.feedback
    if exact and memory.empty and (feedback is None or isinstance(feedback, ErrorFeedback)):
        return NothingTaken(Added(memory, incoming, incoming.grad))
    return WholeTaken(_sum(memory, incoming, arena, None))


def accumulate(memory: BucketMemory, incoming: Incoming, arena: Arena, norms: ChunkNorms | None = None) -> PlacesTaken:
    """Adds a gradient to a bucket's memory. All ranks then find the places that are sent together.

    Args:
        memory: the bucket's. Mutated.
        incoming: the gradient.
        arena: gives the buffers.
        norms: filled with the norms of the residual after the addition; None for none.

    Returns:
        What leaves the memory once its places are known. The caller calls its `commit` or `undo`, exactly once.
    """
    return PlacesTaken(_sum(memory, incoming, arena, norms))


def _sum(memory: BucketMemory, incoming: Incoming, arena: Arena, norms: ChunkNorms | None) -> Added:
    added = begin(memory, incoming, arena)
    if memory.residual is not None and added.source is not None:
        if norms is None:
            added.nonfinite += kernels.accumulate_dense(added.source, memory.residual, scale=added.unit)
        else:
            added.nonfinite += kernels.accumulate_norms(added.source, memory.residual, *norms, scale=added.unit)
        added.in_residual = True
    return added
