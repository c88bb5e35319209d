"""Dense allreduce by recursive halving and doubling (Rabenseifner): the bytes of a ring in logarithmically many rounds.

Cost: 2 log2 P alpha and 2 n (P - 1) / P words sent by every rank. Where P is not a power of two, two more rounds and up
to 2 n more words.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from sparsecomm.collectives.fold import Core
from sparsecomm.collectives.partial_sums import DenseSum
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["halving_allreduce"]


def halving_allreduce(channel: Channel, dense: DenseSum, arena: Arena, key: Hashable) -> CollectiveSteps[None]:
    """Sums a vector over all ranks, in place, with results that are bitwise equal on all ranks. Collective.

    1. Surplus ranks give their vectors to their partners (see `fold`).
    2. log2 P times, a rank exchanges halves of its remaining part with the rank at half the previous distance and adds.
    3. The owner of each part scales it. The same exchanges in reverse order pass all parts on unchanged.
    4. Surplus ranks get the result.

    In 16 bits a partial sum is rounded once per round, and the finished sum once by its owner. Each rank keeps its
    rounding errors (see `DenseSum`).

    Args:
        channel: Ranks that take part.
        dense: Vector to sum. Mutated: `work` becomes the sum over ranks, times `scale`; `error` is overwritten with the
            rounding errors of this rank.
        arena: Arena that provides a receive buffer of n elements; in 16 bits, buffers of up to 1.5 n elements.
        key: Key of the buffers.
    """
    if channel.size == 1 or not dense.work.numel():
        dense.finish_exactly()
        return
    core = Core.of(channel.rank, channel.size)
    parts = _Parts(dense, core.size, arena, key)
    n = dense.work.numel()
    if core.giver:
        assert core.partner is not None
        yield [channel.isend(parts.outgoing(0, n), core.partner)]
        yield [channel.irecv(parts.finished(0, core.size), core.partner)]
        parts.read_all(but=None)
        return
    if core.partner is not None:
        incoming = parts.incoming(0, n)
        yield [channel.irecv(incoming, core.partner)]
        dense.add(0, n, incoming)
    yield from _exchange_halves(channel, core, parts)
    if core.partner is not None:
        yield [channel.isend(parts.finished(0, core.size), core.partner)]


def _exchange_halves(channel: Channel, core: Core, parts: _Parts) -> CollectiveSteps[None]:
    """Runs steps 2 and 3 among the ranks of the core. A part has the number of the rank that owns it."""
    dense = parts.dense
    first, past = 0, core.size
    distance = core.size // 2
    while distance:
        middle, peer = first + distance, core.rank_of(core.index ^ distance)
        upper = bool(core.index & distance)
        give = parts.span(first, middle) if upper else parts.span(middle, past)
        first, past = (middle, past) if upper else (first, middle)
        keep = parts.span(first, past)
        incoming, requests = parts.incoming(*keep), []
        if keep[1] > keep[0]:
            requests.append(channel.irecv(incoming, peer))
        if give[1] > give[0]:
            requests.append(channel.isend(parts.outgoing(*give), peer))
        yield requests
        dense.add(*keep, incoming)
        distance //= 2
    dense.finish(*parts.span(first, past), None if dense.exact else parts.finished(first, past))
    distance = 1
    while distance < core.size:
        peer = core.rank_of(core.index ^ distance)
        theirs = first ^ distance  # both spans are aligned to their length, which is a power of two
        incoming, outgoing, requests = parts.finished(theirs, theirs + distance), parts.finished(first, past), []
        if incoming.numel():
            requests.append(channel.irecv(incoming, peer))
        if outgoing.numel():
            requests.append(channel.isend(outgoing, peer))
        yield requests
        first, past = min(first, theirs), min(first, theirs) + 2 * distance
        distance *= 2
    parts.read_all(but=core.index)


class _Parts:
    """The vector, cut into one part for each rank of the core, and the bytes of the parts on the wire.

    In float32 finished parts are sent from the vector and received into it. In 16 bits they are kept as received,
    passed on unchanged, and read at the end.
    """

    def __init__(self, dense: DenseSum, count: int, arena: Arena, key: Hashable) -> None:
        n = dense.work.numel()
        self.dense = dense
        self._bounds = [n * i // count for i in range(count + 1)]
        whole = dense.nbytes(0, n)
        self._spare = arena.get((key, "halving"), whole, torch.uint8)
        if dense.exact:
            self._offsets = [4 * b for b in self._bounds]
            self._finished = dense.view(0, n)
            return
        self._offsets = [0]
        for begin, end in zip(self._bounds, self._bounds[1:], strict=False):
            self._offsets.append(self._offsets[-1] + dense.nbytes(begin, end))
        self._packed = arena.get((key, "halving", "sent"), whole, torch.uint8)
        self._finished = arena.get((key, "halving", "finished"), self._offsets[-1], torch.uint8)

    def span(self, first: int, past: int) -> tuple[int, int]:
        """Returns the bounds of the elements of some parts."""
        return self._bounds[first], self._bounds[past]

    def incoming(self, begin: int, end: int) -> torch.Tensor:
        """Returns the receive buffer for a partial sum of these elements."""
        return self._spare[: self.dense.nbytes(begin, end)]

    def outgoing(self, begin: int, end: int) -> torch.Tensor:
        """Returns the bytes of a partial sum of these elements."""
        if self.dense.exact:
            return self.dense.view(begin, end)
        out = self._packed[: self.dense.nbytes(begin, end)]
        self.dense.pack(begin, end, out)
        return out

    def finished(self, first: int, past: int) -> torch.Tensor:
        """Returns the bytes of some finished parts, which are also the buffer for receiving them."""
        return self._finished[self._offsets[first] : self._offsets[past]]

    def read_all(self, but: int | None) -> None:
        """Reads all finished parts that are packed, except part `but`, which this rank owns."""
        if self.dense.exact:
            return
        for i in range(len(self._bounds) - 1):
            if i != but:
                self.dense.read(*self.span(i, i + 1), self.finished(i, i + 1))
