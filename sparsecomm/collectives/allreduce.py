"""The dense allreduce, by the algorithm with the lowest modelled time for this size, number of ranks and link."""

from __future__ import annotations

from collections.abc import Hashable

from sparsecomm.collectives.allreduce_costs import DenseAlgorithm, choose_dense, ring_segment
from sparsecomm.collectives.doubling import doubling_allreduce
from sparsecomm.collectives.halving import halving_allreduce
from sparsecomm.collectives.partial_sums import DenseSum
from sparsecomm.collectives.ring import ring_allreduce
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["dense_allreduce"]


def dense_allreduce(channel: Channel, dense: DenseSum, arena: Arena, key: Hashable) -> CollectiveSteps[None]:
    """Sums a vector over all ranks, in place, with results that are bitwise equal on all ranks. Collective.

    Args:
        channel: Ranks that take part.
        dense: Vector to sum. Its length, wire codec and scale are the same on all ranks. Mutated: `work` becomes the
            sum over ranks, times `scale`; `error` is overwritten with the rounding errors of this rank.
        arena: Arena that provides the buffers.
        key: Key of the buffers.
    """
    algorithm = choose_dense(dense.work.numel(), channel.size, dense.wire, one_host=channel.one_host)
    if algorithm == DenseAlgorithm.RING:
        return ring_allreduce(channel, dense, arena, key, segment=ring_segment(one_host=channel.one_host))
    run = doubling_allreduce if algorithm == DenseAlgorithm.DOUBLING else halving_allreduce
    return run(channel, dense, arena, key)
