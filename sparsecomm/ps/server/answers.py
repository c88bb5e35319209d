"""State of requests that a server has not answered yet, and the answers to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sparsecomm.errors import WireError
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.gradient import Gradient
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.server.board import Board
from sparsecomm.ps.server.replica import Mirror
from sparsecomm.ps.server.shard import Shard

__all__ = ["Answers", "PendingPush", "owned"]


@dataclass
class PendingPush:
    """A push that counts once its worker sends COMMIT: the rest of the gradient is still being computed.

    Attributes:
        envelope: Envelope of the PUSH.
        body: Body of the PUSH.
        gradient: The gradient, decoded.
    """

    envelope: Envelope
    body: torch.Tensor
    gradient: Gradient


@dataclass
class Answers:
    """A shard that this server owns, and the answers that it owes to workers.

    Attributes:
        shard: The shard.
        mirror: Sends its changes to its backup.
        rank: Rank of this server.
        pulls: Open pulls, by worker.
        pending: Pushes that wait for COMMIT, by worker.
        greeted: Workers that have said HELLO and may be asked for the first values.
        initializer: The worker that was asked for the first values.
        board: The window that shows the shard; None without windows.
    """

    shard: Shard
    mirror: Mirror
    rank: int
    pulls: dict[int, Envelope] = field(default_factory=dict)
    pending: dict[int, PendingPush] = field(default_factory=dict)
    greeted: list[int] = field(default_factory=list)
    initializer: int | None = None
    board: Board | None = None

    def complete(self, workers: tuple[int, ...]) -> bool:
        """Returns whether the shard has values and all of these workers have said HELLO."""
        return self.shard.ready and set(workers) <= set(self.greeted)

    def show(self) -> None:
        """Brings the shard's window up to date."""
        if self.board is not None:
            self.board.show(self.shard)

    def drop(self, worker: int) -> None:
        """Forgets a worker's requests."""
        self.pulls.pop(worker, None)
        self.pending.pop(worker, None)
        if worker in self.greeted:
            self.greeted.remove(worker)

    def commit(self, commit: Envelope) -> PendingPush | None:
        """Returns the push that a COMMIT completes and forgets it; None if that push was applied before.

        Raises:
            WireError: If there is no such push.
        """
        worker, clock = commit.sender, commit.clock
        push = self.pending.get(worker)
        if push is not None and push.envelope.clock == clock:
            return self.pending.pop(worker)
        if clock < self.shard.clocks.get(worker, 0):
            return None
        raise WireError("clock", clock, "no push of it is pending here", rank=worker, bucket=self.shard.spec.index)

    def apply(self, push: PendingPush) -> None:
        """Applies a push, acknowledges it and answers the pulls that waited for it."""
        request = push.envelope
        stale = self.shard.push(request.sender, request.clock, request.version, push.gradient)
        if stale is not None:
            self.mirror.pass_on(request, push.body)
        self.show()  # before the ACK, after which the worker may read the window
        self.acknowledge(request, flags=min(stale or 0, 65535))
        self.answer_pulls()

    def answer_pulls(self) -> None:
        """Answers every pull that the mode lets go on."""
        self.show()
        for worker, request in list(self.pulls.items()):
            if self.shard.may_pull(request.clock):
                del self.pulls[worker]
                dense = bool(request.flags & ms.WHOLE)
                payload, whole = self.shard.pull(worker, request.version - 1, self.rank, dense=dense)
                fields = {"clock": request.clock, "version": self.shard.version, "flags": int(whole)}
                self.send(worker, Kind.VALUES, payload, **fields)

    def acknowledge(self, request: Envelope, flags: int = 0, clock: int | None = None) -> None:
        """Sends the ACK of a request, with the request's clock unless another one is given."""
        clock, version = request.clock if clock is None else clock, self.shard.version
        self.send(request.sender, Kind.ACK, clock=clock, version=version, seq=request.kind, flags=flags)

    def send(self, worker: int, kind: Kind, body: torch.Tensor = ms.NOTHING, **fields: Any) -> None:
        """Sends an answer once the backup has stored all changes that the shard has seen so far."""
        self.mirror.after(worker, ms.pack(Envelope(kind, self.shard.spec.index, self.rank, **fields), body))


def owned(answers: dict[int, Answers], envelope: Envelope, *, lost: bool) -> Answers:
    """Returns the answers for a message's shard.

    Args:
        answers: The answers of a server, by shard.
        envelope: Envelope of the message.
        lost: Whether the shard may be lost if this server does not have it.

    Raises:
        WireError: If this server does not have the shard.
    """
    found = answers.get(envelope.shard)
    if found is None:
        gone = "is lost: its server is dead, and so is its backup, or it had none"
        why = gone if lost else "nobody said HELLO for it here"
        raise WireError("shard", envelope.shard, why, rank=envelope.sender)
    return found
