"""P simulated ranks in one process, without threads. Runs the real collectives, deterministically, and counts bytes."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from typing_extensions import override

from sparsecomm.errors import CommTimeout, ConfigError, TransportError
from sparsecomm.transport.base import Channel, CollectiveSteps, Request, Traffic, Transport
from sparsecomm.transport.notes import Note

__all__ = ["SimulatedTransport", "SimulatedWorld"]

_Mail = dict[tuple[int, int, int], deque[torch.Tensor]]


class _Sent(Request):
    """A send. It is complete at once, since the bytes were copied."""

    def __init__(self, text: str, peer: int) -> None:
        self._text = text
        self.peer = peer

    @override
    def test(self) -> bool:
        return True

    @override
    def describe(self) -> str:
        return self._text

    @override
    def cancel(self) -> None:
        pass


class _Receiving(Request):
    """A receive. It is complete when its message has been taken from the mail."""

    def __init__(self, mail: _Mail, key: tuple[int, int, int], buffer: torch.Tensor) -> None:
        self._mail = mail
        self._key = key
        self.peer = key[0]
        self._buffer: torch.Tensor | None = buffer

    @override
    def test(self) -> bool:
        if self._buffer is None:
            return True
        queue = self._mail.get(self._key)
        if not queue:
            return False
        message = queue.popleft()
        if not queue:
            del self._mail[self._key]  # no other collective uses the key, and each has P * P of them
        if message.numel() != self._buffer.numel():
            raise TransportError(
                f"rank {self._key[1]} expected {self._buffer.numel()} bytes from rank {self._key[0]}, "
                f"got {message.numel()}"
            )
        self._buffer.copy_(message)
        self._buffer = None
        return True

    @override
    def describe(self) -> str:
        size = 0 if self._buffer is None else self._buffer.numel()
        return f"receive of {size} bytes from rank {self._key[0]}"

    @override
    def cancel(self) -> None:
        self._buffer = None


class SimulatedTransport(Transport):
    """One rank of a `SimulatedWorld`."""

    blocking = False
    name = "simulated"
    max_tag = 2**31 - 1

    def __init__(self, world: SimulatedWorld, rank: int) -> None:
        self._world = world
        self.rank = rank
        self.size = world.size
        self.nodes = world.nodes
        self.one_host = len(set(world.nodes)) == 1

    @override
    def isend(self, data: torch.Tensor, dest: int, tag: int) -> Request:
        """Delivers a copy of the bytes to the receiver."""
        self._world.deliver(self.rank, dest, tag, data)
        return _Sent(f"send of {data.numel()} bytes to rank {dest}", dest)

    @override
    def irecv(self, buffer: torch.Tensor, source: int, tag: int) -> Request:
        """Starts to receive the next message of this source and tag."""
        return _Receiving(self._world.mail, (source, self.rank, tag), buffer)

    @override
    def world_rank(self, rank: int) -> int:
        return rank

    @override
    def tell(self, note: Note) -> None:
        self._world.notes[self.rank] = note

    @override
    def notes(self) -> Iterable[Note]:
        return [note for rank, note in list(self._world.notes.items()) if rank != self.rank]

    @override
    def close(self) -> None:
        """Does nothing, because a simulated rank holds no resources."""

    @override
    def abort(self, code: int) -> None:
        """Always raises, because a simulated rank cannot end the process."""
        raise TransportError(f"simulated rank {self.rank} aborted with code {code}")


class SimulatedWorld:
    """A world of `size` ranks in this process.

    Args:
        size: Number of ranks.
        nodes: Node of every rank. None puts all ranks on one node.

    Attributes:
        size: Number of ranks.
        nodes: Node of every rank.
        ranks: Transport of each rank.
        mail: Messages that were sent and not yet received, by source, destination and tag.
        traffic: Messages and bytes of each rank.
        notes: The newest note of each rank that has told one.
        tamper: If set, called with (source, dest, message) for every message. Returns the message to deliver, or None
            to lose it. For tests of corruption and loss.
    """

    def __init__(self, size: int, nodes: Sequence[int] | None = None) -> None:
        if size < 1:
            raise ConfigError(f"a world needs at least 1 rank, got {size}")
        self.size = size
        self.nodes = (0,) * size if nodes is None else tuple(nodes)
        if len(self.nodes) != size:
            raise ConfigError(f"nodes = {list(self.nodes)} names {len(self.nodes)} of {size} ranks")
        self.mail: _Mail = defaultdict(deque)
        self.traffic = [Traffic() for _ in range(size)]
        self.notes: dict[int, Note] = {}
        self.tamper: Callable[[int, int, torch.Tensor], torch.Tensor | None] | None = None
        self.ranks = [SimulatedTransport(self, r) for r in range(size)]
        self._tag = 0

    def deliver(self, source: int, dest: int, tag: int, data: torch.Tensor) -> None:
        """Counts a message and queues a copy of it for `dest`."""
        if not 0 <= dest < self.size or dest == source:
            raise TransportError(f"rank {source} sent to rank {dest} in a world of {self.size}")
        message: torch.Tensor | None = data.clone()
        self.traffic[source].messages_sent += 1
        self.traffic[source].bytes_sent += data.numel()
        self.traffic[dest].messages_received += 1
        self.traffic[dest].bytes_received += data.numel()
        if self.tamper is not None:
            message = self.tamper(source, dest, data.clone())
        if message is not None:
            self.mail[(source, dest, tag)].append(message)

    def run(
        self,
        make: Callable[[Channel], CollectiveSteps[Any]],
        *,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Runs one collective on all ranks, in lock-step turns, to its end.

        Args:
            make: Called with the channel of each rank; returns the rank's generator.
            return_exceptions: Whether to return the exception of a rank as its result. If not, the first one is raised.

        Returns:
            The result of each rank.

        Raises:
            CommTimeout: if ranks wait for messages that will never come (a deadlock).
        """
        self._tag += 1
        channels = [Channel(t, self._tag) for t in self.ranks]
        tasks: dict[int, CollectiveSteps[Any]] = {}
        waiting: dict[int, Sequence[Request]] = dict.fromkeys(range(self.size), ())
        results: list[Any] = [None] * self.size
        for r in range(self.size):
            tasks[r] = make(channels[r])
        while tasks:
            progressed = False
            for r in list(tasks):
                progressed |= self._turn(r, tasks, waiting, results)
            if not progressed:
                for r, task in tasks.items():
                    stuck = ", ".join(q.describe() for q in waiting[r])
                    results[r] = CommTimeout(f"simulated rank {r} waits for ever for: {stuck}")
                    task.close()
                break
        if not return_exceptions:
            for r in results:
                if isinstance(r, BaseException):
                    raise r
        return results

    @staticmethod
    def _turn(
        r: int,
        tasks: dict[int, CollectiveSteps[Any]],
        waiting: dict[int, Sequence[Request]],
        results: list[Any],
    ) -> bool:
        """Gives rank r one turn. Returns whether the rank made progress."""
        try:
            left = [q for q in waiting[r] if not q.test()]
            if left:
                moved = len(left) < len(waiting[r])
                waiting[r] = left
                return moved
            waiting[r] = list(next(tasks[r]))
        except StopIteration as stop:
            results[r] = stop.value
            del tasks[r]
        except Exception as error:
            results[r] = error
            del tasks[r]
        return True
