"""The transport protocol: non-blocking sends and receives of bytes, and the channel a collective sees.

A collective is a generator over a `Channel`: it posts requests, yields those it must wait for, and is resumed when
all of them are complete. The engine drives it over MPI; `SimulatedWorld` drives the same generator for many ranks in
one process.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from sparsecomm.errors import TransportError

__all__ = [
    "AgreedError",
    "Channel",
    "CollectiveSteps",
    "GroupTransport",
    "Request",
    "SoloTransport",
    "Traffic",
    "Transport",
]

T_co = TypeVar("T_co", covariant=True)


class Request(Protocol):
    """A send or receive in progress. Its buffer must not be touched until `test` has returned True."""

    def test(self) -> bool:
        """Returns whether it is complete, letting it progress.

        A transport whose `blocking` is True may wait here for up to its own timeout.

        Raises:
            TransportError: if it failed, or a message of another length arrived.
        """

    def describe(self) -> str:
        """Returns e.g. "receive of 80 bytes from rank 2", for error messages."""

    def cancel(self) -> None:
        """Gives the request up after a failure; its buffer may still be written to."""


class Transport(Protocol):
    """Point-to-point messages between the ranks of one world. Messages of one (source, tag) keep their order."""

    rank: int
    size: int
    name: str
    blocking: bool
    max_tag: int
    one_host: bool
    """Whether all ranks are known to share memory; the same on all ranks."""
    nodes: tuple[int, ...]
    """The node of every rank, as any number that ranks of one node share; the same on all ranks."""

    def isend(self, data: torch.Tensor, dest: int, tag: int) -> Request:
        """Starts to send a contiguous uint8 tensor."""

    def irecv(self, buffer: torch.Tensor, source: int, tag: int) -> Request:
        """Starts to receive exactly `buffer.numel()` bytes into a contiguous uint8 tensor."""

    def world_rank(self, rank: int) -> int:
        """Returns the number that a rank has in the whole world."""

    def close(self) -> None:
        """Releases what the transport holds. Called by the communication thread, last."""

    def abort(self, code: int) -> None:
        """Ends the whole job at once, on all ranks, with this exit code."""


class AgreedError(Exception):
    """Raised by a collective that failed on every rank, after it has left no message in flight.

    Attributes:
        cause: what the user is to see on this rank.
    """

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


CollectiveSteps = Generator[Sequence[Request], None, T_co]
"""A collective in progress: yields requests to wait for (all of them), returns its result."""


@dataclass(slots=True)
class Traffic:
    """Messages and bytes that one rank sent and received."""

    messages_sent: int = 0
    bytes_sent: int = 0
    messages_received: int = 0
    bytes_received: int = 0


class Channel:
    """One collective's view of a transport: its own tag, its own counters.

    Attributes:
        rank: this rank.
        size: number of ranks.
        one_host: whether all ranks are known to share memory; the same on all ranks.
        nodes: the node of every rank; the same on all ranks.
        blocking: whether requests wait when they are tested.
        traffic: what this collective sent and received so far.
    """

    __slots__ = ("_tag", "_transport", "blocking", "nodes", "one_host", "pending", "rank", "size", "traffic")

    def __init__(self, transport: Transport, tag: int) -> None:
        self._transport = transport
        self._tag = tag
        self.rank = transport.rank
        self.size = transport.size
        self.one_host = transport.one_host
        self.nodes = transport.nodes
        self.blocking = transport.blocking
        self.traffic = Traffic()
        self.pending: list[Request] = []

    def isend(self, data: torch.Tensor, dest: int) -> Request:
        """Starts to send a contiguous uint8 tensor to a rank."""
        self.traffic.messages_sent += 1
        self.traffic.bytes_sent += data.numel()
        request = self._transport.isend(data, dest, self._tag)
        self.pending.append(request)
        return request

    def irecv(self, buffer: torch.Tensor, source: int) -> Request:
        """Starts to receive exactly `buffer.numel()` bytes from a rank."""
        self.traffic.messages_received += 1
        self.traffic.bytes_received += buffer.numel()
        request = self._transport.irecv(buffer, source, self._tag)
        self.pending.append(request)
        return request

    def world_rank(self, rank: int) -> int:
        """Returns the number that a rank of this channel has in the whole world."""
        return self._transport.world_rank(rank)

    def among(self, ranks: Sequence[int]) -> Channel:
        """Returns a channel of some of the ranks, numbered from 0 in this order; this rank is one of them.

        It counts into the same traffic and has the same tag: between two ranks, messages of both channels keep their
        order.
        """
        part = Channel(GroupTransport(self._transport, ranks), self._tag)
        part.traffic, part.pending = self.traffic, self.pending
        return part


class SoloTransport:
    """A world of one: there is nobody to send to."""

    rank = 0
    size = 1
    name = "solo"
    blocking = False
    max_tag = 2**31 - 1
    one_host = True
    nodes: tuple[int, ...] = (0,)

    def isend(self, data: torch.Tensor, dest: int, tag: int) -> Request:
        """Always raises: no collective sends to itself."""
        raise TransportError(f"a world of one has no rank {dest} to send to")

    def irecv(self, buffer: torch.Tensor, source: int, tag: int) -> Request:
        """Always raises: no collective receives from itself."""
        raise TransportError(f"a world of one has no rank {source} to receive from")

    def world_rank(self, rank: int) -> int:
        """See `Transport.world_rank`."""
        return rank

    def close(self) -> None:
        """Nothing to release."""

    def abort(self, code: int) -> None:
        """Nothing to abort: the process ends by itself."""


class GroupTransport:
    """Some ranks of a world, numbered from 0: translates ranks, shares everything else.

    Args:
        base: the world's transport.
        ranks: the members' ranks in the world, in the group's order; this rank is one of them.

    Raises:
        TransportError: if this rank is not a member or a rank is not in the world.
    """

    def __init__(self, base: Transport, ranks: Sequence[int]) -> None:
        if base.rank not in ranks or len(set(ranks)) != len(ranks) or not all(0 <= r < base.size for r in ranks):
            raise TransportError(f"rank {base.rank} of {base.size} is to talk in a group of ranks {list(ranks)}")
        self._base = base
        self._ranks = tuple(ranks)
        self.rank = self._ranks.index(base.rank)
        self.size = len(self._ranks)
        self.name = base.name
        self.blocking = base.blocking
        self.max_tag = base.max_tag
        self.nodes = tuple(base.nodes[r] for r in ranks)
        self.one_host = base.one_host

    def isend(self, data: torch.Tensor, dest: int, tag: int) -> Request:
        """See `Transport.isend`."""
        return self._base.isend(data, self._ranks[dest], tag)

    def irecv(self, buffer: torch.Tensor, source: int, tag: int) -> Request:
        """See `Transport.irecv`."""
        return self._base.irecv(buffer, self._ranks[source], tag)

    def world_rank(self, rank: int) -> int:
        """See `Transport.world_rank`."""
        return self._base.world_rank(self._ranks[rank])

    def close(self) -> None:
        """Left to the world's transport."""

    def abort(self, code: int) -> None:
        """Ends the whole job, not only the group."""
        self._base.abort(code)
