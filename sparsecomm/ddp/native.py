"""Averages by torch.distributed itself (Gloo, NCCL), started from the hook as in plain DDP, without the engine.

Which steps go this way: `NativeSteps` in choice.py.

No header goes with such a sum, so a rank that cannot take part has no way to say so. It sums NaN instead, and nobody
waits. At the end of a step, ranks whose average begins with NaN compare notes through the engine: either all of them
raise that rank's error, or NaN came from a gradient and stays in the bucket, as in plain DDP. On a GPU nobody looks at
the average, since that would wait for the device; there a rank that cannot take part raises its error alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from sparsecomm.errors import TransportError

__all__ = ["NativeSum", "NativeSums"]


class Doubted(Protocol):
    """What a `NativeSum` asks its owner to do. Called on a thread of torch.distributed, or on the submitting one."""

    def release(self) -> bool:
        """Ends the engine's watch on the sum. Returns False if the engine has failed the batch meanwhile."""

    def finish_native(self) -> None:
        """Completes the batch."""

    def fail(self, error: BaseException) -> None:
        """Fails the batch."""

    def compare_notes(
        self, error: BaseException | None, done: Callable[[], None], fail: Callable[[BaseException], None]
    ) -> None:
        """Tells all ranks of this rank's error, if any; then calls `fail` if some rank has one, else `done`."""


@dataclass(slots=True, eq=False)
class NativeSum:
    """The sum of one batch by torch.distributed.

    Attributes:
        index: number of the batch.
        vector: gradients of the batch, shape (n,), n > 0. Mutated: becomes the average.
        owner: finishes or fails the batch.
        error: why this rank cannot take part; None if it can.
    """

    index: int
    vector: torch.Tensor
    owner: Doubted
    error: Exception | None = None

    def is_doubtful(self) -> bool:
        """Returns whether some rank may not have taken part. The same on all ranks."""
        return self.vector.is_cpu and bool(self.vector[0].isnan())


class NativeSums:
    """The sums of one state that torch.distributed has in flight.

    Ranks compare notes once a step, when its last batch was handed over and all sums have ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0
        self._complete = False  # whether the last batch of the step was handed over
        self._doubtful: list[NativeSum] = []

    def start(self, one: NativeSum, group: dist.ProcessGroup | None, size: int) -> None:
        """Starts a sum and returns at once. Collective, in the same order on all ranks.

        Args:
            one: the sum.
            group: the ranks; None for the default group.
            size: number of ranks.
        """
        one.vector.mul_(1.0 / size)  # before the sum, as in plain DDP: the same bits, and no overflow of float16
        with self._lock:
            self._in_flight += 1
            self._complete = False
        try:
            work: Any = dist.all_reduce(one.vector, group=group, async_op=True)
        except BaseException:
            with self._lock:
                self._in_flight -= 1
            raise
        work.get_future().then(lambda future: self._ended(one, future))

    def step_handed_over(self) -> None:
        """Notes that the last batch of a step was handed over."""
        self._settle(complete=True)

    def _ended(self, one: NativeSum, future: torch.futures.Future[Any]) -> None:
        """Ends a sum. Called on a thread of torch.distributed."""
        failure: Exception | None = None
        try:
            future.value()
        except Exception as error:
            failure = TransportError(f"the allreduce of torch.distributed failed: {error}")
            failure.__cause__ = error
        doubtful: list[NativeSum] = []
        try:
            if not one.owner.release():
                return
            if failure is not None:  # the others have failed as well, and the engine knows best who has left
                one.owner.compare_notes(failure, one.owner.finish_native, one.owner.fail)
            elif one.is_doubtful():
                doubtful.append(one)
            elif one.error is not None:
                one.owner.fail(one.error)
            else:
                one.owner.finish_native()
        finally:
            self._settle(ended=1, doubtful=doubtful)

    def _settle(self, *, complete: bool = False, ended: int = 0, doubtful: list[NativeSum] | None = None) -> None:
        """Changes the counts, and lets the ranks compare notes if the step has ended and left doubts."""
        with self._lock:
            self._in_flight -= ended
            self._complete |= complete
            self._doubtful += doubtful or []
            if self._in_flight or not self._complete or not self._doubtful:
                return
            found, self._doubtful = sorted(self._doubtful, key=lambda one: one.index), []
        first = next((one for one in found if one.error is not None), found[0])

        def done() -> None:
            for one in found:
                one.owner.finish_native()

        def fail(error: BaseException) -> None:
            for one in found:
                one.owner.fail(error)

        found[0].owner.compare_notes(first.error, done, fail)
