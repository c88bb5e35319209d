"""Messages of unknown length from anyone: what a parameter server needs and collectives do not.

A `Post` is one rank's mailbox. It never blocks. `VirtualOffice` gives many of them in one process, deterministically.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from sparsecomm.errors import ConfigError, TransportError
from sparsecomm.transport.base import Traffic

__all__ = ["Post", "VirtualOffice", "VirtualPost"]


class Post(Protocol):
    """One rank's mailbox. Messages from one rank to another keep their order; used by one thread.

    Attributes:
        rank: this rank.
        size: number of ranks at the start.
        fault_tolerant: whether the others go on when one dies; else the launcher ends the job.
        traffic: what this rank sent and received.
    """

    rank: int
    size: int
    fault_tolerant: bool
    traffic: Traffic

    def send(self, dest: int, message: torch.Tensor) -> None:
        """Starts to send a contiguous uint8 tensor, which must not change any more. To a dead rank it does nothing."""

    def receive(self) -> tuple[int, torch.Tensor] | None:
        """Returns the next message that has arrived and its sender, or None.

        Raises:
            TransportError: if the transport failed other than by the death of a rank.
        """

    def lost(self) -> frozenset[int]:
        """Returns the ranks that are known to be dead. It only grows."""

    def flushed(self) -> bool:
        """Returns whether all that was sent to the living has left, letting it progress."""


class VirtualPost:
    """One rank of a `VirtualOffice`."""

    fault_tolerant = True

    def __init__(self, office: VirtualOffice, rank: int) -> None:
        self._office = office
        self.rank = rank
        self.size = office.size
        self.traffic = Traffic()

    def send(self, dest: int, message: torch.Tensor) -> None:
        """See `Post.send`."""
        self._office.deliver(self.rank, dest, message)

    def receive(self) -> tuple[int, torch.Tensor] | None:
        """See `Post.receive`."""
        return self._office.collect(self.rank)

    def lost(self) -> frozenset[int]:
        """See `Post.lost`."""
        return self._office.heard(self.rank)

    def flushed(self) -> bool:
        """Always True: a message is in its mailbox at once."""
        return True


class VirtualOffice:
    """The mailboxes of `size` ranks in this process.

    Attributes:
        posts: by rank.
        dead: ranks that were killed.
        tamper: if set, called with (source, dest, message); may return another message, or None to lose it.
        late: if set, drawn from for how late messages arrive and deaths become known, to each rank by itself; what one
            rank sends to another keeps its order.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(f"a world needs at least 1 rank, got {size}")
        self.size = size
        self.posts = [VirtualPost(self, r) for r in range(size)]
        self.dead: frozenset[int] = frozenset()
        self.tamper: Callable[[int, int, torch.Tensor], torch.Tensor | None] | None = None
        self.late: random.Random | None = None
        self._mail: list[deque[tuple[int, torch.Tensor]]] = [deque() for _ in range(size)]
        self._heard = [self.dead] * size

    def deliver(self, source: int, dest: int, data: torch.Tensor) -> None:
        """Puts a copy of a message into the mailbox of `dest`; nothing goes to or comes from the dead."""
        if not 0 <= dest < self.size or dest == source:
            raise TransportError(f"rank {source} sent to rank {dest} in a world of {self.size}")
        if source in self.dead or dest in self.dead:
            return
        message: torch.Tensor | None = data.clone()
        if self.tamper is not None:
            message = self.tamper(source, dest, data.clone())
        sent = self.posts[source].traffic
        sent.messages_sent += 1
        sent.bytes_sent += data.numel()
        if message is not None:
            self._mail[dest].append((source, message))

    def collect(self, rank: int) -> tuple[int, torch.Tensor] | None:
        """Takes the next message out of a mailbox."""
        box = self._mail[rank]
        if not box or (self.late is not None and self.late.random() < 0.5):
            return None
        source = box[0][0] if self.late is None else self.late.choice([s for s, _ in box])
        at = next(i for i, (s, _) in enumerate(box) if s == source)
        _, message = box[at]
        del box[at]
        received = self.posts[rank].traffic
        received.messages_received += 1
        received.bytes_received += message.numel()
        return source, message

    def heard(self, rank: int) -> frozenset[int]:
        """Returns which deaths a rank knows of."""
        if self.late is None or self.late.random() < 0.3:
            self._heard[rank] = self.dead
        return self._heard[rank]

    def kill(self, rank: int, *, lose: bool = False) -> None:
        """Makes a rank dead for all others.

        Args:
            rank: who dies.
            lose: whether what it has sent and nobody has read yet is lost, too.
        """
        self.dead |= {rank}
        self._mail[rank].clear()
        if lose:
            self._mail = [deque(m for m in box if m[0] != rank) for box in self._mail]
