"""A worker's requests: each is sent to the shard's server, and sent again to the next server if that one dies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparsecomm.errors import RemoteError, WireError
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.protocol.roster import ring
from sparsecomm.ps.worker.link import Link, Steps

__all__ = ["Client"]

_REQUEST_OF = {kind: kind for kind in (Kind.STATS, Kind.PING, Kind.LATE)} | {
    Kind.WELCOME: Kind.HELLO,
    Kind.VALUES: Kind.PULL,
}
"""The request that each kind of answer belongs to. An ACK names its request itself."""


class Client:
    """The requests of a worker, at most one of a kind open per shard.

    Args:
        link: Connection to the servers.

    Attributes:
        on_answer: Called with the envelope and the body of every answer, by its kind.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.rank = link.mailbox.rank
        self.on_answer: dict[Kind, Callable[[Envelope, torch.Tensor], None]] = {}
        self._open: dict[tuple[int, Kind], tuple[int, torch.Tensor]] = {}  # clock and message
        self._greetings: dict[int, torch.Tensor] = {}  # by shard, until its values have come
        self._lost: frozenset[int] = frozenset()
        self._owners = dict(enumerate(link.servers))

    def ask(self, kind: Kind, shard: int, body: torch.Tensor = ms.NOTHING, **fields: Any) -> None:
        """Sends a request to the server that owns a shard. It stays open until it is answered.

        Args:
            kind: Kind of the request.
            shard: Index of the shard.
            body: Body of the message.
            fields: Further fields of the envelope.
        """
        message = ms.pack(Envelope(kind, shard, self.rank, **fields), body)
        self._open[shard, kind] = fields.get("clock", 0), message
        if kind == Kind.HELLO:
            self._greetings[shard] = message
        self.link.mailbox.send(self._owners[shard], message)

    def forget(self, kind: Kind, shard: int) -> None:
        """Closes a request without waiting for its answer."""
        self._open.pop((shard, kind), None)

    def waits(self, kind: Kind) -> bool:
        """Returns whether a request of a kind is open."""
        return any(k == kind for _, k in self._open)

    @property
    def owners(self) -> dict[int, int]:
        """Rank of the server that owns a shard, by shard, as far as this worker knows."""
        return dict(self._owners)

    @property
    def awaited(self) -> set[int]:
        """Shards whose server owes an answer."""
        return {shard for shard, _ in self._open}

    def wait(self, *kinds: Kind) -> Steps[None]:
        """Waits until no request of these kinds is open.

        Raises:
            RemoteError: If a server refused a request; the message has its reason. Or if a shard is lost.
        """
        self.pump()
        while waiting := sorted((s, k) for s, k in self._open if k in kinds):
            shard, kind = waiting[0]
            more = f" and {len(waiting) - 1} more" if len(waiting) > 1 else ""
            yield f"the answer of server rank {self._owners[shard]} to {kind.name} of shard {shard}{more}"
            self.pump()

    def pump(self) -> None:
        """Handles all messages that have arrived, and sends open requests again if their server has died."""
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
        request = _REQUEST_OF.get(envelope.kind, envelope.seq)
        if request not in Kind.__members__.values():
            raise WireError(
                "seq", envelope.seq, f"not a request that {envelope.kind.name} answers", rank=envelope.sender
            )
        key = (envelope.shard, Kind(request))
        clock, _ = self._open.get(key, (None, None))
        if clock is None and envelope.kind != Kind.WELCOME:
            return  # the server that has died since had answered, too
        if request in (Kind.PUSH, Kind.PULL) and clock != envelope.clock:
            return  # the answer to an earlier request
        if request == Kind.PUSH:
            self._open.pop((envelope.shard, Kind.COMMIT), None)
        self._open.pop(key, None)
        if request == Kind.PULL:
            self._greetings.pop(envelope.shard, None)
        handler = self.on_answer.get(envelope.kind)
        if handler is not None:
            handler(envelope, body)

    def _reroute(self) -> None:
        """Finds the new owner of each shard whose server has died, and sends it the open requests."""
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
        self._lost = lost  # not earlier: when no server lives, every later wait must fail as well

    def _unanswered(self, shard: int) -> list[torch.Tensor]:
        """Returns the messages that a new owner of a shard must get, in order.

        HELLO is among them until values have come. Only then does a copy exist that certainly knows this worker:
        without it, 4 of 60 jobs failed in which a server was killed during start-up.
        """
        found = {kind: message for (index, kind), (_, message) in self._open.items() if index == shard}
        if shard in self._greetings:
            found[Kind.HELLO] = self._greetings[shard]
        return [found[kind] for kind in sorted(found)]
