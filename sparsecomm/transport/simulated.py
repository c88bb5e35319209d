"""P ranks in one process, without threads: the same collectives, deterministic, with messages and bytes counted."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparsecomm.errors import CommTimeout, ConfigError, TransportError
from sparsecomm.transport.base import Channel, CollectiveSteps, Request, Traffic

__all__ = ["SimulatedTransport", "SimulatedWorld"]

_Mail = dict[tuple[int, int, int], deque[torch.Tensor]]


class _Sent:
    """A send: complete at once, since the bytes were copied."""

    def __init__(self, text: str) -> None:
        self._text = text

    def test(self) -> bool:
        return True

    def describe(self) -> str:
        return self._text

    def cancel(self) -> None:
        pass


class _Receiving:
    def __init__(self, mail: _Mail, key: tuple[int, int, int], buffer: torch.Tensor) -> None:
        self._mail = mail
        self._key = key
        self._buffer: torch.Tensor | None = buffer

    def test(self) -> bool:
        if self._buffer is None:
            return True
        queue = self._mail.get(self._key)
        if not queue:
            return False
        message = queue.popleft()
        if not queue:
            del self._mail[self._key]  # every collective has keys of its own, P * P of them
        if message.numel() != self._buffer.numel():
            raise TransportError(
                f"rank {self._key[1]} expected {self._buffer.numel()} bytes from rank {self._key[0]}, "
                f"got {message.numel()}"
            )
        self._buffer.copy_(message)
        self._buffer = None
        return True

    def describe(self) -> str:
        size = 0 if self._buffer is None else self._buffer.numel()
        return f"receive of {size} bytes from rank {self._key[0]}"

    def cancel(self) -> None:
        self._buffer = None


class SimulatedTransport:
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

    def isend(self, data: torch.Tensor, dest: int, tag: int) -> Request:
        """Copies the bytes into the receiver's mailbox."""
        self._world.deliver(self.rank, dest, tag, data)
        return _Sent(f"send of {data.numel()} bytes to rank {dest}")

    def irecv(self, buffer: torch.Tensor, source: int, tag: int) -> Request:
        """Takes the next message of this source and tag when there is one."""
        return _Receiving(self._world.mail, (source, self.rank, tag), buffer)

    def world_rank(self, rank: int) -> int:
        """See `Transport.world_rank`."""
        return rank

    def close(self) -> None:
        """Nothing to release."""

    def abort(self, code: int) -> None:
        """A simulated rank cannot end the process."""
        raise TransportError(f"simulated rank {self.rank} aborted with code {code}")


class SimulatedWorld:
    """A world of `size` ranks in this process.

    Args:
        size: number of ranks.
        nodes: the node of every rank; all on one if None.

    Attributes:
        traffic: what each rank sent and received, by rank.
        tamper: if set, called with (source, dest, message) and may return another message or None to lose it:
            for tests of corruption and loss.
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
        self.tamper: Callable[[int, int, torch.Tensor], torch.Tensor | None] | None = None
        self.ranks = [SimulatedTransport(self, r) for r in range(size)]
        self._tag = 0

    def deliver(self, source: int, dest: int, tag: int, data: torch.Tensor) -> None:
        """Puts a copy of a message into the mailbox of `dest` and counts it."""
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
            make: called with each rank's channel, returns its generator.
            return_exceptions: put a rank's exception in its place in the result instead of raising the first.

        Returns:
            The results by rank.

        Raises:
            CommTimeout: for ranks that wait for messages that will never come (a deadlock).
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
        """Gives rank r one turn; returns whether anything moved."""
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
