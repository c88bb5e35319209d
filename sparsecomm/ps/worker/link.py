"""The connection of a worker to its servers, and the steps in which a worker waits."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sparsecomm.compress import Compressor
from sparsecomm.ps.modes import Mode
from sparsecomm.transport.mailbox import Mailbox
from sparsecomm.transport.mailbox.window import Window
from sparsecomm.types import ValueCodec

__all__ = ["Driver", "Link", "Steps"]

T = TypeVar("T")

Steps = Generator[str, None, T]
"""A computation that yields while it waits, each time with the thing it waits for in words, and returns its result."""


class Driver(Protocol):
    """Runs steps to their end."""

    def __call__(self, steps: Steps[T], /) -> T:
        """Returns the result of the steps.

        Raises:
            CommTimeout: If they wait too long for one thing.
        """
        ...


@dataclass(frozen=True)
class Link:
    """The connection of a worker to its servers.

    Attributes:
        mailbox: Mailbox of the worker.
        servers: Ranks of all servers, by index.
        workers: Ranks of all workers at the start, and of this one.
        world: Number of ranks at the start.
        mode: Mode that the servers run, or its text.
        sparse: Compressor of the servers' sparse pulls; None if they send whole shards.
        pull_codec: Codec of the values of sparse pulls.
        pull_by: "asked", "one_sided" or "auto".
        open_window: Makes this worker's end of the servers' windows. Collective. None if there are no windows.
        drive: Runs the worker's steps; None if the creator of the link does so itself.
        made: Called with the worker that uses the link.
    """

    mailbox: Mailbox
    servers: tuple[int, ...]
    workers: tuple[int, ...]
    world: int
    mode: Mode | str
    sparse: Compressor | None = None
    pull_codec: ValueCodec = ValueCodec.FP16
    pull_by: str = "asked"
    open_window: Callable[[int], Window] | None = None
    drive: Driver | None = None
    made: Callable[[Any], None] | None = None

    @property
    def lead(self) -> int | None:
        """Number of pushes that a worker may be ahead of the slowest; None for no bound."""
        return None if isinstance(self.mode, str) else self.mode.lead

    @property
    def place(self) -> tuple[int, int]:
        """This worker's number, and the number of workers: those of the start and all that joined up to this one."""
        if not self.joins:
            return self.workers.index(self.mailbox.rank), len(self.workers)
        number = len(self.workers) - 1 + self.mailbox.rank - self.world
        return number, number + 1

    @property
    def joins(self) -> bool:
        """Whether this worker came after the start."""
        return self.mailbox.rank >= self.world
