"""Benches: functions that measure and return ``{"meta": ..., "rows": [...]}``; the command line prints them.

A bench's module may have ``print_table(result, console)``, which shows a result, and ``plots(result, folder)``, which
draws it and returns the files; both are found by name and serve all benches of the module.

On shared machines only ratios mean anything, so `alternate` interleaves what is measured with what it is compared to.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import numpy as np
import torch
from rich.table import Table

from sparsecomm.kernels import available_paths, current_path

__all__ = [
    "BENCHES",
    "ROWS",
    "Fields",
    "Timing",
    "alternate",
    "bench",
    "companion",
    "meta",
    "registry",
    "table",
    "timing",
    "verdict",
]

_F = TypeVar("_F", bound=Callable[..., dict[str, Any]])
_K = TypeVar("_K", bound=Hashable)

BENCHES: dict[str, Callable[..., dict[str, Any]]] = {}
"""Benches by name; filled by the `bench` decorator when the module that holds one is imported."""


@dataclass(frozen=True, slots=True)
class Fields:
    """What the fields of a bench's rows are, for whoever puts two results side by side.

    Attributes:
        keys: together they say what a row is about; the same in every run.
        measures: the numbers to compare.
    """

    keys: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()


ROWS: dict[str, Fields] = {}
"""What each bench said of its rows."""


def bench(name: str, *, keys: Sequence[str] = (), measures: Sequence[str] = ()) -> Callable[[_F], _F]:
    """Registers a bench function under a name.

    Args:
        name: as in ``sparsecomm bench NAME``.
        keys: fields that together say what a row is about.
        measures: fields worth comparing between two runs.
    """

    def register(function: _F) -> _F:
        BENCHES[name] = function
        ROWS[name] = Fields(tuple(keys), tuple(measures))
        return function

    return register


def registry() -> Mapping[str, Callable[..., dict[str, Any]]]:
    """Returns all benches by name: imports every module of this package, each of which registers its own."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return BENCHES


def companion(bench: Callable[..., Any], name: str) -> Any:
    """Returns what the bench's module has under a name (`print_table`, `plots`), or None."""
    return getattr(sys.modules[bench.__module__], name, None)


def meta() -> dict[str, Any]:
    """What a result needs to be read later: versions, hardware, kernel paths, threads, date."""
    try:
        own = version("sparsecomm")
    except PackageNotFoundError:
        own = "not installed"
    return {
        "sparsecomm": own,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "kernel_paths": list(available_paths()),
        "kernel_path": current_path(),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a call took over some repeats.

    Attributes:
        seconds: the median.
        spread: distance between the quartiles, as a fraction of the median.
        best: the minimum.
        samples: all of them, in order.
    """

    seconds: float
    spread: float
    best: float
    samples: tuple[float, ...] = ()

    def over(self, other: Timing) -> float:
        """How many times as long as another task of the same `alternate` call: the median over the rounds.

        Paired by round, because noise from outside lasts longer than a round and so hits both.
        """
        return statistics.median(a / b for a, b in zip(self.samples, other.samples, strict=False))


def timing(samples: Sequence[float]) -> Timing:
    """Summarises seconds that a call took over some repeats; at least one."""
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median, median, median)
    return Timing(median, (high - low) / median if median else 0.0, min(samples), tuple(samples))


def alternate(
    tasks: Mapping[_K, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    before: Callable[[], object] | None = None,
    slow: Iterable[_K] = (),
) -> dict[_K, Timing]:
    """Times several calls in turn, round after round, so that noise from outside hits all of them alike.

    Args:
        tasks: what to time, by name.
        repeats: rounds that count.
        warmup: rounds before them that do not.
        before: called before every timed call, not timed: restores the state that tasks mutate.
        slow: names that run only in the first three counted rounds and in no warm-up round.

    Returns:
        A timing for each task.
    """
    few = frozenset(slow)
    samples: dict[_K, list[float]] = {name: [] for name in tasks}
    for round_ in range(-warmup, repeats):
        for name, task in tasks.items():
            if name in few and not 0 <= round_ < 3:
                continue
            if before is not None:
                before()
            start = time.perf_counter()
            task()
            elapsed = time.perf_counter() - start
            if round_ >= 0:
                samples[name].append(elapsed)
    return {name: timing(taken) for name, taken in samples.items()}


def verdict(measured: float | None, goal: float | None) -> str:
    """'ok' if a measurement is within its goal (an upper bound), 'MISS' if not, '' if there is nothing to judge."""
    if measured is None or goal is None:
        return ""
    return "ok" if measured <= goal else "MISS"


def table(title: str, rows: list[dict[str, Any]], columns: Mapping[str, tuple[str, str]]) -> Table:
    """A rich table of result rows.

    Args:
        title: above the table.
        rows: result rows.
        columns: heading: (key in the row, format specification); a row without the key has an empty cell.
    """
    out = Table(title=title)
    for heading, (_, form) in columns.items():
        out.add_column(heading, justify="right" if form else "left")
    for row in rows:
        cells = []
        for key, form in columns.values():
            value = row.get(key)
            text = "" if value is None else format(value, form) if form else str(value)
            cells.append({"ok": "[green]ok[/green]", "MISS": "[red]MISS[/red]"}.get(text, text))
        out.add_row(*cells)
    return out
