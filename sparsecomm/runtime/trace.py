"""Measures the stages of exchanges, for reports, for torch.profiler and for a timeline file per rank."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import torch

from sparsecomm.errors import LaunchError
from sparsecomm.runtime.metrics import BucketReport

__all__ = ["Stage", "Timeline", "close_timeline", "open_timeline"]

_MOST_EVENTS = 2_000_000  # about 200 bytes each in the file


class Timeline:
    """Collects spans and writes them in Chrome's trace event format, which Perfetto and chrome://tracing open.

    A rank appears as a process, and a bucket as a track. Times come from the clock of the rank's machine, so files of
    different machines are shifted by the difference of the clocks.

    Args:
        path: File to write. The rank is put before the suffix, e.g. trace.json becomes trace.rank0.json.
        rank: This rank.

    Attributes:
        path: The file, with the rank in its name.
        dropped: Number of spans that were dropped because the timeline was full.
    """

    def __init__(self, path: str, rank: int) -> None:
        given = Path(path)
        self.path = given.with_name(f"{given.stem}.rank{rank}{given.suffix or '.json'}")
        self._rank = rank
        self._epoch = time.time() - perf_counter()
        self._events: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self.dropped = 0

    def add(self, name: str, start: float, end: float, *, bucket: int, step: int, **arguments: object) -> None:
        """Adds a span.

        Args:
            name: Name of the stage.
            start: Value of `perf_counter` at the start, in seconds.
            end: Value of `perf_counter` at the end, in seconds.
            bucket: Bucket, whose track shows the span.
            step: Training step, shown with the span.
            arguments: Further values to show with the span.
        """
        event = {
            "name": name,
            "cat": "sparsecomm",
            "ph": "X",
            "ts": (self._epoch + start) * 1e6,
            "dur": (end - start) * 1e6,
            "pid": self._rank,
            "tid": bucket,
            "args": {"step": step, **arguments},
        }
        with self._lock:
            if len(self._events) < _MOST_EVENTS:
                self._events.append(event)
            else:
                self.dropped += 1

    def write(self) -> None:
        """Writes the file atomically."""
        with self._lock:
            tracks = sorted({e["tid"] for e in self._events})
            names: list[dict[str, Any]] = [
                {"name": "process_name", "ph": "M", "pid": self._rank, "args": {"name": f"rank {self._rank}"}}
            ]
            names += [
                {"name": "thread_name", "ph": "M", "pid": self._rank, "tid": t, "args": {"name": f"bucket {t}"}}
                for t in tracks
            ]
            document = {"traceEvents": names + self._events, "otherData": {"dropped": self.dropped}}
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(document))
        os.replace(part, self.path)


_timeline: Timeline | None = None


def open_timeline(rank: int) -> None:
    """Starts a timeline if the environment variable SPARSECOMM_TIMELINE names a file.

    Raises:
        LaunchError: if the file cannot be written. The check is made now, because at the end the run would be lost.
    """
    global _timeline
    _timeline = None
    path = os.environ.get("SPARSECOMM_TIMELINE")
    if not path:
        return
    folder = Path(path).parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise LaunchError(f"rank {rank}: SPARSECOMM_TIMELINE={path}: {folder} is not a folder that can be written to")
    _timeline = Timeline(path, rank)


def close_timeline() -> None:
    """Writes the timeline, if there is one."""
    global _timeline
    if _timeline is not None:
        _timeline.write()
        _timeline = None


class Stage:
    """One stage of an exchange: a context manager that adds its seconds to the report's ``<name>_seconds``.

    Args:
        name: "select", "encode", "wait" or "apply".
        report: Report of the bucket. Mutated when the stage ends.
        profiled: Whether to show the stage to torch.profiler. False for stages that wait, during which other exchanges
            run.
    """

    __slots__ = ("_name", "_range", "_report", "_start")

    def __init__(self, name: str, report: BucketReport, *, profiled: bool = False) -> None:
        self._name = name
        self._report = report
        self._range = torch.profiler.record_function(f"sparsecomm::{name}") if profiled else None

    def __enter__(self) -> Stage:
        if self._range is not None:
            self._range.__enter__()  # type: ignore[no-untyped-call]
        self._start = perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = perf_counter()
        if self._range is not None:
            self._range.__exit__(kind, error, trace)
        report, field = self._report, self._name + "_seconds"
        setattr(report, field, getattr(report, field) + end - self._start)
        if _timeline is not None:
            _timeline.add(self._name, self._start, end, bucket=report.bucket, step=report.step, nnz=report.nnz)
