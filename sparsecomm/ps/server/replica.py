"""Replication of a shard to the next server: the owner sends every change there before it answers for it."""

from __future__ import annotations

from collections import deque

import torch

from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.gradient import read_gradient
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.protocol.roster import ring
from sparsecomm.ps.server.rules import Rules
from sparsecomm.ps.server.shard import Shard
from sparsecomm.transport.mailbox import Mailbox

__all__ = ["Copies", "Mirror", "apply_event"]


class Mirror:
    """Sends the changes of one shard from its owner to its backup.

    Every change has a number. An answer to a worker leaves once the backup has stored every change that the shard had
    seen when the answer was made. So every change that a worker knows of survives the owner's death.

    Args:
        mailbox: Mailbox of the owner.
        index: Index of the shard.
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
        """Whether the backup has stored everything and no answer waits."""
        return not self._waiting and (self._backup is None or self._stored >= self._seq)

    def moved(self, backup: int | None, shard: Shard) -> None:
        """Takes note of the current backup. A new one is sent the whole shard."""
        if backup == self._backup:
            return
        self._backup, self._begun = backup, False
        if backup is None:
            self._stored = self._seq
            self._release()
        elif shard.ready:
            self.snapshot(shard)

    def snapshot(self, shard: Shard) -> None:
        """Sends the whole shard to the backup."""
        self._begun = True
        self._tell(Kind.SNAPSHOT, shard.snapshot())

    def pass_on(self, envelope: Envelope, body: torch.Tensor) -> None:
        """Sends a worker's PUSH or JOIN to the backup."""
        if self._begun:
            self._tell(Kind.EVENT, ms.pack(envelope, body))

    def leave(self, worker: int, why: str) -> None:
        """Tells the backup that a worker is gone."""
        if self._begun:
            self._tell(Kind.EVENT, ms.pack(Envelope(Kind.BYE, self._index, worker), ms.text(why)))

    def after(self, dest: int, message: torch.Tensor) -> None:
        """Sends a message to a worker once the backup has stored all that it has been told so far."""
        if self._backup is None or self._stored >= self._seq:
            self._mailbox.send(dest, message)
        else:
            self._waiting.append((self._seq, dest, message))

    def stored(self, sender: int, seq: int) -> None:
        """Takes note that the backup has stored all changes up to number `seq`."""
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
    """Copies of other servers' shards on their backup.

    Args:
        servers: Ranks of all servers, by index.
        rules: Rules of the job.
    """

    def __init__(self, servers: tuple[int, ...], rules: Rules) -> None:
        self._servers = servers
        self._rules = rules
        self._kept: dict[int, tuple[int, Shard]] = {}

    def take_in(self, envelope: Envelope, body: torch.Tensor) -> bool:
        """Applies a SNAPSHOT or an EVENT; returns False if its sender is an owner that has died since."""
        return self._replace(envelope, body) if envelope.kind == Kind.SNAPSHOT else self._change(envelope, body)

    def _replace(self, envelope: Envelope, body: torch.Tensor) -> bool:
        """Applies a SNAPSHOT; returns False if its sender is an owner that has died since."""
        index, sender = envelope.shard, envelope.sender
        order = ring(self._servers, index)
        owner, _ = self._kept.get(index, (sender, None))
        if order.index(sender) < order.index(owner):
            return False
        self._kept[index] = (sender, Shard.from_snapshot(self._rules, body))
        return True

    def _change(self, envelope: Envelope, body: torch.Tensor) -> bool:
        """Applies an EVENT; returns False if its sender is an owner that has died since.

        Raises:
            WireError: If the event does not fit. The copy is unchanged.
        """
        owner, copy = self._kept.get(envelope.shard, (None, None))
        if copy is None or owner != envelope.sender:
            return False
        apply_event(copy, body)
        return True

    def take(self, index: int) -> Shard | None:
        """Removes and returns the copy of a shard whose owner has died; None if there is none."""
        return self._kept.pop(index, (None, None))[1]

    @property
    def shards(self) -> dict[int, Shard]:
        """The copies, by index."""
        return {index: copy for index, (_, copy) in self._kept.items()}


def apply_event(replica: Shard, event: torch.Tensor) -> None:
    """Applies a change of a shard to its copy.

    Args:
        replica: The copy. Mutated.
        event: Body of an EVENT: a worker's PUSH or JOIN as it came, or a BYE in a worker's name.

    Raises:
        WireError: If the event does not fit. The copy is unchanged.
    """
    inner, body = ms.unpack(event, None)
    worker, clock = inner.sender, inner.clock
    if inner.kind == Kind.JOIN:
        replica.join(worker, clock)
    elif inner.kind == Kind.PUSH:
        gradient = read_gradient(replica.rules.push_origin(replica.spec, worker, clock), inner.seq, body)
        replica.push(worker, clock, inner.version, gradient)
    else:
        replica.leave(worker, ms.read_text(body))
