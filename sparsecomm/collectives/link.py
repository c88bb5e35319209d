"""Measures the link between the hosts of a group of ranks, once, while no other dense sum of the group moves bytes.

The ranks of a group start the same collectives in the same order, but the collectives in flight reach their sums in
any order. So a collective that needs the link first waits until the link is known, or until every collective that
started before it has ended. The first one that finds itself the oldest in flight measures. That is the first in the
order of starts that needs the link, hence the same one on all ranks, and no message is needed to agree on it.

Only an engine's channels between hosts know a link. Ranks that share memory use constants, and so does
`SimulatedWorld.run`, where messages take no time and results must not depend on the clock. An engine that was given a
link takes that, and measures none.

Rounds are timed in batches, and all ranks start a batch together. So a message that waits in a rank's memory does not
make the next batch look fast. The duration of a batch is that of the slowest rank. For the seconds per round the median
of the batches counts, since work of other processes delays the rounds of a sum as well. For the seconds per byte the
fastest batch counts, since a delay says nothing about the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter

import torch
from typing_extensions import override

from sparsecomm.collectives.gather import allgather
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps, GroupLink, Link, Request

__all__ = ["agreed_maximum", "link_between_hosts", "measure_link", "rings"]

# Bytes of a message; at 100 Mbit/s those of the second length take 24 ms together, and longer ones are not sent.
_SMALL, _MEDIUM, _LARGE = 64, 1 << 15, 1 << 19
_SLOW = 1e-3  # seconds of a medium round above which its bytes already dominate it: about 250 Mbit/s
_KEY = "link"


def link_between_hosts(channel: Channel) -> CollectiveSteps[Link | None]:
    """Returns the link of the channel's group, the same on all ranks. Measures it if no collective has. Collective.

    The messages of a measurement do not count in `channel.traffic`. They take less than 0.1 s at 100 Mbit/s with one
    rank per host.

    Args:
        channel: Ranks that take part.

    Returns:
        The link; None if all ranks are on one host, and for a channel that no engine opened.
    """
    group = channel.link
    if group is None:
        return None
    if group.known is None:
        yield [_Turn(channel, group)]
    if group.known is None:
        around, _ = rings(channel.nodes)
        group.known = yield from measure_link(channel.uncounted(), around)
    return group.known


def measure_link(channel: Channel, ring: Sequence[int]) -> CollectiveSteps[Link]:
    """Measures messages while every rank of a ring sends to the next one. Collective.

    Args:
        channel: Ranks that take part. They may form several rings, which are measured at the same time.
        ring: Ranks of this rank's ring, in order. A rank that is alone sends nothing.

    Returns:
        The slowest figures of all rings, the same on all ranks; zeros if every rank is alone in its ring.
    """
    arena = Arena()
    small = yield from _batches(channel, ring, arena, _SMALL, batches=5, rounds=8)
    length = _MEDIUM
    seconds = min((yield from _batches(channel, ring, arena, length, batches=3, rounds=3)))
    if seconds < _SLOW:  # the same on all ranks
        length = _LARGE
        seconds = min((yield from _batches(channel, ring, arena, length, batches=5, rounds=2)))
    return Link(median(small), max(seconds - min(small), seconds / 8) / length)


def _batches(
    channel: Channel, ring: Sequence[int], arena: Arena, length: int, *, batches: int, rounds: int
) -> CollectiveSteps[list[float]]:
    """Returns the slowest rank's seconds of a round of messages of `length` bytes, for each batch of rounds."""
    place = ring.index(channel.rank)
    before, after = ring[place - 1], ring[(place + 1) % len(ring)]
    out = arena.get((_KEY, "out"), length, torch.uint8)
    into = arena.get((_KEY, "into"), length, torch.uint8)
    mine, slowest = torch.zeros(1, dtype=torch.float64), []
    yield from agreed_maximum(channel, mine, arena)  # ranks start together
    for _ in range(batches):
        if len(ring) > 1:
            start = perf_counter()
            for _ in range(rounds):
                yield [channel.irecv(into, before), channel.isend(out, after)]
            mine[0] = (perf_counter() - start) / rounds
        slowest += yield from agreed_maximum(channel, mine, arena)
    return slowest


def agreed_maximum(channel: Channel, mine: torch.Tensor, arena: Arena) -> CollectiveSteps[list[float]]:
    """Returns the elementwise maximum of the vectors of all ranks, the same on all ranks. Collective.

    Args:
        channel: Ranks that take part.
        mine: float64, the same length on all ranks.
        arena: Arena that provides the buffers.
    """
    blocks = [mine.view(torch.uint8)]
    if channel.size > 1:
        blocks = yield from allgather(channel, blocks[0], arena, (_KEY, "figures"))
    figures: list[float] = torch.stack([b.clone().view(torch.float64) for b in blocks]).amax(0).tolist()
    return figures


def rings(nodes: Sequence[int]) -> tuple[list[int], dict[int, list[int]]]:
    """Returns a ring of all ranks whose neighbours are on different nodes if possible, and the ranks of each node.

    In this ring all ranks of a node use its link at once, as in an exchange between all ranks.
    """
    inside: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        inside.setdefault(node, []).append(rank)
    place = {rank: (i, ranks[0]) for ranks in inside.values() for i, rank in enumerate(ranks)}
    return sorted(place, key=lambda rank: place[rank]), inside


class _Turn(Request):
    """Waits until the link of a group is known, or until this collective is the oldest in flight."""

    def __init__(self, channel: Channel, group: GroupLink) -> None:
        self.peer = None
        self._channel, self._group = channel, group

    @override
    def test(self) -> bool:
        return self._group.settled_for(self._channel)

    @override
    def describe(self) -> str:
        return "the link of the group, which an earlier collective may measure"

    @override
    def cancel(self) -> None:
        pass
