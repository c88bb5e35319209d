"""A worker's side of the protocol: requests, sent again to whoever serves their shard now, and answers."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from sparsecomm.compress import Compressor
from sparsecomm.errors import RemoteError, WireError
from sparsecomm.ps.modes import Mode
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.protocol.roster import ring
from sparsecomm.transport.mailbox import Mailbox
from sparsecomm.transport.mailbox.window import Window
from sparsecomm.types import ValueCodec

__all__ = ["Client", "Driver", "Link", "Steps"]

T = TypeVar("T")

Steps = Generator[str, None, T]
"""Something that waits now and then: yields whom it waits for, returns its result."""


class Driver(Protocol):
    """Runs steps to their end, letting messages come in."""

    def __call__(self, steps: Steps[T], /) -> T:
        """Returns the result; raises CommTimeout when it takes too long."""
        ...


@dataclass(frozen=True)
class Link:
    """How a worker reaches its servers.

    Attributes:
        mailbox: its mailbox.
        servers: ranks of all servers, by index.
        workers: ranks of all workers at the start, and of this one.
        world: number of ranks at the start.
        mode: that the servers run, or its text.
        sparse: what servers select sparse pulls with, if they do.
        pull_codec: of these.
        pull_by: "asked", "one_sided" or "auto".
        open_window: makes this worker's end of the servers' windows. Collective. None where there are none.
        drive: runs steps to their end; None where whoever made the link does so.
        made: called with the worker that uses the link.
    """

    mailbox: Mailbox
    servers: tuple[int, ...]
    workers: tuple[int, ...]
    world: int
    mode: Mode | str
    sparse: Compressor | None = None
    pull_codec: ValueCodec = ValueCodec.FP16
    pull_by: str = "asked"
    open_window: Callable[[int], Window] | None = None
    drive: Driver | None = None
    made: Callable[[Any], None] | None = None

    @property
    def lead(self) -> int | None:
        """How many pushes a worker may be ahead of the slowest."""
        return None if isinstance(self.mode, str) else self.mode.lead

    @property
    def place(self) -> tuple[int, int]:
        """This worker's number and how many there are: those of the start, and all that joined up to this one."""
        if not self.joins:
            return self.workers.index(self.mailbox.rank), len(self.workers)
        number = len(self.workers) - 1 + self.mailbox.rank - self.world
        return number, number + 1

    @property
    def joins(self) -> bool:
        """Whether this worker comes after the start."""
        return self.mailbox.rank >= self.world


class Client:
    """Requests in flight, at most one of a kind to a shard.

    Args:
        link: to the servers.
        shards: how many there are.

    Attributes:
        on_answer: called with the envelope and the body of every answer.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.rank = link.mailbox.rank
        self.on_answer: dict[Kind, Callable[[Envelope, torch.Tensor], None]] = {}
        self._open: dict[tuple[int, Kind], tuple[int, torch.Tensor]] = {}  # with its clock
        self._greetings: dict[int, torch.Tensor] = {}  # by shard, until its values have come
        self._lost: frozenset[int] = frozenset()
        self._owners = dict(enumerate(link.servers))

    def ask(self, kind: Kind, shard: int, body: torch.Tensor = ms.NOTHING, **fields: Any) -> None:
        """Sends a request to whoever serves a shard; it stays open until it is answered."""
        message = ms.pack(Envelope(kind, shard, self.rank, **fields), body)
        self._open[shard, kind] = fields.get("clock", 0), message
        if kind == Kind.HELLO:
            self._greetings[shard] = message
        self.link.mailbox.send(self._owners[shard], message)

    def forget(self, kind: Kind, shard: int) -> None:
        """Does not wait for the answer to a request any more."""
        self._open.pop((shard, kind), None)

    def waits(self, kind: Kind) -> bool:
        """Returns whether a request of a kind is open."""
        return any(k == kind for _, k in self._open)

    def wait(self, *kinds: Kind) -> Steps[None]:
        """Waits until no request of these kinds is open.

        Raises:
            RemoteError: a server refused a request; the message has its reason.
        """
        self.pump()
        while waiting := sorted((s, k) for s, k in self._open if k in kinds):
            shard, kind = waiting[0]
            more = f" and {len(waiting) - 1} more" if len(waiting) > 1 else ""
            yield f"the answer of server rank {self._owners[shard]} to {kind.name} of shard {shard}{more}"
            self.pump()

    def pump(self) -> None:
        """Takes in all that has arrived, and sends open requests again where a server has died."""
        self._reroute()
        while (arrived := self.link.mailbox.receive()) is not None:
            source, message = arrived
            envelope, body = ms.unpack(message, source)
            if source not in self.link.servers:
                raise WireError("sender", source, "not a server", rank=source)
            self._take(envelope, body)

    def _take(self, envelope: Envelope, body: torch.Tensor) -> None:
        if envelope.kind == Kind.REJECT:
            why = ms.read_text(body)
            raise RemoteError(f"server rank {envelope.sender} refused a message of worker rank {self.rank}: {why}")
        asked = _ASKED.get(envelope.kind, envelope.seq)
        if asked not in Kind.__members__.values():
            raise WireError(
                "seq", envelope.seq, f"not a request that {envelope.kind.name} answers", rank=envelope.sender
            )
        key = (envelope.shard, Kind(asked))
        clock, _ = self._open.get(key, (None, None))
        if clock is None and envelope.kind != Kind.WELCOME:
            return  # answered by the server that has died since, too
        if asked in (Kind.PUSH, Kind.PULL) and clock != envelope.clock:
            return  # an answer like that to a request before this one
        if asked == Kind.PUSH:
            self._open.pop((envelope.shard, Kind.COMMIT), None)
        self._open.pop(key, None)
        if asked == Kind.PULL:
            self._greetings.pop(envelope.shard, None)
        handler = self.on_answer.get(envelope.kind)
        if handler is not None:
            handler(envelope, body)

    def _reroute(self) -> None:
        lost = self.link.mailbox.lost()
        if lost == self._lost:
            return
        for shard, owner in self._owners.items():
            if owner not in lost:
                continue
            servers = self.link.servers
            living = [r for r in ring(servers, shard) if r not in lost]
            if not living:
                raise RemoteError(
                    f"shard {shard} is lost: all servers are dead or have ended (rank {', '.join(map(str, servers))})"
                )
            self._owners[shard] = living[0]
            for message in self._unanswered(shard):
                self.link.mailbox.send(living[0], message)
        self._lost = lost  # not before: without any server every later wait must fail, too

    def _unanswered(self, shard: int) -> list[torch.Tensor]:
        """Returns what another server must be told, in order.

        The HELLO too until values have come: only then is there a copy that knows of this worker for certain.
        """
        found = {kind: message for (index, kind), (_, message) in self._open.items() if index == shard}
        if shard in self._greetings:
            found[Kind.HELLO] = self._greetings[shard]
        return [found[kind] for kind in sorted(found)]


_ASKED = {Kind.WELCOME: Kind.HELLO, Kind.VALUES: Kind.PULL, Kind.STATS: Kind.STATS, Kind.PING: Kind.PING}
"""What each answer answers; an ACK says so itself."""
