"""Sums over a torch process group of the ranks of a node, by NCCL on GPUs or by Gloo, polled as requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from typing_extensions import override

from sparsecomm.errors import ConfigError, TransportError
from sparsecomm.transport.base import Request

__all__ = ["GroupSum"]

_queues: WeakKeyDictionary[Any, deque[GroupSum]] = WeakKeyDictionary()
"""For each process group, the sums that have not started yet, in order."""


class GroupSum(Request):
    """One sum over a process group, at one of its ranks. As a `Request` it is complete when its turn comes.

    The ranks of a process group must start the same collectives in the same order. Exchanges begin in the same order on
    all ranks but reach their sum in any order. So each exchange enters a queue when it begins.

    Args:
        group: The process group.
        root: World rank that receives the sum.
        members: World ranks that take part.
        blocking: Whether `Request.test` waits on the transport of the same ranks; if so, the sum must wait as well.

    Raises:
        ConfigError: if `members` are not the ranks of the group.
    """

    def __init__(self, group: dist.ProcessGroup, root: int, members: Collection[int], *, blocking: bool) -> None:
        found = dist.get_process_group_ranks(group)
        if set(found) != set(members):
            raise ConfigError(f"inner_group has the ranks {sorted(found)}, the node has {sorted(members)}")
        self.peer = None
        self._group, self._root, self._blocking = group, root, blocking
        self._queue = _queues.setdefault(group, deque())
        self._queue.append(self)
        self._device = torch.device("cpu")
        if "nccl" in str(dist.get_backend(group)):
            self._device = torch.device("cuda", torch.cuda.current_device())

    @override
    def test(self) -> bool:
        """Returns whether this sum is the next to start."""
        return self._queue[0] is self

    @override
    def describe(self) -> str:
        return "its turn in the inner process group"

    @override
    def cancel(self) -> None:
        pass

    def start(self, data: torch.Tensor) -> Request:
        """Starts the sum and leaves the queue.

        Args:
            data: float32 in host memory. Mutated: holds the sum at the root and undefined values at other ranks.

        Raises:
            TransportError: if the process group cannot start the sum.
        """
        staged = data.to(self._device)
        try:
            work = dist.reduce(staged, self._root, group=self._group, async_op=True)
        except RuntimeError as error:
            raise TransportError(f"the sum over the inner process group failed: {error}") from error
        finally:
            self.leave()
        return _Summing(work, staged, data, self._blocking)

    def leave(self) -> None:
        """Leaves the queue, if the sum is still in it."""
        if self in self._queue:
            self._queue.remove(self)


class _Summing(Request):
    """A sum in progress."""

    def __init__(self, work: Any, staged: torch.Tensor, data: torch.Tensor, blocking: bool) -> None:
        self.peer = None
        self._work, self._staged, self._data, self._blocking = work, staged, data, blocking

    @override
    def test(self) -> bool:
        if self._work is None:
            return True
        if not self._blocking and not self._work.is_completed():
            return False
        try:
            self._work.wait()
        except RuntimeError as error:
            raise TransportError(f"the sum over the inner process group failed: {error}") from error
        self._work = None
        if self._staged is not self._data:
            self._data.copy_(self._staged)
        return True

    @override
    def describe(self) -> str:
        return f"sum of {self._data.numel()} elements over the inner process group"

    @override
    def cancel(self) -> None:
        pass
