"""Broadcast along a binomial tree, for any number of ranks and any root.

Cost: ceil(log2 P) alpha; the root sends the data ceil(log2 P) times, others less, P - 1 times in all.
"""

from __future__ import annotations

import torch

from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["broadcast", "broadcast_bytes"]


def broadcast(channel: Channel, data: torch.Tensor, root: int) -> CollectiveSteps[None]:
    """Sends the root's data to all ranks. Collective.

    Ranks are counted from the root. Each receives from the one whose number lacks its own lowest bit, and then sends to
    those that it differs from in one lower bit, the ones with the most to hand on first.

    Args:
        channel: the ranks.
        data: uint8, shape (n,), n the same on all ranks and not 0. Mutated on all but the root.
        root: its rank.
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
