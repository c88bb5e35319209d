"""Allgather of blocks of equal length, and of blocks whose lengths all ranks know.

Cost: ceil(log2 P) alpha where ranks pass blocks on; (P - 1) alpha where each owner sends its block to every rank.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate

import torch

from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["allgather", "allgatherv", "allgatherv_direct"]


def allgather(channel: Channel, mine: torch.Tensor, arena: Arena, key: Hashable) -> CollectiveSteps[list[torch.Tensor]]:
    """Gathers one block from every rank, in ceil(log2 P) rounds for any P (Bruck et al. 1997). Collective.

    1. Slot 0 of a work buffer holds this rank's block.
    2. In round j, with 2^j slots filled, send the filled slots to rank r - 2^j and receive the same number of slots
       (fewer in the last round) from rank r + 2^j.
    3. Slot i then holds the block of rank r + i.

    Args:
        channel: Ranks that take part.
        mine: uint8, the same length on all ranks.
        arena: Arena that provides the work buffer.
        key: Key of the work buffer.

    Returns:
        The blocks by rank, as views into the arena that are valid until the next use of the key.
    """
    return (yield from allgatherv(channel, mine, [mine.numel()] * channel.size, arena, key))


def allgatherv(
    channel: Channel, mine: torch.Tensor, lengths: Sequence[int], arena: Arena, key: Hashable, *, reserve: int = 0
) -> CollectiveSteps[list[torch.Tensor]]:
    """Gathers a block of known length from every rank in ceil(log2 P) rounds. Collective.

    The general form of `allgather`. Ranks pass on the blocks of others, so that a rank sends about as many bytes
    as it receives. The owner of a block that is much longer than the others sends log2 P copies of it.

    Args:
        channel: Ranks that take part.
        mine: uint8, shape (lengths[rank],).
        lengths: Bytes of each rank's block, the same list on all ranks.
        arena: Arena that provides the work buffer.
        key: Key of the work buffer.
        reserve: Bytes to which all blocks together may grow in later steps.

    Returns:
        The blocks by rank, as views into the arena that are valid until the next use of the key.
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


def allgatherv_direct(
    channel: Channel, mine: torch.Tensor, lengths: Sequence[int], arena: Arena, key: Hashable, *, reserve: int = 0
) -> CollectiveSteps[list[torch.Tensor]]:
    """Gathers a block of known length from every rank, sent by its owner to each rank. Collective.

    Rank r sends to rank r + 1 first, then to r + 2, and so on, so that not all ranks send to the same one at once.
    Empty blocks are not sent.

    Args:
        channel: Ranks that take part.
        mine: uint8, shape (lengths[rank],).
        lengths: Bytes of each rank's block, the same list on all ranks.
        arena: Arena that provides the receive buffer.
        key: Key of the receive buffer.
        reserve: Bytes to which a block may grow in later steps.

    Returns:
        The blocks by rank: `mine` for this rank, views into the arena for the others, valid until the next use of the
        key.
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
