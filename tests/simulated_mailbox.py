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
    """One rank of a `SimulatedMailboxes`."""

    fault_tolerant = True

    def __init__(self, office: SimulatedMailboxes, rank: int) -> None:
        self._office = office
        self.rank = rank
        self.size = office.size
        self.traffic = Traffic()

    def send(self, dest: int, message: torch.Tensor) -> None:
        """See `Mailbox.send`."""
        self._office.deliver(self.rank, dest, message)

    def receive(self) -> tuple[int, torch.Tensor] | None:
        """See `Mailbox.receive`."""
        return self._office.collect(self.rank)

    def lost(self) -> frozenset[int]:
        """See `Mailbox.lost`."""
        return self._office.heard(self.rank)

    def flushed(self) -> bool:
        """Always True: a message is in its mailbox at once."""
        return True


class SimulatedMailboxes:
    """The mailboxes of `size` ranks in this process.

    Attributes:
        mailboxes: by rank.
        dead: ranks that were killed.
        tamper: if set, called with (source, dest, message); may return another message, or None to lose it.
        late: if set, drawn from for how late messages arrive and deaths become known, to each rank by itself; what one
            rank sends to another keeps its order.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(f"a world needs at least 1 rank, got {size}")
        self.size = size
        self.mailboxes = [SimulatedMailbox(self, r) for r in range(size)]
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
        sent = self.mailboxes[source].traffic
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
        received = self.mailboxes[rank].traffic
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


class SimulatedWindow:
    """Windows of ranks in one process.

    Args:
        memories: of all ranks; one that is not there yet is waited for.
        rank: this one.

    Attributes:
        during: called in the middle of each read of more than a header; may write to what is read.
    """

    def __init__(self, memories: dict[int, torch.Tensor], rank: int) -> None:
        self.memory = memories[rank]
        self.during: Callable[[], None] | None = None
        self._memories = memories

    def get(self, rank: int, offset: int, out: torch.Tensor) -> Get:
        """See `Window.get`: reads one half, then the other."""
        return _SimulatedGet(self, self._memories, rank, offset, out)

    def sync(self) -> None:
        """Does nothing: there is one thread."""


class _SimulatedGet:
    def __init__(
        self, window: SimulatedWindow, memories: dict[int, torch.Tensor], rank: int, offset: int, out: torch.Tensor
    ) -> None:
        self._window = window
        self._memories = memories
        self._where = rank, offset
        self._target = out.view(torch.uint8)

    def test(self) -> bool:
        """Reads, if there is something to read."""
        rank, offset = self._where
        if rank not in self._memories:
            return False
        target, half = self._target, len(self._target) // 2
        source = self._memories[rank][offset : offset + len(target)]
        target[:half] = source[:half]
        if self._window.during is not None and len(target) > 64:
            self._window.during()
        target[half:] = source[half:]
        return True
