"""Time to a loss: the study's trainings inside a lab, whose links have a given rate.

`sparsecomm bench time-to-loss` is its command line.

The target is the loss that dense training reaches at its end, with the same seed, or a given share more: a method that
ends a thousandth above dense never reaches dense's own. A loss here is the mean of the last three evaluations, for
dense as for the others. A mean comes later than its evaluations, so smoothing never makes a method look faster.

**Which runs are made.** A method of torch sums the same numbers at every rate, so its losses do not depend on the rate.
It is trained with every seed at the highest rate, and at the others with the first seed alone, which gives the seconds
at which each step ends there. Our runs have ``collective="auto"``, which may choose differently at every rate, and
bytes that fall with the density: they are trained with every seed at every rate.

**The limit** is synchronous training whose exchange takes no time. Its losses are those of dense, step by step. Its
seconds are those of the same steps under a DDP hook that sends nothing: each rank updates its model with its own
gradient, at the same cost. The ranks still average one number a step, the logged training loss, as in all methods. So a
step takes as long as on the slowest rank, and 4 bytes are exchanged.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from convergence_runs import Runner, finished, locked
from convergence_study import MODELS, Conditions, Run, StudyError, check_data, make_run
from rich.console import Console
from run_log import RunLog
from time_to_loss_cells import POWERSGD, STEPS, cell

from sparsecomm.tools.lab import Lab
from sparsecomm.tools.lab.network import bits_per_second

SMOOTHED = 3
EVALUATIONS = 40
UNLIMITED = "none"
WARM_UP_START = 0.25  # density, by default in options.py
METHODS = {  # names on the command line: keys of METHODS in convergence_study.py
    "limit": "silent",
    "dense": "dense",
    "fp16": "fp16",
    **{name: name for name in POWERSGD},
    "sparsecomm": "ahead",
}


@dataclass(frozen=True, order=True)
class Way:
    """A method as the user names it, a key of ``METHODS``, and its density; None if it has none."""

    method: str
    density: float | None = None

    @property
    def ours(self) -> bool:
        """Whether losses may depend on the rate of the links."""
        return self.method == "sparsecomm"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The trainings that are compared.

    Attributes:
        tasks: Keys of ``STEPS``.
        rates: Rates of the links in tc's units, the highest first.
        hosts: Number of hosts, with one rank on each.
        ways: Methods; the first two are the limit and dense.
        seeds: Seeds.
        steps: Number of updates of a run; None for the task's.
        out: Folder of the runs.
        margins: Targets, each as the share by which it is above dense's loss at the end.
        place: Facts of the machine and the hosts; with other facts, runs are repeated.

    Raises:
        StudyError: A margin is out of range, a task is unknown, or its batch cannot be shared out to the hosts.
    """

    tasks: tuple[str, ...]
    rates: tuple[str, ...]
    hosts: int
    ways: tuple[Way, ...]
    seeds: tuple[int, ...]
    steps: int | None
    out: Path
    margins: tuple[float, ...]
    place: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check_names("task", self.tasks, STEPS)
        wrong = [margin for margin in self.margins if not 0.0 <= margin < 1.0]
        if wrong or not self.margins:
            raise StudyError(f"margins must be in [0, 1), got {wrong[0] if wrong else 'none'}")
        for task in self.tasks:
            batch = MODELS[task].flags["global_batch"]
            if batch % self.hosts:
                raise StudyError(
                    f"hosts = {self.hosts}: they cannot share out a batch of {batch}, that of {task}, evenly"
                )


Key = tuple[str, str, Way, int]  # task, rate, method and density, seed
Logs = Mapping[Key, RunLog]


def make_ways(methods: Sequence[str], densities: Sequence[float]) -> tuple[Way, ...]:
    """Returns the limit, dense, and these methods; "sparsecomm" once for each density.

    Args:
        methods: Keys of ``METHODS``; none for all.
        densities: Densities of "sparsecomm".

    Raises:
        StudyError: A method is unknown, or a density is out of range.
    """
    _check_names("method", methods, METHODS)
    wrong = [density for density in densities if not 0 < density < WARM_UP_START]
    if wrong or not densities:
        found = f"{wrong[0]:g}" if wrong else "none"
        raise StudyError(f"density {found}: it must be in (0, {WARM_UP_START:g}), since the warm-up falls from there")
    names = dict.fromkeys(("limit", "dense", *(methods or METHODS)))
    return tuple(
        Way(name, density)
        for name in names
        for density in (dict.fromkeys(densities) if name == "sparsecomm" else (None,))
    )


def highest_first(rates: Sequence[str]) -> tuple[str, ...]:
    """Returns rates of links in the order of ``Plan``.

    Raises:
        LabError: A rate is not acceptable.
    """
    return tuple(sorted(dict.fromkeys(rates), key=lambda rate: bits_per_second(rate) or 0, reverse=True))


def _check_names(kind: str, given: Sequence[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise StudyError(f"{kind} {name!r} does not exist; known are {', '.join(known)}")


def make_runs(plan: Plan) -> dict[Key, Run]:
    """Returns all runs of a plan; those of one rate follow each other."""
    fastest, first = plan.rates[0], plan.seeds[0]
    found = {}
    for rate in (UNLIMITED, *plan.rates):
        for task in plan.tasks:
            for way in plan.ways:
                if (way.method == "limit") != (rate == UNLIMITED):
                    continue
                every = way.ours or rate == fastest
                for seed in plan.seeds if every else (first,):
                    found[task, rate, way, seed] = _run(plan, task, rate, way, seed)
    return found


def _run(plan: Plan, task: str, rate: str, way: Way, seed: int) -> Run:
    conditions = Conditions(
        judge="validation",
        ranks=plan.hosts,
        steps=plan.steps,
        evaluations=EVALUATIONS,
        place={**plan.place, "rate": rate},
    )
    made = make_run(cell(task, METHODS[way.method], way.density, ranks=plan.hosts), plan.out, conditions, seed=seed)
    return replace(made, title=f"{made.title} at {rate}")


def do_runs(
    plan: Plan, runs: Mapping[Key, Run], launch: Callable[[int], list[str]], lab: Lab | None, console: Console
) -> dict[Path, str]:
    """Does the runs that are not finished. Changes the rate of the lab, which must be up.

    Args:
        plan: The plan.
        runs: Result of ``make_runs``.
        launch: Returns the command that starts so many ranks of the command that follows it.
        lab: The hosts; None to leave rates alone.
        console: Console for progress.

    Returns:
        Reasons of the failed runs, by the path of their log.
    """
    failures: dict[Path, str] = {}
    with locked(plan.out) as lock:
        for rate in dict.fromkeys(key[1] for key in runs):
            if lab is not None:
                lab.set_rate(None if rate == UNLIMITED else rate)
            console.print(f"links at {rate if rate != UNLIMITED else 'no limit'}: ", end="", highlight=False)
            failures |= Runner(launch, 1, console, lock).run_all([run for key, run in runs.items() if key[1] == rate])
    return failures


def in_lab(lab: Lab) -> Callable[[int], list[str]]:
    """Returns the ``launch`` of ``do_runs`` that starts ranks on the hosts of a lab."""
    line = [sys.executable, "-m", "sparsecomm", "lab", "run", "--name", lab.name]
    return lambda ranks: [*line, "-n", str(ranks), "--"]


def measure(plan: Plan, lab: Lab, console: Console) -> list[dict[str, Any]]:
    """Does the missing runs in a lab, which is made if there are any, and returns the rows.

    Args:
        plan: The plan.
        lab: A lab that is not up.
        console: Console for progress.

    Raises:
        StudyError: Data are missing, or another process uses the folder of the runs.
        LogError: A log cannot be read.
        LabError: This machine cannot make the lab.
    """
    runs = make_runs(plan)
    check_data([run.cell for run in runs.values()])
    if all(finished(run) is not None for run in runs.values()):
        return make_rows(plan, runs, {})
    with lab:
        failures = do_runs(plan, runs, in_lab(lab), lab, console)
    return make_rows(plan, runs, failures)


def make_rows(plan: Plan, runs: Mapping[Key, Run], failures: Mapping[Path, str]) -> list[dict[str, Any]]:
    """Returns a row for each task, rate, margin and method, from the finished runs."""
    logs = {key: log for key, run in runs.items() if (log := finished(run)) is not None}
    rows = []
    for task, rate, margin, way in product(plan.tasks, plan.rates, plan.margins, plan.ways):
        about = {"task": task, "rate": rate, "margin": margin, "method": way.method, "density": way.density}
        about["hosts"] = plan.hosts
        mine = [run.log for key, run in runs.items() if (key[0], key[2]) == (task, way)]
        failed = [failures[path] for path in mine if path in failures]
        try:
            rows.append(about | _figures(plan, logs, task, rate, way, margin) | {"error": None})
        except KeyError as absent:
            rows.append(about | {"error": failed[0] if failed else f"this run, or dense's, is missing: {absent}"})
    return rows


def _figures(plan: Plan, logs: Logs, task: str, rate: str, way: Way, margin: float) -> dict[str, Any]:
    """Returns the figures of a row. Raises KeyError if a run that they need is not finished."""
    pairs = [_log_and_clock(plan, logs, task, rate, way, seed) for seed in plan.seeds]
    dense = [_log_and_clock(plan, logs, task, rate, Way("dense"), seed)[0] for seed in plan.seeds]
    dense_ends = [smoothed(log)[-1][1] for log in dense]
    targets = [end * (1.0 + margin) for end in dense_ends]
    reached = [reach(log, clock, target) for (log, clock), target in zip(pairs, targets, strict=True)]
    ends = [smoothed(log)[-1][1] for log, _ in pairs]
    figures: dict[str, Any] = {"reached": sum(r is not None for r in reached), "seeds": len(plan.seeds)}
    for i, name in enumerate(("seconds", "bytes", "steps")):
        figures |= spread(name, [None if r is None else r[i] for r in reached])
    clocks = [clock for _, clock in pairs]
    figures |= {
        "target": statistics.mean(targets),
        "end_loss": statistics.mean(ends),
        "end_over_dense": statistics.mean(end / other for end, other in zip(ends, dense_ends, strict=True)) - 1.0,
        "all_steps": clocks[0].rows[-1].step,
        "step_seconds": statistics.mean(clock.rows[-1].seconds / clock.rows[-1].step for clock in clocks),
        "bytes_are": clocks[0].meta["bytes_are"],
        "numel": clocks[0].meta["parameters"],
        "curve": curve(pairs),
    }
    return figures


def _log_and_clock(plan: Plan, logs: Logs, task: str, rate: str, way: Way, seed: int) -> tuple[RunLog, RunLog]:
    """Returns the log that has the losses of a row, and the one that has its seconds and bytes."""
    fastest, first = plan.rates[0], plan.seeds[0]
    if way.method == "limit":
        losses, _ = _log_and_clock(plan, logs, task, fastest, Way("dense"), seed)
        return losses, logs.get((task, UNLIMITED, way, seed)) or logs[task, UNLIMITED, way, first]
    own = logs.get((task, rate, way, seed))
    if own is not None or way.ours:
        return logs[task, rate, way, seed], logs[task, rate, way, seed]
    return logs[task, fastest, way, seed], logs[task, rate, way, first]


def smoothed(log: RunLog) -> list[tuple[int, float]]:
    """Returns steps, each with the mean of the last ``SMOOTHED`` evaluations up to it; at least one."""
    points = log.evaluated()
    first = min(SMOOTHED, len(points))
    return [
        (points[end - 1][0].step, statistics.mean(loss for _, loss in points[end - first : end]))
        for end in range(first, len(points) + 1)
    ]


def reach(log: RunLog, clock: RunLog, target: float) -> tuple[float, int, int] | None:
    """Returns seconds, bytes and steps until the smoothed loss is at most the target; None if it never is.

    Args:
        log: Log with the losses.
        clock: Log with seconds and bytes; it has a row for every step.
        target: Loss.
    """
    step = next((step for step, loss in smoothed(log) if loss <= target), None)
    if step is None:
        return None
    row = clock.rows[step]
    assert row.step == step
    return row.seconds, row.bytes_sent, step


def spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """Returns the median, the lowest and the highest of some values. None counts as later than all numbers.

    The median of an even number is the higher of the two in the middle, so that None, too, can be the median.
    """
    ordered = sorted(values, key=lambda value: float("inf") if value is None else value)
    return {name: ordered[len(ordered) // 2], f"{name}_low": ordered[0], f"{name}_high": ordered[-1]}


def curve(pairs: Sequence[tuple[RunLog, RunLog]]) -> list[list[float]]:
    """Returns a point [step, seconds, bytes, loss] for each evaluation, the mean over seeds, not smoothed."""
    points = []
    for evaluations in zip(*(log.evaluated() for log, _ in pairs), strict=True):
        step = evaluations[0][0].step
        clocks = [clock.rows[step] for _, clock in pairs]
        seconds, sent = (statistics.mean(getattr(row, name) for row in clocks) for name in ("seconds", "bytes_sent"))
        points.append([step, seconds, sent, statistics.mean(loss for _, loss in evaluations)])
    return points
