"""What other threads hand to the engine's, in order, without waking it for every small thing.

Two Python threads that both take the interpreter's lock for microseconds at a time wake each other again and again: on
1,000 buckets of 1 K elements, handed over one after the other, that cost more than exchanging them. So what is patient
rings no bell while its sender is at it, and waits until the sender pauses.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import Generic, TypeVar

__all__ = ["HOLD", "Inbox"]

T = TypeVar("T")

HOLD = 1e-3
"""Seconds to sleep while a sender is at it."""

_PAUSE = 500e-6  # seconds without another item after which a sender is not at it any more
_LONGEST = 50e-3  # seconds that a sender may be at it before what it has sent waits no longer


class Inbox(Generic[T]):
    """A queue with one reader."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        # Held unless it was rung. (SimpleQueue.get, given a short timeout, may wait for ever: CPython 3.11 works out a
        # negative rest when it was woken for an item that get_nowait had taken, and takes that for no limit.)
        self._bell = threading.Lock()
        self._bell.acquire()
        self._asleep = False
        self._began = 0.0
        self._last = 0.0

    def put(self, item: T, *, patient: bool = False) -> None:
        """Appends an item.

        Args:
            item: anything.
            patient: whether the reader need not be woken for it, unless it sleeps until there is something.
        """
        now = time.monotonic()
        if now - self._last > _PAUSE:
            self._began = now
        self._last = now
        self._items.append(item)
        # The reader looks for items after it has said that it sleeps, so one of both sees the other.
        if not patient or self._asleep:
            with contextlib.suppress(RuntimeError):  # it is ringing already
                self._bell.release()

    def take(self, wait: float | None) -> list[T]:
        """Returns all items in order.

        Args:
            wait: seconds to sleep at most, 0 for none; None sleeps until there is an item. A bell ends it.
        """
        if wait is None:
            self._asleep = True
            if not self._items:
                self._bell.acquire()
            self._asleep = False
        elif wait > 0.0:
            self._bell.acquire(timeout=wait)
        return [self._items.popleft() for _ in range(len(self._items))]

    def busy(self) -> bool:
        """Returns whether a sender is at it."""
        now = time.monotonic()
        return now - self._last < _PAUSE and now - self._began < _LONGEST
