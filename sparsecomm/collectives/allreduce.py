"""The dense allreduce, by the algorithm with the lowest modelled time for this size, number of ranks and link.

    doubling   recursive doubling, for short vectors: fewest rounds
    halving    recursive halving and doubling: a ring's bytes in log2 P rounds. The surplus over a power of two is
               folded away first. In shared memory it serves all longer vectors if P is a power of two
    ring       for long vectors: blocks follow each other, so that step s of block b happens in slot b + 2 s. The data
               of a slot is added in the next slot and sent on in the one after, and the next slot is posted on both
               sides before this one is complete

allreduce_costs.py holds the rule and its measured constants, one set for ranks that share memory and one for a
network. The first sum of more than 8 KiB between the hosts of a group of ranks measures their link (link.py), and all
later ones of the group use its figures.

Values travel in 32 or 16 bits; sums are always float32. Segments in fp16 carry a power-of-two scale, so that neither
end of the range is lost. A partial sum is rounded when it is sent on, and the finished sum once, by its owner, who
hands the same bytes to all ranks. The rank that rounds knows both numbers, hence the error, and `DenseSum.error` keeps
it: nothing is lost. Vectors that are short enough for recursive doubling travel as float32 in any case, since their
bytes do not count.

A dense sum has no checksum of its own. A message of another length is an error; a flipped bit inside one is left to
the transport (TCP and InfiniBand check theirs).
"""

from __future__ import annotations

from collections.abc import Hashable

from sparsecomm.collectives.allreduce_costs import UNMEASURED, DenseAlgorithm, choose_dense, ring_segment
from sparsecomm.collectives.doubling import doubling_allreduce
from sparsecomm.collectives.halving import halving_allreduce
from sparsecomm.collectives.link import link_between_hosts
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
    numel = dense.work.numel()
    link = (yield from link_between_hosts(channel)) if numel > UNMEASURED else None
    algorithm = choose_dense(numel, channel.size, dense.wire, one_host=channel.one_host, link=link)
    if algorithm == DenseAlgorithm.RING:
        yield from ring_allreduce(channel, dense, arena, key, segment=ring_segment(one_host=channel.one_host))
        return
    run = doubling_allreduce if algorithm == DenseAlgorithm.DOUBLING else halving_allreduce
    yield from run(channel, dense, arena, key)
