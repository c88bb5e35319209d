"""Sums over a torch process group, driven like messages: for the ranks of a node, by NCCL on GPUs or by Gloo."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from sparsecomm.errors import ConfigError, TransportError
from sparsecomm.transport.base import Request

__all__ = ["GroupSum"]

_queues: WeakKeyDictionary[Any, deque[GroupSum]] = WeakKeyDictionary()
"""By process group, the sums that are to be started over it, in order."""


class GroupSum:
    """One sum over a process group, at one of its ranks.

    The ranks of a process group must start the same collectives in the same order. Exchanges begin in the same order on
    all ranks but get here in any, so each queues up when it begins. As a `Request` it is complete when its turn comes.

    Args:
        group: the process group.
        root: world rank that receives the sum.
        members: world ranks that are to take part.
        blocking: whether other requests of the same ranks wait when they are tested: then this must, too.

    Raises:
        ConfigError: if these are not the ranks of the group.
    """

    def __init__(self, group: dist.ProcessGroup, root: int, members: Collection[int], *, blocking: bool) -> None:
        found = dist.get_process_group_ranks(group)
        if set(found) != set(members):
            raise ConfigError(f"inner_group has the ranks {sorted(found)}, the node has {sorted(members)}")
        self._group, self._root, self._blocking = group, root, blocking
        self._queue = _queues.setdefault(group, deque())
        self._queue.append(self)
        self._device = torch.device("cpu")
        if "nccl" in str(dist.get_backend(group)):
            self._device = torch.device("cuda", torch.cuda.current_device())

    def test(self) -> bool:
        """Returns whether it is this sum's turn."""
        return self._queue[0] is self

    def describe(self) -> str:
        """See `Request.describe`."""
        return "its turn in the inner process group"

    def cancel(self) -> None:
        """See `Request.cancel`."""

    def start(self, data: torch.Tensor) -> Request:
        """Starts to sum, and gives the turn to the next.

        Args:
            data: float32 in host memory. Mutated: the sum at the root, anything elsewhere.

        Raises:
            TransportError: if the group refuses.
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
        """Gives the turn up, if it is still queued."""
        if self in self._queue:
            self._queue.remove(self)


class _Summing:
    """A sum in progress."""

    def __init__(self, work: Any, staged: torch.Tensor, data: torch.Tensor, blocking: bool) -> None:
        self._work, self._staged, self._data, self._blocking = work, staged, data, blocking

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

    def describe(self) -> str:
        return f"sum of {self._data.numel()} elements over the inner process group"

    def cancel(self) -> None:
        pass
