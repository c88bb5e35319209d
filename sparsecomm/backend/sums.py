"""Allreduce, reduce and reduce-scatter with any operation and dtype.

Sums and averages in float32 take the algorithms of `collectives/`. All others go directly: every rank sends each
segment to its owner, who combines the parts in the order of ranks, in a wider dtype where there is one, and hands the
result to all. So a result is rounded once, and all ranks have the same bits. Short vectors go to all ranks whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsecomm.backend.moves import exchange, gather_all, gather_to
from sparsecomm.backend.octets import octets, pieces
from sparsecomm.backend.reduction import Reduction
from sparsecomm.collectives import DenseSum, allgatherv_direct, dense_allreduce
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["allreduce", "reduce_scatter", "reduce_to"]

_SHORT = 1 << 14
"""Bytes that a rank receives at most when all ranks get all vectors whole: one round in place of two."""


def allreduce(channel: Channel, vector: torch.Tensor, reduction: Reduction, arena: Arena) -> CollectiveSteps[None]:
    """Combines a vector of every rank, in place, with the same bits on all ranks. Collective.

    Args:
        channel: Ranks that take part.
        vector: Shape (n,), contiguous. Mutated: becomes the result.
        reduction: The operation.
        arena: Arena that provides the buffers.
    """
    if not vector.numel():
        return
    if reduction.is_float32_sum:
        scale = 1.0 / channel.size if reduction.name == "AVG" else 1.0
        yield from dense_allreduce(channel, DenseSum(vector, scale=scale), arena, "sum")
        return
    if vector.nbytes * (channel.size - 1) <= _SHORT:
        parts = yield from _all_parts(channel, vector, arena)
        reduction.combine(parts, vector)
        return
    segments = _segments(vector, channel.size)
    mine = segments[channel.rank]
    yield from reduce_scatter(channel, segments, mine, reduction, arena)
    yield from gather_all(channel, octets(mine), [octets(s) for s in segments])


def reduce_to(
    channel: Channel, vector: torch.Tensor, root: int, reduction: Reduction, arena: Arena
) -> CollectiveSteps[None]:
    """Combines a vector of every rank on the root. Collective.

    Args:
        channel: Ranks that take part.
        vector: Shape (n,), contiguous. Mutated on the root: becomes the result. Unchanged on the others.
        root: Rank of the root.
        reduction: The operation.
        arena: Arena that provides the buffers.
    """
    if not vector.numel():
        return
    size, is_root = channel.size, channel.rank == root
    if vector.nbytes * (size - 1) <= _SHORT:
        buffer = arena.get("parts", size * vector.nbytes if is_root else 0, torch.uint8)
        blocks = pieces(buffer, [vector.nbytes] * size) if is_root else []
        yield from gather_to(channel, octets(vector), blocks, root)
        if is_root:
            parts = [vector if r == root else block.view(vector.dtype) for r, block in enumerate(blocks)]
            reduction.combine(parts, vector)
        return
    segments = _segments(vector, size)
    mine = segments[channel.rank]
    result = mine if is_root else arena.get("result", mine.numel(), vector.dtype)
    yield from reduce_scatter(channel, segments, result, reduction, arena)
    yield from gather_to(channel, octets(result), [octets(s) for s in segments], root)


def reduce_scatter(
    channel: Channel, segments: Sequence[torch.Tensor], out: torch.Tensor, reduction: Reduction, arena: Arena
) -> CollectiveSteps[None]:
    """Combines a segment of every rank for each rank. Collective.

    Args:
        channel: Ranks that take part.
        segments: The segment for each rank, contiguous; segment r has the same length on all ranks.
        out: Of the length of this rank's segment. Overwritten with the result. May share memory with that segment.
        reduction: The operation.
        arena: Arena that provides the buffers.
    """
    own = segments[channel.rank]
    buffer = arena.get("parts", channel.size * own.nbytes, torch.uint8)
    blocks = [buffer[r * own.nbytes : (r + 1) * own.nbytes] for r in range(channel.size)]
    yield from exchange(channel, [octets(s) for s in segments], blocks)
    parts = [own if r == channel.rank else block.view(own.dtype) for r, block in enumerate(blocks)]
    if own.numel():
        reduction.combine(parts, out)


def _all_parts(channel: Channel, vector: torch.Tensor, arena: Arena) -> CollectiveSteps[list[torch.Tensor]]:
    """Returns the vectors of all ranks, by rank."""
    lengths = [vector.nbytes] * channel.size
    blocks = yield from allgatherv_direct(channel, octets(vector), lengths, arena, "parts")
    return [block.view(vector.dtype) for block in blocks]


def _segments(vector: torch.Tensor, size: int) -> list[torch.Tensor]:
    n = vector.numel()
    return [vector[n * r // size : n * (r + 1) // size] for r in range(size)]
