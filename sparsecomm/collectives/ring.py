"""Dense allreduce around a ring, pipelined: reduce-scatter, then allgather (Patarasuk and Yuan 2009).

The vector is cut into blocks, each block into P segments, and every block goes through the 2 (P - 1) steps of a ring
allreduce by itself. Step s of block b happens in slot b + 2 s: all steps that share a slot move at the same time, each
for another block, while what arrived in the slot before is added. So links and adders work at once, and what is added
or sent on is still in the cache, however long the vector.

Cost: 2 (P - 1) alpha and 2 n (P - 1) / P words sent by every rank, with one block; more blocks only add messages.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from sparsecomm.collectives.partial_sums import DenseSum
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps, Request
from sparsecomm.types import ValueCodec

__all__ = ["SEGMENT", "ring_allreduce", "ring_blocks"]

SEGMENT = 1 << 19
"""Most elements of a segment: 2 MiB of float32, between ranks that share memory long enough that its messages do not
count, and so short that what arrived is still in the last-level cache when it is added."""


def ring_blocks(numel: int, size: int, segment: int = SEGMENT) -> int:
    """Returns how many blocks a vector is cut into."""
    return max(1, -(-numel // (size * segment)))


def ring_allreduce(
    channel: Channel,
    work: torch.Tensor,
    arena: Arena,
    key: Hashable,
    *,
    wire: ValueCodec = ValueCodec.FP32,
    scale: float = 1.0,
    error: torch.Tensor | None = None,
    segment: int = SEGMENT,
) -> CollectiveSteps[None]:
    """Sums a vector over all ranks, in place, with results that are bitwise equal on all ranks. Collective.

    Segment c of a block is summed in the order of ranks c, c + 1, ..., ends at one owner, which scales it, and is
    handed on unchanged. In 16 bits it is rounded once a hop and once by its owner: at most P roundings, each of at most
    half a unit in the last place of a partial sum, each kept by the rank that made it (see `DenseSum`).

    Args:
        channel: the ranks.
        work: float32, shape (n,), contiguous. Mutated: becomes the sum over ranks, times scale.
        arena: gives buffers, at most 2 (P - 1) segments, 8 (P - 1) in 16 bits, whatever n.
        key: names them.
        wire: FP32, FP16 or BF16; sums are float32.
        scale: factor on the sum.
        error: float32, shape (n,), or None. Overwritten with what this rank rounded off, before scaling.
        segment: most elements of a segment, the same on all ranks.
    """
    dense = DenseSum(work, wire, scale, error)
    if channel.size == 1:
        dense.finish_exactly()
        return
    lanes = _Lanes(channel, dense, arena, key, segment)
    last = 2 * channel.size - 3
    slots = lanes.blocks + 2 * last

    def moving(slot: int) -> list[tuple[int, int]]:
        return [(slot - 2 * s, s) for s in range(last + 1) if 0 <= slot - 2 * s < lanes.blocks]

    def mailbox(slot: int) -> list[Request]:
        return [r for b, s in moving(slot) for r in lanes.receive(b, s)] + [
            r for b, s in moving(slot) for r in lanes.send(b, s)
        ]

    posted = mailbox(0)
    for slot in range(slots + 1):
        for block, step in moving(slot - 1):
            lanes.take(block, step)
        # The next slot is posted on both sides before this one is complete: the link never runs dry.
        waiting, posted = posted, mailbox(slot + 1)
        if waiting:
            yield waiting


class _Lanes:
    """The segments of one ring allreduce and the buffers that they pass through."""

    def __init__(self, channel: Channel, dense: DenseSum, arena: Arena, key: Hashable, segment: int) -> None:
        self.channel, self.dense = channel, dense
        size, n = channel.size, dense.work.numel()
        self.blocks = ring_blocks(n, size, segment)
        longest = -(-n // self.blocks)
        self._width = dense.nbytes(0, -(-longest // size))
        # A buffer is needed until what it received was added, a slot later; or, packed, was sent on, two slots later,
        # and had left in the third.
        self._turns = 2 if dense.exact else 4
        # Steps that move in one slot are neighbours, so numbering them modulo their most keeps them apart.
        self._most = min((size - 1) * (1 if dense.exact else 2), -(-self.blocks // 2))
        self._slab = arena.get((key, "ring"), self._turns * self._most * self._width, torch.uint8)

    def receive(self, block: int, step: int) -> list[Request]:
        """Posts the receive of one step of one block; none for an empty segment."""
        channel, dense = self.channel, self.dense
        begin, end = self._bounds(block, step)
        if begin == end:
            return []
        finished = dense.exact and step >= channel.size - 1
        into = dense.view(begin, end) if finished else self._buffer(block, step, begin, end)
        return [channel.irecv(into, (channel.rank - 1) % channel.size)]

    def send(self, block: int, step: int) -> list[Request]:
        """Posts the send of one step of one block; none for an empty segment."""
        channel, dense = self.channel, self.dense
        begin, end = self._bounds(block, step - 1)
        if begin == end:
            return []
        out = dense.view(begin, end) if dense.exact else self._buffer(block, step - 1, begin, end)
        if step == 0 and not dense.exact:
            dense.pack(begin, end, out)
        return [channel.isend(out, (channel.rank + 1) % channel.size)]

    def take(self, block: int, step: int) -> None:
        """Uses what a step has brought, and prepares the next step's message in the same buffer."""
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
        """The elements that arrive in a step; those that leave are what arrived in the step before."""
        n, blocks, size = self.dense.work.numel(), self.blocks, self.channel.size
        first, past = n * block // blocks, n * (block + 1) // blocks
        segment = (self.channel.rank - step - 1) % size
        return first + (past - first) * segment // size, first + (past - first) * (segment + 1) // size

    def _buffer(self, block: int, step: int, begin: int, end: int) -> torch.Tensor:
        slot = block + 2 * step
        start = (slot % self._turns * self._most + step % self._most) * self._width
        return self._slab[start : start + self.dense.nbytes(begin, end)]
