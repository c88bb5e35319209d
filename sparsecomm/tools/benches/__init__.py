"""Benches: functions that measure and return ``{"meta": ..., "rows": [...]}``; the command line prints the rows.

The module of a bench may define ``print_table(result, console)``, which prints a result, and ``plots(result, folder)``,
which draws it and returns the files. Both are found by name and serve all benches of the module.

On shared machines only ratios mean anything, so `alternate` interleaves the calls that are compared.
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
import torch.distributed as dist
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
    "slowest",
    "table",
    "timing",
    "verdict",
]

_F = TypeVar("_F", bound=Callable[..., dict[str, Any]])
_K = TypeVar("_K", bound=Hashable)

BENCHES: dict[str, Callable[..., dict[str, Any]]] = {}
"""Benches by name. The decorator `bench` adds to it when a module with benches is imported."""


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a bench's rows, for comparing two results.

    Attributes:
        keys: Fields that together identify a row; the same in every run.
        measures: Numbers to compare.
    """

    keys: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()


ROWS: dict[str, Fields] = {}
"""Fields of the rows of each bench, by the bench's name."""


def bench(name: str, *, keys: Sequence[str] = (), measures: Sequence[str] = ()) -> Callable[[_F], _F]:
    """Registers a bench function under a name.

    Args:
        name: Name on the command line, ``sparsecomm bench NAME``.
        keys: Fields that together identify a row.
        measures: Fields to compare between two runs.
    """

    def register(function: _F) -> _F:
        BENCHES[name] = function
        ROWS[name] = Fields(tuple(keys), tuple(measures))
        return function

    return register


def registry() -> Mapping[str, Callable[..., dict[str, Any]]]:
    """Imports every module of this package, so that all benches register, and returns the benches by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return BENCHES


def companion(bench: Callable[..., Any], name: str) -> Any:
    """Returns the function of this name (`print_table` or `plots`) in the bench's module, or None."""
    return getattr(sys.modules[bench.__module__], name, None)


def meta() -> dict[str, Any]:
    """Returns the circumstances of a measurement: versions, hardware, kernel paths, threads, date."""
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
    """Seconds that a call took, over some repeats.

    Attributes:
        seconds: Median.
        spread: Distance between the quartiles, as a fraction of the median.
        best: Minimum.
        samples: All samples, in order.
    """

    seconds: float
    spread: float
    best: float
    samples: tuple[float, ...] = ()

    def over(self, other: Timing) -> float:
        """Returns the ratio to another timing of the same `alternate` call, as the median over rounds.

        Samples are paired by round, because noise from outside lasts longer than a round and hits both.
        """
        return statistics.median(a / b for a, b in zip(self.samples, other.samples, strict=False))


def timing(samples: Sequence[float]) -> Timing:
    """Returns the summary of at least one sample, in seconds."""
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median, median, median)
    return Timing(median, (high - low) / median if median else 0.0, min(samples), tuple(samples))


def slowest(seconds: Sequence[float]) -> list[float]:
    """Returns the seconds that each sample took on its slowest rank. Collective."""
    taken = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    found: list[float] = taken.tolist()
    return found


def alternate(
    tasks: Mapping[_K, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    before: Callable[[], object] | None = None,
    slow: Iterable[_K] = (),
) -> dict[_K, Timing]:
    """Times several calls in turn, round after round, so that noise from outside affects all of them equally.

    Args:
        tasks: Calls to time, by name.
        repeats: Number of timed rounds.
        warmup: Number of untimed rounds before them.
        before: Called, untimed, before every task; it restores the state that tasks mutate.
        slow: Names of tasks that run only in the first three timed rounds and not in warm-up rounds.

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
    """Returns "ok" if a measurement is at most its goal, "MISS" if it is more, "" if either is None."""
    if measured is None or goal is None:
        return ""
    return "ok" if measured <= goal else "MISS"


def table(title: str, rows: list[dict[str, Any]], columns: Mapping[str, tuple[str, str]]) -> Table:
    """Returns a rich table of result rows.

    Args:
        title: Title above the table.
        rows: Rows of a result.
        columns: Headings, each with a key of the row and a format specification. A row without the key has an empty
            cell.
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
