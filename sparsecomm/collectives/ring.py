"""Dense allreduce around a ring, pipelined: reduce-scatter, then allgather (Patarasuk and Yuan 2009).

The vector is cut into blocks, and each block into P segments. Every block goes separately through the 2 (P - 1) steps
of a ring allreduce. Step s of block b takes place in time slot b + 2 s. The messages of all steps that share a slot,
each of a different block, move at the same time, while the segments received in the previous slot are added. So the
links and the processor work at the same time, and a segment that is added or sent on is still in the cache, however
long the vector.

Cost: 2 (P - 1) alpha and 2 n (P - 1) / P words sent by every rank, with one block. More blocks only add messages.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from sparsecomm.collectives.partial_sums import DenseSum
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps, Request

__all__ = ["SEGMENT", "ring_allreduce", "ring_blocks"]

SEGMENT = 1 << 19
"""Most elements of a segment, 2 MiB of float32. Between ranks that share memory this is long enough to make the cost
per message negligible, and short enough that a received segment is still in the last-level cache when it is added."""


def ring_blocks(numel: int, size: int, segment: int = SEGMENT) -> int:
    """Returns the number of blocks that a vector is cut into."""
    return max(1, -(-numel // (size * segment)))


def ring_allreduce(
    channel: Channel, dense: DenseSum, arena: Arena, key: Hashable, *, segment: int = SEGMENT
) -> CollectiveSteps[None]:
    """Sums a vector over all ranks, in place, with results that are bitwise equal on all ranks. Collective.

    Segment c of a block is summed in the order of ranks c, c + 1, ... The last of them owns the sum, scales it, and
    passes it on; the other ranks pass it on unchanged. In 16 bits a segment is rounded once per hop and once by its
    owner. These are at most P roundings, each of at most half a unit in the last place of a partial sum. The rank that
    rounds keeps the error (see `DenseSum`).

    Args:
        channel: Ranks that take part.
        dense: Vector to sum. Mutated: `work` becomes the sum over ranks, times `scale`; `error` is overwritten with the
            rounding errors of this rank.
        arena: Arena that provides the buffers: at most 2 (P - 1) segments, in 16 bits 8 (P - 1), whatever n.
        key: Key of the buffers.
        segment: Most elements of a segment, the same on all ranks.
    """
    if channel.size == 1:
        dense.finish_exactly()
        return
    segments = _Segments(channel, dense, arena, key, segment)
    last = 2 * channel.size - 3
    slots = segments.blocks + 2 * last

    def moving(slot: int) -> list[tuple[int, int]]:
        return [(slot - 2 * s, s) for s in range(last + 1) if 0 <= slot - 2 * s < segments.blocks]

    def post(slot: int) -> list[Request]:
        receives = [r for b, s in moving(slot) for r in segments.receive(b, s)]
        return receives + [r for b, s in moving(slot) for r in segments.send(b, s)]

    posted = post(0)
    for slot in range(slots + 1):
        for block, step in moving(slot - 1):
            segments.take(block, step)
        # Both sides post the next slot before this one is complete, so that the link is never idle.
        waiting, posted = posted, post(slot + 1)
        if waiting:
            yield waiting


class _Segments:
    """The segments of one ring allreduce and the buffers that they pass through."""

    def __init__(self, channel: Channel, dense: DenseSum, arena: Arena, key: Hashable, segment: int) -> None:
        self.channel, self.dense = channel, dense
        size, n = channel.size, dense.work.numel()
        self.blocks = ring_blocks(n, size, segment)
        longest = -(-n // self.blocks)
        self._width = dense.nbytes(0, -(-longest // size))
        # In float32 a buffer is free again when its segment has been added, one slot after it arrived. In 16 bits the
        # segment is also sent on from the buffer, two slots after it arrived, and has left in the third slot.
        self._turns = 2 if dense.exact else 4
        # Steps that share a slot have consecutive numbers, so their numbers differ modulo the most steps of a slot.
        self._most = min((size - 1) * (1 if dense.exact else 2), -(-self.blocks // 2))
        self._slab = arena.get((key, "ring"), self._turns * self._most * self._width, torch.uint8)

    def receive(self, block: int, step: int) -> list[Request]:
        """Posts the receive of one step of one block, or nothing for an empty segment."""
        channel, dense = self.channel, self.dense
        begin, end = self._bounds(block, step)
        if begin == end:
            return []
        finished = dense.exact and step >= channel.size - 1
        into = dense.view(begin, end) if finished else self._buffer(block, step, begin, end)
        return [channel.irecv(into, (channel.rank - 1) % channel.size)]

    def send(self, block: int, step: int) -> list[Request]:
        """Posts the send of one step of one block, or nothing for an empty segment."""
        channel, dense = self.channel, self.dense
        begin, end = self._bounds(block, step - 1)
        if begin == end:
            return []
        out = dense.view(begin, end) if dense.exact else self._buffer(block, step - 1, begin, end)
        if step == 0 and not dense.exact:
            dense.pack(begin, end, out)
        return [channel.isend(out, (channel.rank + 1) % channel.size)]

    def take(self, block: int, step: int) -> None:
        """Uses the segment received in a step, and prepares the message of the next step in the same buffer."""
        dense, owner_step = self.dense, self.channel.size - 2
        begin, end = self._bounds(block, step)
        data = self._buffer(block, step, begin, end)
        packed = None if dense.exact else data
        if step > owner_step:
            if packed is not None:
                dense.read(begin, end, packed)
            return
        dense.add(begin, end, data)
        if step == owner_step:
            dense.finish(begin, end, packed)
        elif packed is not None:
            dense.pack(begin, end, packed)

    def _bounds(self, block: int, step: int) -> tuple[int, int]:
        """Returns the bounds of the elements received in a step. The next step sends the same elements."""
        n, blocks, size = self.dense.work.numel(), self.blocks, self.channel.size
        first, past = n * block // blocks, n * (block + 1) // blocks
        segment = (self.channel.rank - step - 1) % size
        return first + (past - first) * segment // size, first + (past - first) * (segment + 1) // size

    def _buffer(self, block: int, step: int, begin: int, end: int) -> torch.Tensor:
        slot = block + 2 * step
        start = (slot % self._turns * self._most + step % self._most) * self._width
        return self._slab[start : start + self.dense.nbytes(begin, end)]
