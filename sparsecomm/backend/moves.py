"""Collectives that move bytes and change none: gather, scatter, allgather, all-to-all and the barrier.

All blocks go directly from their owner to those that need them, all at once. Empty blocks are not sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsecomm.collectives.broadcast import broadcast
from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["barrier", "exchange", "gather_all", "gather_to", "scatter_from", "spread"]


def exchange(channel: Channel, give: Sequence[torch.Tensor], take: Sequence[torch.Tensor]) -> CollectiveSteps[None]:
    """Sends a block to every rank and receives one from every rank. Collective.

    Args:
        channel: Ranks that take part.
        give: uint8, the block for each rank. This rank's own is not used.
        take: uint8, the block of each rank. Overwritten, but for this rank's own.
    """
    size, rank = channel.size, channel.rank
    requests = []
    for distance in range(1, size):
        source = (rank - distance) % size
        if take[source].numel():
            requests.append(channel.irecv(take[source], source))
    for distance in range(1, size):
        dest = (rank + distance) % size
        if give[dest].numel():
            requests.append(channel.isend(give[dest], dest))
    if requests:
        yield requests


def gather_all(channel: Channel, mine: torch.Tensor, blocks: Sequence[torch.Tensor]) -> CollectiveSteps[None]:
    """Gathers a block of every rank on every rank. Collective.

    Args:
        channel: Ranks that take part.
        mine: uint8, this rank's block.
        blocks: uint8, the block of each rank; the lengths are the same on all ranks. Overwritten, but for this rank's.
    """
    yield from exchange(channel, [mine] * channel.size, blocks)


def gather_to(channel: Channel, mine: torch.Tensor, blocks: Sequence[torch.Tensor], root: int) -> CollectiveSteps[None]:
    """Gathers a block of every rank on the root. Collective.

    Args:
        channel: Ranks that take part.
        mine: uint8, this rank's block.
        blocks: uint8, the block of each rank. Overwritten on the root, but for its own; not used elsewhere.
        root: Rank of the root.
    """
    others = [r for r in range(channel.size) if r != root]
    if channel.rank == root:
        requests = [channel.irecv(blocks[r], r) for r in others if blocks[r].numel()]
    else:
        requests = [channel.isend(mine, root)] if mine.numel() else []
    if requests:
        yield requests


def scatter_from(
    channel: Channel, mine: torch.Tensor, blocks: Sequence[torch.Tensor], root: int
) -> CollectiveSteps[None]:
    """Sends every rank its block from the root. Collective.

    Args:
        channel: Ranks that take part.
        mine: uint8, this rank's block. Overwritten, but on the root.
        blocks: uint8, the block for each rank on the root; not used elsewhere.
        root: Rank of the root.
    """
    others = [r for r in range(channel.size) if r != root]
    if channel.rank == root:
        requests = [channel.isend(blocks[r], r) for r in others if blocks[r].numel()]
    else:
        requests = [channel.irecv(mine, root)] if mine.numel() else []
    if requests:
        yield requests


def spread(channel: Channel, data: torch.Tensor, root: int) -> CollectiveSteps[None]:
    """Sends the root's data, which may be empty, to all ranks. Collective.

    Args:
        channel: Ranks that take part.
        data: uint8, shape (n,), n the same on all ranks. Mutated on all ranks but the root.
        root: Rank of the root.
    """
    if data.numel() and channel.size > 1:
        yield from broadcast(channel, data, root)


def barrier(channel: Channel) -> CollectiveSteps[None]:
    """Waits until all ranks have come here, in ceil(log2 P) rounds (Hensgen, Finkel and Manber 1988). Collective."""
    distance = 1
    token, heard = torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    while distance < channel.size:
        source, dest = (channel.rank - distance) % channel.size, (channel.rank + distance) % channel.size
        yield [channel.irecv(heard, source), channel.isend(token, dest)]
        distance *= 2
