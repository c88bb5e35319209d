"""A store for torch.distributed whose ranks connect to rank 0 only when they use it.

Our process groups need no store. Others do: a Gloo group beside ours, torch's barrier after the start, checkpoints.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store

__all__ = ["LazyStore"]


class LazyStore(Store):
    """A store that is made when it is first used.

    Methods have the names by which torch's C++ calls them.

    Args:
        make: Makes the store.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self._make = make
        self._made: Any = None
        self._limit: timedelta | None = None
        self._lock = threading.Lock()

    @property
    def _store(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = self._make()
                if self._limit is not None:
                    self._made.set_timeout(self._limit)
            return self._made

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets the time that `get` and `wait` may take."""
        self._limit = timeout
        if self._made is not None:
            self._made.set_timeout(timeout)

    def set(self, key: str, value: Any) -> None:
        """Sets a key."""
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """Waits for a key and returns its value."""
        return bytes(self._store.get(key))

    def compare_set(self, key: str, expected_value: Any, desired_value: Any) -> bytes:
        """Sets a key if it has the expected value; returns its value then."""
        return bytes(self._store.compare_set(key, expected_value, desired_value))

    def add(self, key: str, value: int) -> int:
        """Adds to a number and returns the sum."""
        return int(self._store.add(key, value))

    def deleteKey(self, key: str) -> bool:
        """Deletes a key."""
        return bool(self._store.delete_key(key))

    def getNumKeys(self) -> int:
        """Returns the number of keys."""
        return int(self._store.num_keys())

    def check(self, keys: list[str]) -> bool:
        """Returns whether all keys are set."""
        return bool(self._store.check(keys))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Waits until all keys are set."""
        self._store.wait(keys) if timeout is None else self._store.wait(keys, timeout)

    def append(self, key: str, value: Any) -> None:
        """Appends to the value of a key."""
        self._store.append(key, value)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Waits for several keys and returns their values."""
        return [bytes(value) for value in self._store.multi_get(keys)]

    def multi_set(self, keys: list[str], values: Any) -> None:
        """Sets several keys."""
        self._store.multi_set(keys, values)

    def has_extended_api(self) -> bool:
        """Returns whether `append`, `multi_get` and `multi_set` work."""
        return True

    def clone(self) -> Any:
        """Returns a store with the same keys."""
        return self

    num_keys = getNumKeys
    delete_key = deleteKey
