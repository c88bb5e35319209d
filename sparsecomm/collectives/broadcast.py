"""Broadcast along a binomial tree, for any number of ranks and any root.

Cost: ceil(log2 P) alpha. The root sends the data ceil(log2 P) times and others less often, P - 1 times in total.
"""

from __future__ import annotations

import torch

from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["broadcast", "broadcast_bytes"]


def broadcast(channel: Channel, data: torch.Tensor, root: int) -> CollectiveSteps[None]:
    """Sends the root's data to all ranks. Collective.

    A rank's number is its distance from the root. It receives from the number that results when its lowest set bit is
    cleared. Then it sends to the numbers that result when one lower bit is set, the highest bit first, because those
    ranks pass the data on to the most others.

    Args:
        channel: Ranks that take part.
        data: uint8, shape (n,), n the same on all ranks and not 0. Mutated on all ranks but the root.
        root: Rank of the root.
    """
    size = channel.size
    number = (channel.rank - root) % size
    bit = 1 << (size - 1).bit_length()
    if number:
        bit = number & -number
        yield [channel.irecv(data, (root + number - bit) % size)]
    sends = []
    while bit > 1:
        bit //= 2
        if number + bit < size:
            sends.append(channel.isend(data, (root + number + bit) % size))
    if sends:
        yield sends


def broadcast_bytes(nbytes: int, size: int) -> int:
    """Returns the bytes that the root of a broadcast sends."""
    return nbytes * (size - 1).bit_length()
