"""Keeping a shard on the next server: what changes it travels there, and answers wait until it has arrived."""

from __future__ import annotations

from collections import deque

import torch

from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.protocol.payloads import PUSH, decode
from sparsecomm.ps.protocol.roster import ring
from sparsecomm.ps.server.rules import Rules
from sparsecomm.ps.server.shard import Shard
from sparsecomm.transport.mailbox import Mailbox

__all__ = ["Copies", "Mirror", "apply_event"]


class Mirror:
    """The sending side: of one shard, on the server that answers for it.

    Every change has a number. An answer to a worker leaves when the backup has stored every change that the shard had
    seen when it was made, so whatever a worker knows of survives this server.

    Args:
        mailbox: this server's mailbox.
        index: the shard.
    """

    def __init__(self, mailbox: Mailbox, index: int) -> None:
        self._mailbox = mailbox
        self._index = index
        self._backup: int | None = None
        self._begun = False
        self._seq = 0
        self._stored = 0
        self._waiting: deque[tuple[int, int, torch.Tensor]] = deque()

    @property
    def quiet(self) -> bool:
        """Whether nothing is on its way to the backup."""
        return not self._waiting and (self._backup is None or self._stored >= self._seq)

    def moved(self, backup: int | None, shard: Shard) -> None:
        """Notes who the backup is now; a new one is sent the whole shard."""
        if backup == self._backup:
            return
        self._backup, self._begun = backup, False
        if backup is None:
            self._stored = self._seq
            self._release()
        elif shard.ready:
            self.snapshot(shard)

    def snapshot(self, shard: Shard) -> None:
        """Sends the whole shard."""
        self._begun = True
        self._tell(Kind.SNAPSHOT, shard.snapshot())

    def pass_on(self, envelope: Envelope, body: torch.Tensor) -> None:
        """Passes a worker's PUSH or JOIN on."""
        if self._begun:
            self._tell(Kind.EVENT, ms.pack(envelope, body))

    def leave(self, worker: int, why: str) -> None:
        """Says that a worker is gone."""
        if self._begun:
            self._tell(Kind.EVENT, ms.pack(Envelope(Kind.BYE, self._index, worker), ms.text(why)))

    def after(self, dest: int, message: torch.Tensor) -> None:
        """Sends a message to a worker when the backup has all that was told so far."""
        if self._backup is None or self._stored >= self._seq:
            self._mailbox.send(dest, message)
        else:
            self._waiting.append((self._seq, dest, message))

    def stored(self, sender: int, seq: int) -> None:
        """Notes that the backup has all changes up to a number."""
        if sender == self._backup:
            self._stored = max(self._stored, min(seq, self._seq))
            self._release()

    def _tell(self, kind: Kind, body: torch.Tensor) -> None:
        if self._backup is not None:
            self._seq += 1
            self._mailbox.send(
                self._backup, ms.pack(Envelope(kind, self._index, self._mailbox.rank, seq=self._seq), body)
            )

    def _release(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._stored:
            _, dest, message = self._waiting.popleft()
            self._mailbox.send(dest, message)


class Copies:
    """The receiving side: copies of other servers' shards.

    Args:
        servers: ranks of all servers, by index.
        rules: of the job.
    """

    def __init__(self, servers: tuple[int, ...], rules: Rules) -> None:
        self._servers = servers
        self._rules = rules
        self._kept: dict[int, tuple[int, Shard]] = {}

    def take_in(self, envelope: Envelope, body: torch.Tensor) -> bool:
        """Takes a SNAPSHOT or an EVENT; returns False for one of an owner that has died since."""
        return self._replace(envelope, body) if envelope.kind == Kind.SNAPSHOT else self._change(envelope, body)

    def _replace(self, envelope: Envelope, body: torch.Tensor) -> bool:
        """Takes a SNAPSHOT; returns False for one of an owner that has died since."""
        index, sender = envelope.shard, envelope.sender
        order = ring(self._servers, index)
        owner, _ = self._kept.get(index, (sender, None))
        if order.index(sender) < order.index(owner):
            return False
        self._kept[index] = (sender, Shard.from_snapshot(self._rules, body))
        return True

    def _change(self, envelope: Envelope, body: torch.Tensor) -> bool:
        """Takes an EVENT; returns False for one of an owner that has died since.

        Raises:
            WireError: if it does not fit; the copy is as it was.
        """
        owner, copy = self._kept.get(envelope.shard, (None, None))
        if copy is None or owner != envelope.sender:
            return False
        apply_event(copy, body)
        return True

    def take(self, index: int) -> Shard | None:
        """Hands a copy over, because its owner has died."""
        return self._kept.pop(index, (None, None))[1]

    @property
    def shards(self) -> dict[int, Shard]:
        """The copies, by index."""
        return {index: copy for index, (_, copy) in self._kept.items()}


def apply_event(replica: Shard, event: torch.Tensor) -> None:
    """Does to a copy what was done to the shard.

    Args:
        replica: Mutated.
        event: body of an EVENT: the worker's PUSH or JOIN as it came, or a BYE in its name.

    Raises:
        WireError: if it does not fit; the copy is as it was.
    """
    inner, body = ms.unpack(event, None)
    if inner.kind == Kind.JOIN:
        replica.join(inner.sender, inner.clock)
    elif inner.kind == Kind.PUSH:
        world = replica.rules.world_of(inner.sender)
        selected, nonfinite = decode(PUSH, replica.spec, body, rank=inner.sender, world=world, step=inner.clock)
        replica.push(inner.sender, inner.clock, inner.version, selected, nonfinite)
    else:
        replica.leave(inner.sender, ms.read_text(body))
