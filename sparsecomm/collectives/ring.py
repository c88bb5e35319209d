"""Dense allreduce: reduce-scatter and allgather around a ring (Patarasuk and Yuan 2009).

Cost: 2 (P - 1) alpha and 2 n (P - 1) / P words sent by every rank.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from sparsecomm.arena import Arena
from sparsecomm.kernels import dispatch as kernels
from sparsecomm.transport import Channel, CollectiveSteps, Request

__all__ = ["ring_allreduce"]


def ring_allreduce(channel: Channel, work: torch.Tensor, arena: Arena, key: Hashable) -> CollectiveSteps[None]:
    """Sums a vector over all ranks, in place, with results that are bitwise equal on all ranks. Collective.

    1. Cut the vector into P chunks.
    2. P - 1 times: send the chunk accumulated last to rank r + 1, receive one from rank r - 1 and add it. Chunk c
       is thereby summed in the order of ranks c, c + 1, ..., by one owner at the end.
    3. P - 1 times: pass the finished chunks on around the ring.

    Args:
        channel: the ranks.
        work: float32, shape (n,), contiguous. Mutated: becomes the sum over ranks.
        arena: gives a receive buffer of n / P elements.
        key: names it.
    """
    size, rank, n = channel.size, channel.rank, work.numel()
    bounds = [n * c // size for c in range(size + 1)]
    spare = arena.get((key, "ring"), -(-n // size), torch.float32)

    def chunk(c: int) -> torch.Tensor:
        return work[bounds[c % size] : bounds[c % size + 1]]

    for step in range(size - 1):
        outgoing, into = chunk(rank - step), chunk(rank - step - 1)
        incoming = spare[: into.numel()]
        yield _pass_on(channel, outgoing, incoming)
        kernels.add_dense(into, incoming)
    for step in range(size - 1):
        yield _pass_on(channel, chunk(rank + 1 - step), chunk(rank - step))


def _pass_on(channel: Channel, outgoing: torch.Tensor, incoming: torch.Tensor) -> list[Request]:
    requests = []
    if incoming.numel():
        requests.append(channel.irecv(incoming.view(torch.uint8), (channel.rank - 1) % channel.size))
    if outgoing.numel():
        requests.append(channel.isend(outgoing.view(torch.uint8), (channel.rank + 1) % channel.size))
    return requests
