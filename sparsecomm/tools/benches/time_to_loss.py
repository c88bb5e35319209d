"""`bench time-to-loss`: real trainings between hosts, by every method, to the loss that dense reaches at its end.

The trainings are those of the convergence study. Its trainer, its data and its cache of finished runs are in
bench/convergence, which a wheel does not have: they need a checkout's folders and its `make data`. So this module holds
the options, the table and the pictures, and loads bench/convergence/time_to_loss.py, which says how the runs are made.
Result files can be drawn and compared without a checkout.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsecomm.errors import ConfigError
from sparsecomm.launch import detect
from sparsecomm.tools.benches import bench, meta, table
from sparsecomm.tools.benches.plots_time_to_loss import plots
from sparsecomm.tools.benches.plots_train import run_label
from sparsecomm.tools.lab import Lab

__all__ = ["plots", "print_table", "run"]

_STUDY = Path("bench") / "convergence" / "time_to_loss.py"
_FEWEST_HOSTS = 2


@bench(
    "time-to-loss",
    keys=("task", "rate", "margin", "method", "density", "hosts"),
    measures=("seconds", "bytes", "steps"),
)
def run(
    tasks: Sequence[str] = ("prose", "cnn", "prose-25m"),
    rates: Sequence[str] = ("100mbit", "1gbit", "10gbit"),
    hosts: int = 2,
    methods: Sequence[str] = (),
    densities: Sequence[float] = (0.01, 0.001),
    seeds: int = 3,
    steps: int = 0,
    margins: Sequence[float] = (0.0, 0.01),
    pin: bool = True,
    out: str = "runs/time-to-loss",
) -> dict[str, Any]:
    """Trains in a lab by every method, and measures the time to the loss that dense reaches at its end.

    Needs root and a checkout, and runs for hours to days. It can be interrupted: finished runs are kept, half runs
    continue. Run it from the project's root, once, without a launcher.

    Args:
        tasks: Trainings: prose (GPT of 0.83M parameters), cnn (Fashion-MNIST), prose-25m, code.
        rates: Rates of the links, in tc's units, such as 1gbit.
        hosts: Number of hosts, with one rank on each.
        methods: Methods beside limit and dense: fp16, powersgd-r4, powersgd-r1, sparsecomm; all by default.
        densities: Densities of sparsecomm.
        seeds: Number of seeds.
        steps: Updates of a run; 0 takes the task's own number. Warm-ups are shortened alike.
        margins: Targets, each as the share by which it is above dense's loss at the end.
        pin: Run each host on a core of its own, so that times show communication and not scheduling.
        out: Folder of the runs.

    Returns:
        ``{"meta": {...}, "rows": [...]}`` with a row per task, rate, margin and method: seconds, bytes (sent by rank 0)
        and steps to the target, each the median over seeds, with _low and _high (None: a seed does not reach it);
        reached (number of seeds that do), seeds, target, end_loss, end_over_dense (mean over seeds of the ratio, minus
        1), all_steps, step_seconds, bytes_are, numel, error, and curve, a list of [step, seconds, bytes, loss], mean
        over seeds.

    Raises:
        ConfigError: An argument is not acceptable, data are missing, or there is no checkout.
        LabError: This machine cannot make such hosts.
    """
    _refuse(hosts, seeds, steps)
    study, about = _load(), meta()
    lab = Lab(hosts=hosts, name=f"loss{os.getpid() % 10000}", pin=pin)
    with _clear_errors():
        plan = study.Plan(
            tasks=tuple(tasks),
            rates=study.highest_first(rates),
            hosts=hosts,
            ways=study.make_ways(methods, densities),
            seeds=tuple(range(seeds)),
            steps=steps or None,
            out=Path(out).resolve(),
            margins=tuple(dict.fromkeys(margins)),
            place={"hosts": hosts, "pinned": pin, "cpu": about["cpu"]},
        )
        rows = study.measure(plan, lab, Console(stderr=True))
    facts = {"hosts": hosts, "cores_of_hosts": lab.cores, "seeds": seeds, "judge": "validation"}
    return {"meta": about | facts | {"smoothed_evaluations": study.SMOOTHED}, "rows": rows}


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turns the study's errors into ours, and an interruption into its exit code."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command goes on from here")
        raise SystemExit(130) from None


def _refuse(hosts: int, seeds: int, steps: int) -> None:
    if detect().size > 1:
        raise ConfigError(f"{detect().launcher} started {detect().size} ranks: start it once, without a launcher")
    if hosts < _FEWEST_HOSTS:
        raise ConfigError(f"hosts = {hosts}: {_FEWEST_HOSTS} at least, since one host sends nothing")
    if seeds < 1:
        raise ConfigError(f"seeds = {seeds}: 1 at least")
    if steps < 0:
        raise ConfigError(f"steps = {steps}: 1 at least, or 0 for the task's own number")


def _load() -> Any:
    """Returns the module of the study.

    Raises:
        ConfigError: This package is not in a checkout.
    """
    root = Path(__file__).resolve().parents[3]
    file = root / _STUDY
    if not file.exists():
        raise ConfigError(
            f"{_STUDY} is missing in {root}: this bench trains with the scripts of the convergence study, which are "
            "not in a wheel. Clone the repository, run `make install` and `make data`, and start it from there"
        )
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # the study's modules import each other by their plain names
    return importlib.import_module(file.stem)


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints a table per task, rate and margin, and below it the errors of rows without figures."""
    out = console or Console()
    about = result["meta"]
    for key in dict.fromkeys((row["task"], row["rate"], row["margin"]) for row in result["rows"]):
        task, rate, margin = key
        group = [row for row in result["rows"] if (row["task"], row["rate"], row["margin"]) == key]
        dense = next((row for row in group if row["method"] == "dense" and not row["error"]), None)
        rows = [_cells(row, dense) for row in group]
        columns = {
            "method": ("run", ""),
            "s to loss": ("seconds", ".1f"),
            "low": ("seconds_low", ".1f"),
            "high": ("seconds_high", ".1f"),
            "faster": ("faster", ".2f"),
            "MB to loss": ("megabytes", ".1f"),
            "steps": ("steps", "d"),
            "seeds": ("those", ""),
            "end loss": ("end_loss", ".4f"),
            "to dense": ("end_over_dense", "+.1%"),
            "s/step": ("step_seconds", ".4f"),
        }
        pinned = " with a core each" if about["cores_of_hosts"] else ""
        above = f" + {margin:.1%}" if margin else ""
        target = f", to {dense['target']:.4f}, dense's end{above}" if dense else ""
        out.print(table(f"{task} at {rate}, {about['hosts']} hosts{pinned}{target}", rows, columns))
        for row in rows:
            if row["error"]:
                out.print(f"  {row['run']}: {row['error']}", markup=False, highlight=False, soft_wrap=True)


def _cells(row: dict[str, Any], dense: dict[str, Any] | None) -> dict[str, Any]:
    """Returns a row with the cells of the table that are computed from it."""
    cells = row | {"run": run_label(row)}
    if row["error"]:
        return cells
    cells |= {"those": f"{row['reached']} of {row['seeds']}"}
    if row["bytes"] is not None:
        cells |= {"megabytes": row["bytes"] / 1e6}
    if row["seconds"] and dense is not None and dense["seconds"]:
        cells |= {"faster": dense["seconds"] / row["seconds"]}
    return cells
