"""The one thread that talks: a progress loop over collectives written as generators.

Collectives start in the order in which they were submitted, many may be in flight, and each is resumed when the
requests it waits for are complete. So send/receive pairs, several buckets and several states cannot deadlock each
other, and timeouts and failures surface in one place.

Collectives run in torch's inference mode, in which slicing a tensor costs half: a bucket takes dozens of slices. What
they call back does not.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch

from sparsecomm.errors import CommTimeout, ConfigError, SparseCommError, TransportError
from sparsecomm.transport.backoff import Backoff
from sparsecomm.transport.base import AgreedError, Channel, CollectiveSteps, GroupTransport, Request, Transport
from sparsecomm.transport.inbox import HOLD, Inbox

__all__ = ["IN_FLIGHT", "Engine"]

IN_FLIGHT = 32
"""Collectives of a group in flight at once; those submitted later wait their turn."""

_TRIES = 20  # tests of one request in a row: a turn of the loop costs ten times as much as a test
_STARTING = 300e-6  # seconds of starting others before those in flight get a turn again
# Seconds that the result of a patient one is kept while others are being worked on: it wakes a thread that then asks
# for the interpreter's lock again and again.
_TOGETHER = 20e-3


@dataclass(slots=True, eq=False)
class _Task:
    """A collective, submitted or in flight."""

    label: str
    make: Callable[[Channel], CollectiveSteps[Any]]
    on_done: Callable[[Any], None]
    on_error: Callable[[BaseException], None]
    group: tuple[int, ...] | None
    key: Hashable
    patient: bool
    channel: Channel | None = None
    steps: CollectiveSteps[Any] | None = None
    deadline: float = math.inf
    waiting: deque[Request] = field(default_factory=deque)

    def ready(self, tries: int) -> bool:
        """Returns whether all it waits for is complete. Stops at the first that is not: any test lets all progress."""
        while self.waiting:
            request = self.waiting[0]
            if not request.test():
                tries -= 1
                if tries <= 0:
                    return False
                continue
            self.waiting.popleft()
        return True


class _Group:
    """Ranks that communicate, and how many collectives they have started: their tags come from both.

    Every group has its own range of tags; a clash of two ranges would be seen as a mismatch of headers. It has its own
    window and backlog too, since only within a group do all ranks submit in the same order.
    """

    def __init__(self, world: Transport, ranks: tuple[int, ...] | None) -> None:
        self._world = world
        self._ranks = ranks
        self._transport: Transport | None = None
        self._started = 0
        self.in_flight = 0
        self.keys: set[Hashable] = set()
        self.backlog: deque[_Task] = deque()

    def open_channel(self) -> Channel:
        """Returns the channel of the next collective.

        Raises:
            TransportError: if these ranks cannot be a group.
        """
        tag_bits = min(self._world.max_tag.bit_length() - 1, 30)
        group_bits = tag_bits * 2 // 5
        tags = 1 << (tag_bits - group_bits)
        slot = 0
        if self._transport is None:
            self._transport = self._world if self._ranks is None else GroupTransport(self._world, self._ranks)
        if self._ranks is not None:
            slot = 1 + zlib.crc32(repr(self._ranks).encode()) % ((1 << group_bits) - 1)
        self._started += 1
        return Channel(self._transport, slot * tags + self._started % tags)


class Engine:
    """Runs collectives of one transport on one background thread.

    Every rank of a group must submit the same collectives in the same order. A failure that all ranks have agreed on
    (`AgreedError`) fails that collective alone. After any other the engine is broken: everything in flight and
    everything submitted later fails with that cause, because ranks no longer agree on what is being exchanged.

    Args:
        transport: used by this thread alone from now on.
        timeout: seconds a collective may take from its start.
    """

    def __init__(self, transport: Transport, *, timeout: float = 300.0) -> None:
        if not timeout > 0:
            raise ConfigError(f"timeout must be a positive number of seconds, got {timeout!r}")
        self.transport = transport
        self.timeout = timeout
        self._inbox: Inbox[_Task | None] = Inbox()
        self._active: dict[_Task, _Group] = {}  # in order of submission
        self._waiting = 0  # submitted, not yet started
        self._urgent = 0  # of these, those that are not patient
        self._ended: list[tuple[_Task, _Group, Callable[[Any], None], Any]] = []  # their callbacks are still due
        self._due = math.inf  # when the first of these must be made
        self._broken: BaseException | None = None
        self._groups: dict[tuple[int, ...] | None, _Group] = {}
        self._closing = False
        self._died = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="sparsecomm-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        label: str,
        make: Callable[[Channel], CollectiveSteps[Any]],
        on_done: Callable[[Any], None],
        on_error: Callable[[BaseException], None],
        *,
        group: tuple[int, ...] | None = None,
        key: Hashable = None,
        patient: bool = False,
    ) -> None:
        """Queues a collective; returns at once. Exactly one of the callbacks is called, on the engine's thread.

        Args:
            label: names the collective in errors, e.g. "bucket 3 of step 10".
            make: called with the collective's channel, returns its generator.
            on_done: called with the generator's result.
            on_error: called with what went wrong.
            group: world ranks that take part, in order; all if None.
            key: what the collective works in (its buffers); one with the same key starts when this one has ended.
            patient: whether it may wait, for milliseconds, while more are being submitted.

        Raises:
            TransportError: if the engine is closed or this process is a fork of its owner.
        """
        if os.getpid() != self._pid:
            raise TransportError(
                f"{label}: process {os.getpid()} was forked from rank {self.transport.rank} (process {self._pid}) "
                "and cannot communicate; only the process that called sparsecomm.init() can"
            )
        if self._closing or not self._thread.is_alive():
            raise TransportError(f"{label}: submitted after the engine of rank {self.transport.rank} was closed")
        self._inbox.put(_Task(label, make, on_done, on_error, group, key, patient), patient=patient)

    def call(
        self, label: str, make: Callable[[Channel], CollectiveSteps[Any]], *, group: tuple[int, ...] | None = None
    ) -> Any:
        """Submits a collective and blocks until it is done. Collective. Arguments as in `submit`.

        Returns:
            The generator's result.

        Raises:
            SparseCommError: whatever made it fail.
        """
        if threading.current_thread() is self._thread:
            raise TransportError(f"{label}: the engine's own thread (a callback) cannot wait for a collective")
        done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self.submit(label, make, lambda r: done.put((r, None)), lambda e: done.put((None, e)), group=group)
        result, error = done.get()
        if error is not None:
            raise error
        return result

    def close(self, timeout: float = 10.0) -> bool:
        """Stops the thread when what was submitted has finished; waits for that for `timeout` seconds. Idempotent.

        Returns:
            Whether everything has finished.
        """
        if os.getpid() != self._pid:
            return True
        if not self._closing:
            self._closing = True
            self._inbox.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive() and not self._died

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._loop()
        except BaseException as error:  # a bug of ours: nobody may be left waiting for this thread
            self._died = True
            self._call_back()
            self._broken = error
            for task in [*self._active, *(t for g in self._groups.values() for t in g.backlog)]:
                self._call(task.on_error, self._after_failure(task.label), task.label)
        self._fail_late()
        with contextlib.suppress(Exception):
            self.transport.close()

    def _loop(self) -> None:
        backoff = Backoff()
        stop = False
        while not (stop and not self._active and not self._waiting):
            idle = not self._active and not self._waiting and not stop
            holds = self._holds() and not self._active
            stop |= self._take_new(None if idle else HOLD if holds else backoff.pause())
            moved = self._start_backlog()
            moved |= self._poll()
            alone = not self._active and not self._waiting
            if self._ended and (alone or not moved or time.monotonic() >= self._due):
                self._call_back()
                moved = True
            if moved or idle:
                backoff.news()

    def _fail_late(self) -> None:
        """Fails what was submitted while the thread was ending."""
        for task in self._inbox.take(0.0):
            if task is not None:
                error = TransportError(f"{task.label}: submitted while the engine was closing")
                self._call(task.on_error, error, task.label)

    def _take_new(self, wait: float | None) -> bool:
        """Takes over what was submitted; sleeps until there is something if `wait` is None, else for that time at most.

        Returns:
            Whether the engine was asked to stop.
        """
        stop = False
        for task in self._inbox.take(wait):
            if task is None:
                stop = True
                continue
            if task.group not in self._groups:
                self._groups[task.group] = _Group(self.transport, task.group)
            self._groups[task.group].backlog.append(task)
            self._waiting += 1
            self._urgent += not task.patient
        return stop

    def _holds(self) -> bool:
        """Returns whether all that waits is patient, and whoever submits it is at it."""
        return bool(self._waiting) and not self._urgent and self._inbox.busy()

    def _start_backlog(self) -> bool:
        """Starts what the groups' windows allow; returns whether any was started.

        Only for a short time, so that those in flight get a turn before another large bucket's selection keeps this
        thread for milliseconds, and one turn serves many small ones.
        """
        if not self._waiting or self._holds():
            return False
        started = False
        until = time.monotonic() + _STARTING
        while ready := [g for g in self._groups.values() if self._may_start(g)]:
            for group in ready:
                task = group.backlog.popleft()
                self._waiting -= 1
                self._urgent -= not task.patient
                self._start(task, group)
            started = True
            if time.monotonic() >= until:
                break
        return started

    @staticmethod
    def _may_start(group: _Group) -> bool:
        return bool(group.backlog) and group.in_flight < IN_FLIGHT and group.backlog[0].key not in group.keys

    def _start(self, task: _Task, group: _Group) -> None:
        if self._broken is not None:
            self._call(task.on_error, self._after_failure(task.label), task.label)
            return
        group.in_flight += 1
        if task.key is not None:
            group.keys.add(task.key)
        self._active[task] = group
        task.deadline = time.monotonic() + self.timeout
        try:
            task.channel = group.open_channel()
            task.steps = task.make(task.channel)
        except BaseException as error:
            self._fail(task, error)
            return
        self._advance(task)

    def _leave(self, task: _Task, callback: Callable[[Any], None], argument: Any) -> None:
        group = self._active.pop(task)
        group.in_flight -= 1
        self._due = min(self._due, time.monotonic() + _TOGETHER if task.patient else 0.0)
        self._ended.append((task, group, callback, argument))

    def _call_back(self) -> None:
        """Tells whoever submitted them how collectives have ended; only then others may work in what they worked in."""
        ended, self._ended, self._due = self._ended, [], math.inf
        for task, group, callback, argument in ended:
            group.keys.discard(task.key)
            self._call(callback, argument, task.label)

    def _poll(self) -> bool:
        """Gives every task in flight a chance; returns whether any moved."""
        moved = False
        now = time.monotonic()
        tries = _TRIES if len(self._active) == 1 else 1
        for task in list(self._active):
            try:
                ready = task.ready(tries)
            except Exception as error:
                self._fail(task, error)
                return True
            if ready:
                moved = True
                if not self._advance(task):
                    return True
            elif now > task.deadline:
                self._fail(task, self._timed_out(task))
                return True
        return moved

    def _advance(self, task: _Task) -> bool:
        """Resumes a task; returns False if that broke the engine."""
        assert task.steps is not None
        try:
            task.waiting.extend(next(task.steps))
        except StopIteration as stop:
            self._leave(task, task.on_done, stop.value)
        except AgreedError as agreed:
            self._leave(task, task.on_error, agreed.cause)
        except BaseException as error:
            self._fail(task, error)
            return False
        return True

    def _fail(self, task: _Task, error: BaseException) -> None:
        """Fails one task with its cause and all others in flight with a reference to it."""
        self._call_back()
        self._broken = error
        for victim in list(self._active):
            # Closing lets a collective undo what it did. An error in that must not leave others waiting.
            for request in victim.channel.pending if victim.channel is not None else ():
                with contextlib.suppress(Exception):
                    request.cancel()
            if victim.steps is not None:
                with contextlib.suppress(Exception):
                    victim.steps.close()
            reason = error if victim is task else self._after_failure(victim.label)
            self._leave(victim, victim.on_error, reason)
        self._call_back()

    def _call(self, callback: Callable[[Any], None], argument: Any, label: str) -> None:
        """Calls back; an error in that breaks the engine, but does not stop it."""
        try:
            with torch.inference_mode(False):
                callback(argument)
        except BaseException as error:  # SystemExit too: this thread serves everybody
            self._broken = TransportError(f"{label}: its callback raised {type(error).__name__}: {error}")
            self._broken.__cause__ = error

    def _after_failure(self, label: str) -> SparseCommError:
        cause = self._broken
        error = TransportError(f"{label}: not exchanged, communication failed before: {cause}")
        error.__cause__ = cause
        return error

    def _timed_out(self, task: _Task) -> CommTimeout:
        stuck = ", ".join(r.describe() for r in task.waiting)
        return CommTimeout(
            f"rank {self.transport.rank}: {task.label} did not finish within {self.timeout:g} s; "
            f"still waiting for: {stuck}. Is that rank alive, and does it run the same training step? "
            "(SPARSECOMM_TIMEOUT sets the limit in seconds)"
        )
