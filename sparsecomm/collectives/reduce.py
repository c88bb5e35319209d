"""Reduce to the first of some ranks, which adds the dense vectors in rank order.

Cost: n words sent by every other rank, all received and added by the first rank, with 8 segments in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

import torch

from sparsecomm import kernels
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps, Request

__all__ = ["reduce"]

_SEGMENT = 1 << 18  # elements; a received segment is still in the cache when it is added
_WINDOW = 8  # segments in flight


def reduce(
    channel: Channel, mine: torch.Tensor, ranks: Sequence[int], arena: Arena, key: Hashable
) -> CollectiveSteps[None]:
    """Adds the vectors of some ranks to the vector of the first of them. Collective among these ranks.

    1. Every rank but the first sends its vector in segments.
    2. The first rank receives segment by segment, from the others in rank order, and adds. It posts receives up to 8
       segments ahead.

    Args:
        channel: Channel that includes these ranks.
        mine: float32, shape (n,), n the same on all ranks. Mutated on the first rank, where it becomes the sum.
        ranks: Ranks that take part, ascending. This rank must be one of them.
        arena: Arena that provides the receive buffers.
        key: Key of the buffers.
    """
    octets = mine.view(torch.uint8)
    bounds = [(b, min(b + _SEGMENT, mine.numel())) for b in range(0, mine.numel(), _SEGMENT)]
    first, others = ranks[0], ranks[1:]
    if channel.rank != first:
        if bounds:
            yield [channel.isend(octets[4 * b : 4 * e], first) for b, e in bounds]
        return
    coming: deque[tuple[int, int, torch.Tensor, Request]] = deque()
    room = arena.get((key, "node"), _WINDOW * 4 * min(_SEGMENT, mine.numel()), torch.uint8)
    turn = 0
    for b, e in bounds:
        for source in others:
            if len(coming) == _WINDOW:
                yield from _add_oldest(mine, coming)
            start = (turn % _WINDOW) * 4 * min(_SEGMENT, mine.numel())
            buffer = room[start : start + 4 * (e - b)]
            coming.append((b, e, buffer, channel.irecv(buffer, source)))
            turn += 1
    while coming:
        yield from _add_oldest(mine, coming)


def _add_oldest(mine: torch.Tensor, coming: deque[tuple[int, int, torch.Tensor, Request]]) -> CollectiveSteps[None]:
    b, e, buffer, request = coming.popleft()
    yield [request]
    kernels.add_dense(mine[b:e], buffer)
