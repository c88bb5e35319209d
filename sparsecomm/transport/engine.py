"""The one thread of a process that communicates: a progress loop over collectives written as generators.

Collectives start in the order in which they were submitted. Many may be in flight, and each is resumed when the
requests that it waits for are complete. So send/receive pairs, several buckets and several states cannot deadlock each
other, and timeouts and failures surface in one place.

At most 32 collectives of a group are in flight. Two with the same key follow each other, because they share buffers.
Each group has a window of its own, because only the ranks of one group submit in the same order.

Threads that wake each other all the time cost more than small exchanges do. A patient task (a small bucket that is not
the last of its backward pass) does not wake the engine while the thread that submits is busy, and its callback may
wait up to 20 ms for others. A task that is not patient ends all waiting. The order never changes.

Requests of Gloo cannot be polled, so there the engine waits for the oldest task first. All ranks do so in the same
order, hence no rank waits for one that waits for it.

Collectives run in torch's inference mode, which halves the cost of slicing a tensor: a bucket takes dozens of slices.
Callbacks run outside of it.

Now and then the engine looks for notes of ranks that have left. When a deadline is over, it asks who is late
(`attendance.py`).
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any
from weakref import WeakSet

import torch

from sparsecomm.errors import ConfigError, TransportError
from sparsecomm.transport.attendance import LISTEN, Attendance
from sparsecomm.transport.backoff import Backoff
from sparsecomm.transport.base import AgreedError, Channel, CollectiveSteps, Link, Transport
from sparsecomm.transport.breakage import EVERYTHING, Breakage
from sparsecomm.transport.inbox import HOLD, Inbox
from sparsecomm.transport.notes import Note
from sparsecomm.transport.task import Outside, Running, Task, TaskGroup

__all__ = ["Engine"]

_TRIES = 20  # tests of one request in a row, because a turn of the loop costs ten times as much as a test
_START_BUDGET = 300e-6  # seconds of starting tasks before those in flight get a turn again
_CALLBACK_BATCH = 20e-3  # seconds that a patient task's callback, which wakes a thread, may wait for those of others
_FROZEN = 5.0  # seconds between two turns after which this process must have been stopped, and its deadlines wait
_LEAVING = 2.0  # seconds for the thread to tell that this rank leaves


class Engine:
    """Runs collectives of one transport on one background thread.

    Every rank of a group must submit the same collectives in the same order. A failure that all ranks have agreed on
    (`AgreedError`) fails that collective alone. Any other failure breaks the domain of the task, and that of domain 0
    breaks all: every collective in flight, and every one submitted later, fails with that cause, because the ranks no
    longer agree on the collective in progress.

    Args:
        transport: The transport. From now on only the engine's thread may use it.
        timeout: Seconds that a collective may take from its start.
        link: Link between hosts, the same on all ranks. None has each group measure its own when it needs it.

    Attributes:
        transport: The transport.
        timeout: Seconds that a collective may take from its start.
        last_label: Label of the collective that was submitted last; empty before the first one.
        submitters: Threads that have submitted collectives.
        breakage: What has failed so far.
    """

    def __init__(self, transport: Transport, *, timeout: float = 300.0, link: Link | None = None) -> None:
        if not timeout > 0:
            raise ConfigError(f"timeout must be a positive number of seconds, got {timeout!r}")
        self.transport = transport
        self.timeout = timeout
        self._link = link
        self._inbox: Inbox[Task | None] = Inbox()
        self._active: dict[Running, None] = {}  # in order of submission
        self._waiting = 0  # tasks in backlogs
        self._urgent = 0  # tasks in backlogs that are not patient
        self._ended: list[tuple[Running, Callable[[Any], None], Any]] = []  # with a callback that is still due
        self._callbacks_due = math.inf  # time at which the first of these callbacks must be called
        self.breakage = Breakage()
        self._groups: dict[tuple[tuple[int, ...] | None, int], TaskGroup] = {}
        self._attendance = Attendance(transport, timeout)
        self._farewell: Note | None = None
        self.last_label = ""
        self.submitters: WeakSet[threading.Thread] = WeakSet()
        self._turned = 0.0  # time of the last turn
        self._look_every = min(LISTEN, timeout / 10)
        self._looked = 0.0
        self._closing = False
        self._over = self._died = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="sparsecomm-engine", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> None:
        """Queues a collective and returns at once. Exactly one callback of the task is called, on the engine's thread.

        Raises:
            TransportError: if the engine is closed, or if this process is a fork of the engine's process.
        """
        if os.getpid() != self._pid:
            raise TransportError(
                f"{task.label}: process {os.getpid()} was forked from rank {self.transport.rank} (process {self._pid}) "
                "and cannot communicate; only the process that called sparsecomm.init() can"
            )
        if self._closing or self._over:
            raise TransportError(f"{task.label}: submitted after the engine of rank {self.transport.rank} was closed")
        self.last_label = task.label
        self.submitters.add(threading.current_thread())
        self._inbox.put(task, patient=task.patient)

    def call(
        self, label: str, make: Callable[[Channel], CollectiveSteps[Any]], *, group: tuple[int, ...] | None = None
    ) -> Any:
        """Submits a collective and blocks until it has ended. Collective.

        Args:
            label: Name of the collective in errors.
            make: Called with the channel of the collective; returns its generator.
            group: World ranks that take part, in order; None for all ranks.

        Returns:
            The result of the generator.

        Raises:
            SparseCommError: the error that made the collective fail.
        """
        if threading.current_thread() is self._thread:
            raise TransportError(f"{label}: the engine's own thread (a callback) cannot wait for a collective")
        done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self.submit(Task(label, make, lambda r: done.put((r, None)), lambda e: done.put((None, e)), group=group))
        result, error = done.get()
        if error is not None:
            raise error
        return result

    def watch(self, outside: Outside) -> None:
        """Watches a collective outside of this engine, until it is released: fails it if it cannot end."""
        self.last_label = outside.label
        self.submitters.add(threading.current_thread())
        self._attendance.outside[outside] = None

    def release(self, outside: Outside) -> bool:
        """Ends the watch on a collective. Returns whether it was watched; if not, it has been failed."""
        return self._attendance.outside.pop(outside, self) is None

    def close(self, timeout: float = 10.0) -> bool:
        """Stops the thread when all submitted tasks have ended. Waits at most `timeout` seconds for that. Idempotent.

        Returns:
            Whether all tasks have ended and the thread has stopped without an error.
        """
        if os.getpid() != self._pid:
            return True
        if not self._closing:
            self._closing = True
            self._inbox.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive() and not self._died

    def leave(self, note: Note) -> None:
        """Fails all tasks, tells the other ranks that this one leaves, and stops the thread. Waits two seconds at most.

        Args:
            note: What to tell.
        """
        self._farewell = note
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._closing = True
            self._inbox.put(None)
            if self.transport.blocking:  # the thread may wait for long, and any thread may tell
                self.transport.tell(note)
            self._thread.join(_LEAVING)
        else:
            self.transport.tell(note)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._loop()
        except BaseException as error:  # a bug in the engine must not leave callers waiting for this thread
            self._died = True
            self._call_back()
            self.breakage.add(EVERYTHING, error)
            for task in [*(r.task for r in self._active), *(t for g in self._groups.values() for t in g.backlog)]:
                self._call(task.on_error, self.breakage.refusal(task.label, task.domain), task.label)
        self._over = True
        self._fail_late()
        if self._farewell is not None and not self.transport.blocking:
            with contextlib.suppress(Exception):
                self.transport.tell(self._farewell)
        with contextlib.suppress(Exception):
            self.transport.close()

    def _loop(self) -> None:
        backoff = Backoff()
        stop = False
        while not (stop and not self._active and not self._waiting):
            idle = not self._active and not self._waiting and not stop
            holds = self._waiting_for_more() and not self._active
            stop |= self._take_new(None if idle else HOLD if holds else backoff.pause())
            if self._farewell is not None and self.breakage.cause(EVERYTHING) is None:
                self._fail(None, TransportError(f"rank {self.transport.rank} leaves: {self._farewell.text}"))
            moved = self._start_backlog()
            self._excuse_absence(idle)
            moved |= self._poll()
            moved |= self._look_for_trouble()
            alone = not self._active and not self._waiting
            if self._ended and (alone or not moved or time.monotonic() >= self._callbacks_due):
                self._call_back()
                moved = True
            if moved or idle:
                backoff.news()

    def _fail_late(self) -> None:
        """Fails the tasks that were submitted while the thread was ending."""
        for task in self._inbox.take(0.0):
            if task is not None:
                error = TransportError(f"{task.label}: submitted while the engine was closing")
                self._call(task.on_error, error, task.label)

    def _take_new(self, wait: float | None) -> bool:
        """Moves submitted tasks to the backlogs, after a sleep. Returns whether the engine was asked to stop."""
        stop = False
        for task in self._inbox.take(wait):
            if task is None:
                stop = True
                continue
            name = task.group, task.lane
            if name not in self._groups:
                self._groups[name] = TaskGroup(self.transport, task.group, self._link, lane=task.lane)
            self._groups[name].backlog.append(task)
            self._waiting += 1
            self._urgent += not task.patient
        return stop

    def _waiting_for_more(self) -> bool:
        """Returns whether all waiting tasks are patient and more are being submitted."""
        return bool(self._waiting) and not self._urgent and self._inbox.busy()

    def _start_backlog(self) -> bool:
        """Starts tasks as far as the windows of their groups allow. Returns whether any was started.

        Stops after `_START_BUDGET` seconds. So tasks in flight get a turn before the selection of another large bucket
        keeps this thread busy for milliseconds, and one turn still starts many small tasks.
        """
        if not self._waiting or self._waiting_for_more():
            return False
        started = False
        until = time.monotonic() + _START_BUDGET
        while ready := [g for g in self._groups.values() if g.may_start()]:
            for group in ready:
                task = group.backlog.popleft()
                self._waiting -= 1
                self._urgent -= not task.patient
                self._start(task, group)
            started = True
            if time.monotonic() >= until:
                break
        return started

    def _start(self, task: Task, group: TaskGroup) -> None:
        if self.breakage.latest is not None and self.breakage.cause(task.domain) is not None:
            self._call(task.on_error, self.breakage.refusal(task.label, task.domain), task.label)
            return
        group.in_flight += 1
        if task.key is not None:
            group.keys.add(task.key)
        running = Running(task, group, time.monotonic() + (task.timeout or self.timeout))
        self._active[running] = None
        try:
            running.channel = group.open_channel(task.tag)
            running.steps = task.make(running.channel)
        except BaseException as error:
            self._fail(running, error)
            return
        self._advance(running)

    def _end(self, running: Running, callback: Callable[[Any], None], argument: Any) -> None:
        """Takes a task out of flight. Its callback is called later, together with those of other tasks."""
        del self._active[running]
        running.group.end(running)
        self._callbacks_due = min(
            self._callbacks_due, time.monotonic() + _CALLBACK_BATCH if running.task.patient else 0.0
        )
        self._ended.append((running, callback, argument))

    def _call_back(self) -> None:
        """Calls the callbacks that are due. Only then may tasks of the same keys start."""
        ended, self._ended, self._callbacks_due = self._ended, [], math.inf
        for running, callback, argument in ended:
            running.group.keys.discard(running.task.key)
            self._call(callback, argument, running.task.label)

    def _poll(self) -> bool:
        """Tests the requests of every task in flight and resumes those that are ready. Returns whether any was."""
        moved = False
        tries = _TRIES if len(self._active) == 1 else 1
        for running in list(self._active):
            try:
                ready = running.ready(tries)
            except Exception as error:
                self._fail(running, self._explained(running, error))
                return True
            if ready:
                moved = True
                if not self._advance(running):
                    return True
        return moved

    def _look_for_trouble(self) -> bool:
        """Fails a collective that cannot end, because a rank has left or is late. Returns whether there is one."""
        now = time.monotonic()
        if not self._active and not self._attendance.outside:
            self._looked = now
        if now - self._looked < self._look_every:
            return False
        self._looked = now
        try:
            trouble = self._attendance.check(self._active, now)
        except Exception as error:
            self._fail(next(iter(self._active), None), error)
            return True
        if trouble is not None:
            self._fail(*trouble)
            self._looked = 0.0  # other domains may be in the same trouble
        return trouble is not None

    def _excuse_absence(self, idle: bool) -> None:
        """Moves the deadlines by the time for which this process was stopped: the other ranks were not late then."""
        now = time.monotonic()
        away, self._turned = now - self._turned, now
        if away > _FROZEN and not idle and not self.transport.blocking:
            self._attendance.excuse(self._active, away)

    def _advance(self, running: Running) -> bool:
        """Resumes a task. Returns False if that broke its domain."""
        assert running.steps is not None
        try:
            running.waiting.extend(next(running.steps))
        except StopIteration as stop:
            self._end(running, running.task.on_done, stop.value)
        except AgreedError as agreed:
            self._end(running, running.task.on_error, agreed.cause)
        except BaseException as error:
            self._fail(running, self._explained(running, error))
            return False
        return True

    def _explained(self, running: Running, error: BaseException) -> BaseException:
        """Returns the error to report for an error of the transport: that a rank has left, if that is why."""
        with contextlib.suppress(Exception):  # the transport may be past telling why
            return self._attendance.explain(running, error)
        return error

    def _fail(self, failed: Running | Outside | None, error: BaseException) -> None:
        """Fails one task with `error`, and all of its domain in flight with an error that refers to it."""
        self._call_back()
        domain = failed.task.domain if isinstance(failed, Running) else EVERYTHING
        self.breakage.add(domain, error)
        for one in list(self._attendance.outside) if domain == EVERYTHING else ():
            if self.release(one):
                reason = error if one is failed else self.breakage.refusal(one.label, domain)
                self._call(one.on_error, reason, one.label)
        for victim in [r for r in self._active if domain in (EVERYTHING, r.task.domain)]:
            # Closing the generator lets the collective undo its changes. An error there must not leave others waiting.
            if victim.channel is not None:
                self.breakage.abandon(victim.channel.pending, blocking=self.transport.blocking)
            if victim.steps is not None:
                with contextlib.suppress(Exception):
                    victim.steps.close()
            reason = error if victim is failed else self.breakage.refusal(victim.label, domain)
            self._end(victim, victim.task.on_error, reason)
        self._call_back()

    def _call(self, callback: Callable[[Any], None], argument: Any, label: str) -> None:
        """Calls a callback. An error in it breaks the engine but does not stop the thread."""
        try:
            with torch.inference_mode(False):
                callback(argument)
        except BaseException as error:  # SystemExit too, since other tasks still need this thread
            failure = TransportError(f"{label}: its callback raised {type(error).__name__}: {error}")
            failure.__cause__ = error
            self.breakage.add(EVERYTHING, failure)
