"""Allgather of small blocks of one size, and of bodies whose sizes are known.

Cost: ceil(log2 P) alpha for blocks, sizes known or equal; (P - 1) alpha for bodies sent by their owner to each rank.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate

import torch

from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["allgather_blocks", "allgather_bodies", "allgather_fixed"]


def allgather_fixed(
    channel: Channel, mine: torch.Tensor, arena: Arena, key: Hashable
) -> CollectiveSteps[list[torch.Tensor]]:
    """Gathers one block from every rank, in ceil(log2 P) rounds for any P (Bruck et al. 1997). Collective.

    1. Slot 0 of a work buffer holds this rank's block.
    2. In round j, with 2^j slots filled, send the filled slots to rank r - 2^j and receive the same number
       (fewer in the last round) from rank r + 2^j.
    3. Slot i then holds the block of rank r + i.

    Args:
        channel: the ranks.
        mine: uint8, the same length on all ranks.
        arena: gives the work buffer.
        key: names the work buffer.

    Returns:
        The blocks by rank, views into the arena that hold until its next use of the key.
    """
    return (yield from allgather_blocks(channel, mine, [mine.numel()] * channel.size, arena, key))


def allgather_blocks(
    channel: Channel, mine: torch.Tensor, lengths: Sequence[int], arena: Arena, key: Hashable, *, reserve: int = 0
) -> CollectiveSteps[list[torch.Tensor]]:
    """Gathers a block of known length from every rank in ceil(log2 P) rounds. Collective.

    As `allgather_fixed`, of which it is the general form. Others' blocks are passed on, so that a rank sends about as
    much as it receives, but of a block much longer than the others its owner sends log2 P copies.

    Args:
        channel: the ranks.
        mine: uint8, shape (lengths[rank],).
        lengths: bytes of each rank's block, the same list on all ranks.
        arena: gives the work buffer.
        key: names the work buffer.
        reserve: bytes that all blocks together may grow to in later steps.

    Returns:
        The blocks by rank, views into the arena that hold until its next use of the key.
    """
    size, rank = channel.size, channel.rank
    starts = [0, *accumulate(lengths[(rank + i) % size] for i in range(size))]
    work = arena.get((key, "blocks"), starts[size], torch.uint8, reserve=reserve)
    work[: starts[1]] = mine
    filled = 1
    while filled < size:
        count = min(filled, size - filled)
        requests = []
        if starts[filled + count] > starts[filled]:
            requests.append(channel.irecv(work[starts[filled] : starts[filled + count]], (rank + filled) % size))
        if starts[count]:
            requests.append(channel.isend(work[: starts[count]], (rank - filled) % size))
        if requests:
            yield requests
        filled += count
    slots = [work[starts[i] : starts[i + 1]] for i in range(size)]
    return [slots[(r - rank) % size] for r in range(size)]


def allgather_bodies(
    channel: Channel, mine: torch.Tensor, lengths: Sequence[int], arena: Arena, key: Hashable, *, reserve: int = 0
) -> CollectiveSteps[list[torch.Tensor]]:
    """Gathers byte strings of known lengths from every rank. Collective.

    Every rank sends to rank r + 1 first, then r + 2, ..., so that no receiver is hit by all at once. Empty bodies
    are not sent.

    Args:
        channel: the ranks.
        mine: uint8, shape (lengths[rank],).
        lengths: bytes of each rank's body, the same list on all ranks.
        arena: gives the receive buffer.
        key: names the receive buffer.
        reserve: bytes that a body may grow to in later steps.

    Returns:
        The bodies by rank (this rank's is `mine`), views into the arena.
    """
    size, rank = channel.size, channel.rank
    buffer = arena.get((key, "bodies"), sum(lengths) - lengths[rank], torch.uint8, reserve=reserve * (size - 1))
    bodies, offset = [], 0
    for r, length in enumerate(lengths):
        if r == rank:
            bodies.append(mine)
            continue
        bodies.append(buffer[offset : offset + length])
        offset += length
    requests = []
    for distance in range(1, size):
        source = (rank - distance) % size
        if lengths[source]:
            requests.append(channel.irecv(bodies[source], source))
    for distance in range(1, size):
        if lengths[rank]:
            requests.append(channel.isend(mine, (rank + distance) % size))
    if requests:
        yield requests
    return bodies
