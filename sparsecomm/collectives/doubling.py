"""Dense allreduce by recursive doubling. It takes the fewest rounds and suits short vectors, whose bytes cost little.

Cost: ceil(log2 P) alpha and n log2 P words sent by every rank. Two more rounds where P is not a power of two.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from sparsecomm.collectives.fold import Core
from sparsecomm.collectives.partial_sums import DenseSum
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["doubling_allreduce"]


def doubling_allreduce(channel: Channel, dense: DenseSum, arena: Arena, key: Hashable) -> CollectiveSteps[None]:
    """Sums a vector over all ranks, in place, with results that are bitwise equal on all ranks. Collective.

    In round j, ranks whose numbers differ in bit j exchange their sums and add them. Both add the same two numbers, and
    a + b = b + a in floating point too (except for the choice of the NaN that the sum of two NaNs gives).

    Values travel as float32 whatever the wire codec, because the algorithm is for vectors whose bytes cost little. So
    nothing is rounded.

    Args:
        channel: Ranks that take part.
        dense: Vector to sum. Mutated: `work` becomes the sum over ranks, times `scale`; `error` becomes zero.
        arena: Arena that provides a receive buffer of n elements.
        key: Key of the buffer.
    """
    work, error = dense.work, dense.error
    core = Core.of(channel.rank, channel.size)
    n = work.numel()
    if n and channel.size > 1:
        octets = work.view(torch.uint8)
        spare = arena.get((key, "doubling"), 4 * n, torch.uint8)
        if core.giver:
            assert core.partner is not None
            yield [channel.isend(octets, core.partner)]
            yield [channel.irecv(octets, core.partner)]
            if error is not None:
                error.zero_()
            return
        if core.partner is not None:
            yield [channel.irecv(spare, core.partner)]
            work.add_(spare.view(torch.float32))
        distance = 1
        while distance < core.size:
            peer = core.rank_of(core.index ^ distance)
            yield [channel.irecv(spare, peer), channel.isend(octets, peer)]
            work.add_(spare.view(torch.float32))
            distance *= 2
    dense.finish_exactly()
    if n and core.partner is not None:
        yield [channel.isend(octets, core.partner)]
