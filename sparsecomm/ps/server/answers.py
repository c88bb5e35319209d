"""What a server keeps beside the shards themselves: open requests, pushes that are not final, messages not for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sparsecomm.errors import WireError
from sparsecomm.ps.protocol.messages import Envelope
from sparsecomm.ps.protocol.payloads import Selected
from sparsecomm.ps.server.board import Board
from sparsecomm.ps.server.replica import Mirror
from sparsecomm.ps.server.shard import Shard

__all__ = ["Answers", "Held", "PendingPush"]


@dataclass
class Held:
    """A message for a shard that another server has."""

    since: float
    source: int
    message: torch.Tensor


@dataclass
class PendingPush:
    """A push that counts when its worker says so (COMMIT): the end of its gradient is still being computed."""

    envelope: Envelope
    body: torch.Tensor
    selected: Selected
    nonfinite: bool


@dataclass
class Answers:
    """A shard that this server answers for.

    Attributes:
        shard: itself.
        mirror: tells its backup.
        pulls: open requests, by worker.
        early: pushes that are not final, by worker.
        greeted: workers that may be asked for first values.
        asked: the one that was.
        board: the shard in a window.
    """

    shard: Shard
    mirror: Mirror
    pulls: dict[int, Envelope] = field(default_factory=dict)
    early: dict[int, PendingPush] = field(default_factory=dict)
    greeted: list[int] = field(default_factory=list)
    asked: int | None = None
    board: Board | None = None

    def complete(self, workers: tuple[int, ...]) -> bool:
        """Returns whether all workers of the start have said HELLO, and there are values."""
        return self.shard.ready and set(workers) <= set(self.greeted)

    def show(self) -> None:
        """Lets those see the shard who read its window."""
        if self.board is not None:
            self.board.show(self.shard)

    def drop(self, worker: int) -> None:
        """Forgets what a worker has open."""
        self.pulls.pop(worker, None)
        self.early.pop(worker, None)
        if worker in self.greeted:
            self.greeted.remove(worker)

    def final(self, commit: Envelope) -> PendingPush | None:
        """Returns the push that a COMMIT is about; None if that was applied before.

        Raises:
            WireError: if there is none.
        """
        worker, clock = commit.sender, commit.clock
        early = self.early.pop(worker, None)
        if early is not None and early.envelope.clock == clock:
            return early
        if clock < self.shard.clocks.get(worker, 0):
            return None
        raise WireError("clock", clock, "no push of it is held here", rank=worker, bucket=self.shard.spec.index)
