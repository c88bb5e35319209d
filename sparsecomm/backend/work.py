"""An operation of the backend in progress, as torch.distributed sees it. It ends without the caller."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future, collect_all

from sparsecomm.errors import CommTimeout, TransportError

__all__ = ["EngineWork", "JoinedWork"]

_NO_LIMIT = timedelta(0)


class EngineWork(dist.Work):
    """One operation. It ends whether or not anybody keeps this object or waits.

    Args:
        label: Name of the operation in errors.
        outputs: Tensors that hold the result when it is complete.
    """

    def __init__(self, label: str, outputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.label = label
        self._outputs = list(outputs)
        self._error: BaseException | None = None
        self._source = -1
        self._is_over = False
        self._ending = threading.Lock()
        self._ended = Future()  # type: ignore[var-annotated]
        # Held until the operation has ended. An Event takes several times as long.
        self._gate = threading.Lock()
        self._gate.acquire()

    def succeed(self, source: int | None) -> None:
        """Completes the operation. Called on the engine's thread.

        Args:
            source: Group rank of the sender, for a message from any rank.
        """
        self._end(None, -1 if source is None else source)

    def fail(self, error: BaseException) -> None:
        """Ends the operation with an error, which `wait` raises. Called on any thread, more than once at will."""
        self._end(error, -1)

    def _end(self, error: BaseException | None, source: int) -> None:
        with self._ending:
            if self._is_over:
                return
            self._is_over = True
        self._error, self._source = error, source
        self._ended.set_result(None)
        self._gate.release()

    def wait(self, timeout: timedelta = _NO_LIMIT) -> bool:
        """Waits until the operation has ended.

        Args:
            timeout: Most time to wait; 0 waits until the operation ends, which has a deadline of its own. The
                operation goes on when the time is over.

        Raises:
            SparseCommError: the error that made the operation fail.
            CommTimeout: if the time is over.
        """
        seconds = timeout.total_seconds()
        if threading.current_thread().name == "sparsecomm-engine" and not self._ended.done():
            raise TransportError(f"{self.label}: a callback of another operation cannot wait for it")
        if not self._gate.acquire(timeout=seconds if seconds > 0 else -1):
            raise CommTimeout(f"{self.label} has not ended after {seconds:g} s of waiting")
        self._gate.release()
        self._raise()
        return True

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def synchronize(self) -> None:
        """Waits as `wait` does."""
        self.wait()

    def is_completed(self) -> bool:
        """Returns whether the operation has ended, also with an error."""
        return bool(self._ended.done())

    def is_success(self) -> bool:
        """Returns whether the operation has ended without an error."""
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        """Returns the error of the operation; None if there is none."""
        return self._error

    def result(self) -> list[torch.Tensor]:
        """Returns the tensors that hold the result."""
        return self._outputs

    def get_future(self) -> Future[Any]:
        """Returns a future of the output tensors. Its callbacks run on the engine's thread."""

        def value(_: Future[Any]) -> list[torch.Tensor]:
            self._raise()
            return self._outputs

        return self._ended.then(value)

    def source_rank(self) -> int:
        """Returns the group rank whose message has arrived, of a receive from any rank."""
        return self._source

    def _source_rank(self) -> int:
        return self._source


class JoinedWork(dist.Work):
    """Several operations as one.

    Args:
        works: The operations.
    """

    def __init__(self, works: Sequence[dist.Work]) -> None:
        super().__init__()
        self._works = list(works)

    def wait(self, timeout: timedelta = _NO_LIMIT) -> bool:
        """Waits for all operations; `timeout` is for each."""
        for work in self._works:
            work.wait(timeout)
        return True

    def synchronize(self) -> None:
        """Waits for all operations."""
        self.wait()

    def is_completed(self) -> bool:
        """Returns whether all operations have ended."""
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        """Returns whether all operations have ended without an error."""
        return all(work.is_success() for work in self._works)

    def exception(self) -> BaseException | None:
        """Returns the first error."""
        return next((e for e in (work.exception() for work in self._works) if e is not None), None)

    def result(self) -> list[torch.Tensor]:
        """Returns the tensors that hold the results."""
        return [tensor for work in self._works for tensor in work.result()]

    def get_future(self) -> Future[Any]:
        """Returns a future of all output tensors."""
        futures: list[Future[Any]] = [work.get_future() for work in self._works]
        unpack: Callable[[Any], Any] = lambda done: [t for one in done.value() for t in one.value()]  # noqa: E731
        return collect_all(futures).then(unpack)
