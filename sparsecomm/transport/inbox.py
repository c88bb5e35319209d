"""The queue that hands items from other threads to the engine's thread, in order, without waking it for each item.

Two Python threads that both take the interpreter's lock for microseconds at a time wake each other again and again.
With 1,000 buckets of 1 K elements, handed over one after the other, that cost more than the exchanges themselves. So a
patient item does not wake the reader while its sender is busy. It waits until the sender pauses.
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
"""Seconds that the reader sleeps while a sender is busy."""

_NAP = 0.25  # seconds
_PAUSE = 500e-6  # seconds without another item after which a sender is no longer busy
_LONGEST = 50e-3  # seconds that a sender may be busy before its items no longer wait


class Inbox(Generic[T]):
    """A queue with one reader and any number of senders."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        # A lock that is held unless the bell was rung. SimpleQueue.get is no substitute, because it may wait for ever
        # when given a short timeout: if CPython 3.11 is woken for an item that get_nowait has already taken, it
        # computes a negative remaining time and treats it as no limit.
        self._bell = threading.Lock()
        self._bell.acquire()
        self._asleep = False
        self._began = 0.0
        self._last = 0.0

    def put(self, item: T, *, patient: bool = False) -> None:
        """Appends an item.

        Args:
            item: The item.
            patient: Whether to leave a reader asleep that has set itself a limit.
        """
        now = time.monotonic()
        if now - self._last > _PAUSE:
            self._began = now
        self._last = now
        self._items.append(item)
        # The reader sets `_asleep` before it looks for items, so either it finds this item or this thread wakes it.
        if not patient or self._asleep:
            with contextlib.suppress(RuntimeError):  # the bell was rung already
                self._bell.release()

    def take(self, wait: float | None) -> list[T]:
        """Removes all items and returns them in order.

        Args:
            wait: Most seconds to sleep before that. An item that is not patient ends the sleep. 0 does not sleep; None
                takes a nap of a quarter of a second, which any item ends.
        """
        if wait is None:
            self._asleep = True
            if not self._items:
                self._bell.acquire(timeout=_NAP)
            self._asleep = False
        elif wait > 0.0:
            self._bell.acquire(timeout=wait)
        return [self._items.popleft() for _ in range(len(self._items))]

    def busy(self) -> bool:
        """Returns whether a sender is still adding items."""
        now = time.monotonic()
        return now - self._last < _PAUSE and now - self._began < _LONGEST
