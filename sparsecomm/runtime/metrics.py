"""Counters and times of exchanges, by bucket, by step and in total. Nothing here prints."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from time import perf_counter

__all__ = ["BucketReport", "Metrics", "Recorder", "StepCallback"]


@dataclass(slots=True)
class BucketReport:
    """Costs of the exchange of one bucket on this rank.

    Attributes:
        bucket: Number of the bucket.
        step: Training step.
        numel: Elements of the bucket.
        nnz: Nonzeros that this rank sent; `numel` if the exchange was dense.
        bytes_sent: Bytes that this rank sent, headers and sizes included.
        bytes_received: Bytes that this rank received.
        dense_bytes: Bytes that this rank would have sent in a ring allreduce of float32.
        nonfinite: Elements that were NaN or infinite on this rank.
        skipped: 1 if the bucket became NaN on all ranks because of such elements on some rank, else 0.
        select_seconds: Seconds to accumulate and select.
        encode_seconds: Seconds to encode and to store rounding errors.
        wait_seconds: Seconds from the first message to the last.
        apply_seconds: Seconds to decode, check and reduce into the bucket.
    """

    bucket: int
    step: int
    numel: int
    nnz: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    dense_bytes: int = 0
    nonfinite: int = 0
    skipped: int = 0
    select_seconds: float = 0.0
    encode_seconds: float = 0.0
    wait_seconds: float = 0.0
    apply_seconds: float = 0.0


@dataclass(slots=True)
class Metrics:
    """Sums over all exchanges of a state on this rank. Further attributes are the sums of those of `BucketReport`.

    Attributes:
        steps: Steps that communicated, i.e. backward passes that the optimizer sees.
        buckets: Number of exchanges.
        communication_seconds: Seconds from the hand-over of a step's first bucket to the end of its last exchange.
        exposed_seconds: Seconds from the hand-over of a step's last bucket to the end of its last exchange. This is the
            time that communication adds to a step; all other communication overlaps with the backward pass.
    """

    steps: int = 0
    buckets: int = 0
    numel: int = 0
    nnz: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    dense_bytes: int = 0
    nonfinite: int = 0
    skipped: int = 0
    select_seconds: float = 0.0
    encode_seconds: float = 0.0
    wait_seconds: float = 0.0
    apply_seconds: float = 0.0
    communication_seconds: float = 0.0
    exposed_seconds: float = 0.0

    @property
    def ratio(self) -> float:
        """Compression ratio: dense bytes over bytes on the wire, headers included. 1.0 if nothing was sent."""
        return self.dense_bytes / self.bytes_sent if self.bytes_sent else 1.0

    @property
    def density(self) -> float:
        """Fraction of the elements that were sent. 1.0 if nothing was exchanged."""
        return self.nnz / self.numel if self.numel else 1.0

    def add(self, report: BucketReport) -> None:
        """Adds the exchange of one bucket. Mutates self."""
        self.buckets += 1
        self.numel += report.numel
        self.nnz += report.nnz
        self.bytes_sent += report.bytes_sent
        self.bytes_received += report.bytes_received
        self.dense_bytes += report.dense_bytes
        self.nonfinite += report.nonfinite
        self.skipped += report.skipped
        self.select_seconds += report.select_seconds
        self.encode_seconds += report.encode_seconds
        self.wait_seconds += report.wait_seconds
        self.apply_seconds += report.apply_seconds

    def merge(self, other: Metrics) -> None:
        """Adds the sums of other metrics. Mutates self."""
        for f in fields(other):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


StepCallback = Callable[[int, Metrics], None]
"""Callback that gets the number of a step and its metrics."""


class Recorder:
    """Adds up the reports of exchanges. The thread that hands buckets over and the engine's thread both call it.

    Attributes:
        callbacks: Called after every step with its number and its metrics, on the engine's thread.
    """

    def __init__(self) -> None:
        self.callbacks: list[StepCallback] = []
        self._lock = threading.Lock()
        self._total = Metrics()
        self._last_step = Metrics()
        self._buckets: dict[int, BucketReport] = {}
        self._open: dict[int, Metrics] = {}
        self._submitted: dict[int, int] = {}
        self._first: dict[int, float] = {}
        self._handed_over: dict[int, float] = {}

    def submitted(self, step: int, *, last: bool) -> None:
        """Records that a bucket of this step was handed over. `last` says whether it was the last of the step."""
        with self._lock:
            now = perf_counter()
            self._submitted[step] = self._submitted.get(step, 0) + 1
            self._first.setdefault(step, now)
            if last:
                self._handed_over[step] = now

    def finished(self, report: BucketReport, *, close: Callable[[Metrics], None] | None = None) -> None:
        """Adds the report of one bucket, and closes the step if this was its last bucket to finish.

        Args:
            report: Report of the bucket.
            close: Called before the callbacks with the sums of the step, if this closed the step.
        """
        step = report.step
        with self._lock:
            self._buckets[report.bucket] = report
            current = self._open.setdefault(step, Metrics())
            current.add(report)
            if step not in self._handed_over or step not in self._submitted or current.buckets < self._submitted[step]:
                return
            del self._open[step], self._submitted[step]
            current.steps = 1
            now = perf_counter()
            current.communication_seconds = now - self._first.pop(step)
            current.exposed_seconds = now - self._handed_over.pop(step)
            self._last_step = current
            self._total.merge(current)
        if close is not None:
            close(current)
        for callback in self.callbacks:
            try:
                callback(step, replace(current))
            except Exception as error:
                warnings.warn(f"a callback of SparseState.on_step failed at step {step}: {error!r}", stacklevel=2)

    def abandon(self, step: int) -> None:
        """Forgets a step in which a bucket failed."""
        with self._lock:
            for entries in (self._open, self._submitted, self._first, self._handed_over):
                entries.pop(step, None)

    def total(self) -> Metrics:
        """Returns the sums over all finished steps."""
        with self._lock:
            return replace(self._total)

    def last_step(self) -> Metrics:
        """Returns the sums over the last finished step."""
        with self._lock:
            return replace(self._last_step)

    def buckets(self) -> dict[int, BucketReport]:
        """Returns the last report of each bucket, by bucket number."""
        with self._lock:
            return {i: replace(r) for i, r in sorted(self._buckets.items())}
