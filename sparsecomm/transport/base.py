"""The transport protocol: non-blocking sends and receives of bytes, and the channel of a collective.

A collective is a generator over a `Channel`. It posts requests, yields those it must wait for, and is resumed when all
of them are complete. The engine drives it over a real transport; `SimulatedWorld` drives the same generator for many
ranks in one process.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from typing_extensions import override

from sparsecomm.errors import TransportError
from sparsecomm.transport.notes import Note

__all__ = [
    "AgreedError",
    "Channel",
    "CollectiveSteps",
    "GroupLink",
    "GroupTransport",
    "Link",
    "Request",
    "SoloTransport",
    "Traffic",
    "Transport",
    "is_over",
]

T_co = TypeVar("T_co", covariant=True)


class Request(Protocol):
    """A send or receive in progress. Its buffer must not be touched until `test` has returned True.

    Attributes:
        peer: World rank that it waits for; None if it waits for no single rank.
    """

    __slots__ = ()

    peer: int | None

    def test(self) -> bool:
        """Makes progress and returns whether the request is complete.

        If the transport is `blocking`, this call may wait for up to the transport's timeout.

        Raises:
            TransportError: if the request failed, or a message of another length arrived.
        """

    def describe(self) -> str:
        """Returns a description for error messages, e.g. "receive of 80 bytes from rank 2"."""

    def cancel(self) -> None:
        """Abandons the request after a failure. Its buffer may still be written to."""


def is_over(request: Request) -> bool:
    """Returns whether a request is complete, also if it has failed or was cancelled."""
    try:
        return request.test()
    except Exception:
        return True


class Transport(Protocol):
    """Point-to-point messages between the ranks of one world. Messages of one (source, tag) keep their order.

    Attributes:
        rank: This rank.
        size: World size.
        name: Name of the transport, e.g. "mpi".
        blocking: Whether `Request.test` waits, because the library underneath cannot be polled.
        max_tag: Largest tag of a message.
        one_host: Whether all ranks are known to share memory. The same on all ranks.
        nodes: Node of every rank: any number that the ranks of one node share. The same on all ranks.
    """

    rank: int
    size: int
    name: str
    blocking: bool
    max_tag: int
    one_host: bool
    nodes: tuple[int, ...]

    def isend(self, data: torch.Tensor, dest: int, tag: int) -> Request:
        """Starts to send a contiguous uint8 tensor to a rank."""

    def irecv(self, buffer: torch.Tensor, source: int, tag: int) -> Request:
        """Starts to receive exactly `buffer.numel()` bytes from a rank into a contiguous uint8 tensor."""

    def irecv_any(self, buffer: torch.Tensor, tag: int) -> Request:
        """Starts to receive exactly `buffer.numel()` bytes from whichever rank sends first.

        The request's `peer` is None until it is complete. Then it is the world rank of the sender.
        """
        raise TransportError(f"the {self.name} transport cannot receive from any rank")

    def world_rank(self, rank: int) -> int:
        """Returns the world rank of a rank of this transport."""

    def tell(self, note: Note) -> None:
        """Tells the ranks that may wait for this one. Waits at most a second until the note has left."""
        return

    def notes(self) -> Iterable[Note]:
        """Returns notes of other ranks, at least those that have arrived since the last call."""
        return ()

    def depart(self, note: Note) -> None:
        """Waits until all ranks leave, and tells the others if they do not leave at once.

        Called after the engine has ended, by a rank that ends without an error. A transport without a common end
        returns at once.
        """
        return

    def close(self) -> None:
        """Releases the resources of the transport. The engine's thread calls this last."""

    def abort(self, code: int) -> None:
        """Ends the whole job at once, on all ranks, with exit code `code`."""


class AgreedError(Exception):
    """A collective failed on every rank and left no message in flight. Raised by the collective itself.

    Attributes:
        cause: Error to report to the user on this rank.
    """

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


CollectiveSteps = Generator[Sequence[Request], None, T_co]
"""A collective in progress. It yields sequences of requests, all of which it waits for, and returns its result."""


@dataclass(slots=True)
class Traffic:
    """Messages and bytes that one rank sent and received."""

    messages_sent: int = 0
    bytes_sent: int = 0
    messages_received: int = 0
    bytes_received: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """Costs of messages between ranks.

    Attributes:
        alpha: Seconds that a round of messages takes beyond its bytes.
        beta: Seconds per byte that every rank sends while it receives one.
    """

    alpha: float
    beta: float


@dataclass(slots=True)
class GroupLink:
    """The link between the hosts of a group of ranks, as far as it is known. One for each group, on every rank.

    Attributes:
        known: The measured link, the same on all ranks of the group; None before it is measured.
        in_flight: Channels of the group's collectives in flight, in the order in which they started.
    """

    known: Link | None = None
    in_flight: dict[Channel, None] = field(default_factory=dict)

    def settled_for(self, channel: Channel) -> bool:
        """Returns whether a collective in flight may go on: the link is known, or no earlier one may measure it."""
        return self.known is not None or next(iter(self.in_flight), None) is channel


class Channel:
    """A collective's view of a transport, with a tag and counters that no other collective uses.

    Args:
        transport: Transport of the ranks that take part.
        tag: Tag of the messages.
        link: Link of the group that the engine runs the collective in; None if that group has one host, and for
            channels that no engine opened.

    Attributes:
        rank: This rank.
        size: Number of ranks.
        one_host: Whether all ranks are known to share memory. The same on all ranks.
        nodes: Node of every rank. The same on all ranks.
        blocking: Whether `Request.test` waits.
        link: Link of the group, or None.
        traffic: Messages and bytes that this collective has sent and received so far.
        pending: All requests that this collective has posted.
    """

    __slots__ = ("_tag", "_transport", "blocking", "link", "nodes", "one_host", "pending", "rank", "size", "traffic")

    def __init__(self, transport: Transport, tag: int, link: GroupLink | None = None) -> None:
        self._transport = transport
        self._tag = tag
        self.rank = transport.rank
        self.size = transport.size
        self.one_host = transport.one_host
        self.nodes = transport.nodes
        self.blocking = transport.blocking
        self.link = link
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

    def irecv_any(self, buffer: torch.Tensor) -> Request:
        """Starts to receive exactly `buffer.numel()` bytes from whichever rank sends first (`Transport.irecv_any`)."""
        self.traffic.messages_received += 1
        self.traffic.bytes_received += buffer.numel()
        request = self._transport.irecv_any(buffer, self._tag)
        self.pending.append(request)
        return request

    def world_rank(self, rank: int) -> int:
        """Returns the world rank of a rank of this channel."""
        return self._transport.world_rank(rank)

    def among(self, ranks: Sequence[int]) -> Channel:
        """Returns a channel of some of the ranks, numbered from 0 in the given order. This rank must be one of them.

        Both channels share their counters and their tag, so messages of both keep their order between two ranks. The
        new one has no link, because the link of the group is not that of some of its ranks.
        """
        part = Channel(GroupTransport(self._transport, ranks), self._tag)
        part.traffic, part.pending = self.traffic, self.pending
        return part

    def uncounted(self) -> Channel:
        """Returns a channel of the same ranks, with the same tag, whose messages `traffic` does not count."""
        aside = Channel(self._transport, self._tag)
        aside.pending = self.pending
        return aside


class SoloTransport(Transport):
    """The transport of a world of one, in which every message is an error."""

    rank = 0
    size = 1
    name = "solo"
    blocking = False
    max_tag = 2**31 - 1
    one_host = True
    nodes: tuple[int, ...] = (0,)

    @override
    def isend(self, data: torch.Tensor, dest: int, tag: int) -> Request:
        """Always raises, because no collective sends to its own rank."""
        raise TransportError(f"a world of one has no rank {dest} to send to")

    @override
    def irecv(self, buffer: torch.Tensor, source: int, tag: int) -> Request:
        """Always raises, because no collective receives from its own rank."""
        raise TransportError(f"a world of one has no rank {source} to receive from")

    @override
    def world_rank(self, rank: int) -> int:
        return rank

    @override
    def close(self) -> None:
        """Does nothing, because a world of one holds no resources."""

    @override
    def abort(self, code: int) -> None:
        """Does nothing, because the process ends by itself."""


class GroupTransport(Transport):
    """Some ranks of a world, numbered from 0. Translates ranks and shares everything else with the world's transport.

    Args:
        base: The world's transport.
        ranks: World ranks of the members, in the group's order. This rank must be one of them.

    Raises:
        TransportError: if this rank is not a member, a rank occurs twice, or a rank is not in the world.
    """

    def __init__(self, base: Transport, ranks: Sequence[int]) -> None:
        if base.rank not in ranks or len(set(ranks)) != len(ranks) or not all(0 <= r < base.size for r in ranks):
            raise TransportError(f"rank {base.rank} of {base.size} cannot join a group of ranks {list(ranks)}")
        self._base = base
        self._ranks = tuple(ranks)
        self.rank = self._ranks.index(base.rank)
        self.size = len(self._ranks)
        self.name = base.name
        self.blocking = base.blocking
        self.max_tag = base.max_tag
        self.nodes = tuple(base.nodes[r] for r in ranks)
        self.one_host = base.one_host

    @override
    def isend(self, data: torch.Tensor, dest: int, tag: int) -> Request:
        return self._base.isend(data, self._ranks[dest], tag)

    @override
    def irecv(self, buffer: torch.Tensor, source: int, tag: int) -> Request:
        return self._base.irecv(buffer, self._ranks[source], tag)

    @override
    def irecv_any(self, buffer: torch.Tensor, tag: int) -> Request:
        return self._base.irecv_any(buffer, tag)

    @override
    def world_rank(self, rank: int) -> int:
        return self._base.world_rank(self._ranks[rank])

    @override
    def close(self) -> None:
        """Does nothing, because the world's transport owns the resources."""

    @override
    def abort(self, code: int) -> None:
        """Ends the whole job, not only the group."""
        self._base.abort(code)
