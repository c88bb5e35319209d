"""Collectives as the engine sees them: submitted, in flight, and grouped by the ranks that take part."""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from sparsecomm.transport.base import Channel, CollectiveSteps, GroupLink, GroupTransport, Link, Request, Transport

__all__ = ["IN_FLIGHT", "Outside", "Running", "Task", "TaskGroup"]

IN_FLIGHT = 32
"""Most collectives of a group in flight at once. Those submitted later wait in the group's backlog."""


@dataclass(frozen=True, slots=True)
class Task:
    """A collective to run. The engine calls exactly one of the two callbacks, on its thread.

    Attributes:
        label: Name of the collective in errors, e.g. "bucket 3 of step 10".
        make: Called with the channel of the collective; returns its generator.
        on_done: Called with the result of the generator.
        on_error: Called with the error that made the collective fail.
        group: World ranks that take part, in order; None for all ranks.
        key: Identifies the buffers of the collective. A later task of the same key starts when this one has ended.
        patient: Whether the task may wait for some milliseconds while more tasks are being submitted.
        lane: Tasks of other lanes may be submitted in another order on other ranks. 0 is everybody's. A lane below 0
            has no window: all its tasks start at once.
        tag: Tag of its messages, outside of the range of tags that groups give out. None takes the group's next tag.
        timeout: Seconds that the task may take from its start; None for the engine's timeout.
        domain: Tasks that fail together. A failure that the ranks have not agreed on ends all tasks of its domain, and
            in domain 0 those of all.
    """

    label: str
    make: Callable[[Channel], CollectiveSteps[Any]]
    on_done: Callable[[Any], None]
    on_error: Callable[[BaseException], None]
    group: tuple[int, ...] | None = None
    key: Hashable = None
    patient: bool = False
    lane: int = 0
    tag: int | None = None
    timeout: float | None = None
    domain: int = 0


@dataclass(slots=True, eq=False)
class Running:
    """A task in flight.

    Attributes:
        task: The task.
        group: The ranks that take part.
        deadline: Time at which the task fails, on the clock of `time.monotonic`.
        channel: Channel of the collective; None until it is opened.
        steps: Generator of the collective; None until it is made.
        waiting: Requests that must be complete before the generator is resumed.
    """

    task: Task
    group: TaskGroup
    deadline: float = math.inf
    channel: Channel | None = None
    steps: CollectiveSteps[Any] | None = None
    waiting: deque[Request] = field(default_factory=deque)

    @property
    def label(self) -> str:
        """Name of the collective in errors."""
        return self.task.label

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """World ranks that take part, in order; None for all ranks."""
        return self.task.group

    def ready(self, tries: int) -> bool:
        """Tests up to `tries` times and returns whether all requests are complete.

        Tests only the oldest request that is incomplete, because any test lets all requests make progress.
        """
        while self.waiting:
            request = self.waiting[0]
            if not request.test():
                tries -= 1
                if tries <= 0:
                    return False
                continue
            self.waiting.popleft()
        return True


@dataclass(slots=True, eq=False)
class Outside:
    """A collective in progress outside of the engine, in torch.distributed. The engine sees which ranks leave it.

    Attributes:
        label: Name of the collective in errors.
        ranks: World ranks that take part, in order; None for all ranks.
        on_error: Called on the engine's thread if the collective cannot end.
        deadline: Time at which it is late, on the clock of `time.monotonic`.
    """

    label: str
    ranks: tuple[int, ...] | None
    on_error: Callable[[BaseException], None]
    deadline: float = math.inf


class TaskGroup:
    """Ranks that communicate in one lane. The tags of their collectives derive from both and from a count.

    Tags are hashed into ranges. Two groups may rarely share one; the headers of messages then differ.
    Each group also has a window and a backlog, because only within a group do all ranks submit in the same order.

    Args:
        world: The world's transport.
        ranks: World ranks of the group, in order; None for all ranks.
        link: Link between hosts; None to have it measured.
        lane: Lane of the tasks.

    Attributes:
        in_flight: Number of tasks in flight.
        keys: Keys of these tasks.
        backlog: Tasks that have not started.
    """

    def __init__(
        self, world: Transport, ranks: tuple[int, ...] | None, link: Link | None = None, *, lane: int = 0
    ) -> None:
        self._world = world
        self._lane = lane
        self._given = link
        self._ranks = ranks
        self._transport: Transport | None = None
        self._link: GroupLink | None = None
        self._started = 0
        self.in_flight = 0
        self.keys: set[Hashable] = set()
        self.backlog: deque[Task] = deque()

    def may_start(self) -> bool:
        """Returns whether the first task of the backlog may start now."""
        free = self.in_flight < IN_FLIGHT or self._lane < 0
        return bool(self.backlog) and free and self.backlog[0].key not in self.keys

    def open_channel(self, tag: int | None = None) -> Channel:
        """Returns the channel of the next collective.

        Args:
            tag: Tag of its messages; None for the group's next one.

        Raises:
            TransportError: if these ranks cannot be a group.
        """
        if self._transport is None:
            self._transport = self._world if self._ranks is None else GroupTransport(self._world, self._ranks)
            if len(set(self._transport.nodes)) > 1:
                self._link = GroupLink(self._given)
        channel = Channel(self._transport, self._next_tag() if tag is None else tag, self._link)
        if self._link is not None:
            self._link.in_flight[channel] = None
        return channel

    def _next_tag(self) -> int:
        """Returns a tag in the lower half of all tags."""
        tag_bits = min(self._world.max_tag.bit_length() - 1, 30)
        group_bits = tag_bits * 2 // 5
        tags = 1 << (tag_bits - group_bits)
        slot = 0
        if self._ranks is not None or self._lane:
            named = repr((self._ranks, self._lane) if self._lane else self._ranks)
            slot = 1 + zlib.crc32(named.encode()) % ((1 << group_bits) - 1)
        self._started += 1
        return slot * tags + 1 + self._started % (tags - 1)  # tag 0 is that of notes

    def end(self, running: Running) -> None:
        """Takes a task out of flight."""
        self.in_flight -= 1
        if self._link is not None and running.channel is not None:
            del self._link.in_flight[running.channel]
