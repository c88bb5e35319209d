"""Mailboxes and windows of many ranks in one process, deterministic."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import torch

from sparsecomm.errors import ConfigError, TransportError
from sparsecomm.transport.base import Traffic
from sparsecomm.transport.mailbox.window import Get

__all__ = ["SimulatedMailbox", "SimulatedMailboxes", "SimulatedWindow"]


class SimulatedMailbox:
    """The `Mailbox` of one rank of a `SimulatedMailboxes`."""

    fault_tolerant = True

    def __init__(self, mailboxes: SimulatedMailboxes, rank: int) -> None:
        self._mailboxes = mailboxes
        self.rank = rank
        self.size = mailboxes.size
        self.traffic = Traffic()

    def send(self, dest: int, message: torch.Tensor) -> None:
        """Puts a message into another rank's mailbox."""
        self._mailboxes.deliver(self.rank, dest, message)

    def receive(self) -> tuple[int, torch.Tensor] | None:
        """Takes the next message out of this mailbox."""
        return self._mailboxes.collect(self.rank)

    def lost(self) -> frozenset[int]:
        """Returns the deaths that this rank knows of."""
        return self._mailboxes.known_deaths(self.rank)

    def flushed(self) -> bool:
        """Always True: a message is in its mailbox at once."""
        return True


class SimulatedMailboxes:
    """The mailboxes of `size` ranks in this process.

    Attributes:
        by_rank: The mailboxes, by rank.
        dead: Ranks that were killed.
        tamper: If set, called with (source, dest, message); may return another message, or None to lose it.
        late: If set, draws how late messages arrive and deaths become known, for each rank separately. Messages from
            one rank to another keep their order.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(f"a world needs at least 1 rank, got {size}")
        self.size = size
        self.by_rank = [SimulatedMailbox(self, r) for r in range(size)]
        self.dead: frozenset[int] = frozenset()
        self.tamper: Callable[[int, int, torch.Tensor], torch.Tensor | None] | None = None
        self.late: random.Random | None = None
        self._mail: list[deque[tuple[int, torch.Tensor]]] = [deque() for _ in range(size)]
        self._known_deaths = [self.dead] * size

    def deliver(self, source: int, dest: int, data: torch.Tensor) -> None:
        """Puts a copy of a message into the mailbox of `dest`; nothing goes to or comes from the dead."""
        if not 0 <= dest < self.size or dest == source:
            raise TransportError(f"rank {source} sent to rank {dest} in a world of {self.size}")
        if source in self.dead or dest in self.dead:
            return
        message: torch.Tensor | None = data.clone()
        if self.tamper is not None:
            message = self.tamper(source, dest, data.clone())
        sent = self.by_rank[source].traffic
        sent.messages_sent += 1
        sent.bytes_sent += data.numel()
        if message is not None:
            self._mail[dest].append((source, message))

    def collect(self, rank: int) -> tuple[int, torch.Tensor] | None:
        """Takes the next message out of a mailbox."""
        waiting = self._mail[rank]
        if not waiting or (self.late is not None and self.late.random() < 0.5):
            return None
        source = waiting[0][0] if self.late is None else self.late.choice([s for s, _ in waiting])
        at = next(i for i, (s, _) in enumerate(waiting) if s == source)
        _, message = waiting[at]
        del waiting[at]
        received = self.by_rank[rank].traffic
        received.messages_received += 1
        received.bytes_received += message.numel()
        return source, message

    def known_deaths(self, rank: int) -> frozenset[int]:
        """Returns the deaths that a rank knows of."""
        if self.late is None or self.late.random() < 0.3:
            self._known_deaths[rank] = self.dead
        return self._known_deaths[rank]

    def kill(self, rank: int, *, lose: bool = False) -> None:
        """Makes a rank dead for all others.

        Args:
            rank: The rank.
            lose: Whether its messages that nobody has read yet are lost as well.
        """
        self.dead |= {rank}
        self._mail[rank].clear()
        if lose:
            self._mail = [deque(m for m in waiting if m[0] != rank) for waiting in self._mail]


class SimulatedWindow:
    """The `Window` of one rank; the windows of all ranks are in this process.

    Args:
        memories: Memories of all ranks, by rank. A read waits for a memory that is not there yet.
        rank: This rank.

    Attributes:
        during: Called in the middle of each read of more than a header; may write to the memory that is read.
    """

    def __init__(self, memories: dict[int, torch.Tensor], rank: int) -> None:
        self.memory = memories[rank]
        self.during: Callable[[], None] | None = None
        self._memories = memories

    def get(self, rank: int, offset: int, out: torch.Tensor) -> Get:
        """Starts a read, which reads one half, then the other."""
        return _SimulatedGet(self, self._memories, rank, offset, out)

    def sync(self) -> None:
        """Does nothing: there is one thread."""


class _SimulatedGet:
    def __init__(
        self, window: SimulatedWindow, memories: dict[int, torch.Tensor], rank: int, offset: int, out: torch.Tensor
    ) -> None:
        self._window = window
        self._memories = memories
        self._rank = rank
        self._offset = offset
        self._target = out.view(torch.uint8)

    def test(self) -> bool:
        """Reads, if the memory is there."""
        if self._rank not in self._memories:
            return False
        target, half = self._target, len(self._target) // 2
        source = self._memories[self._rank][self._offset : self._offset + len(target)]
        target[:half] = source[:half]
        if self._window.during is not None and len(target) > 64:
            self._window.during()
        target[half:] = source[half:]
        return True
