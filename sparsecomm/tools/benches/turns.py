"""`bench turns`: a training step with one method against another, step by step in turns in one job."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

import sparsecomm as sc
from sparsecomm.errors import ConfigError
from sparsecomm.tools.benches import bench, meta, slowest, table, verdict
from sparsecomm.tools.benches.methods import METHODS, Attached, Run, load_plugins, runs_of
from sparsecomm.tools.benches.tasks import TASKS, Task, task
from sparsecomm.tools.benches.training import timed_step

__all__ = ["print_table", "run"]

_GOAL = 1.03  # times the step of the method that it is compared with
_LONGEST_WAIT = 200  # steps after which a method must have settled


@bench("turns", keys=("task", "method", "density", "against", "world"), measures=("ratio", "step_seconds"))
def run(
    tasks: Sequence[str] = ("cnn", "gpt", "mlp"),
    methods: Sequence[str] = ("sparsecomm-auto",),
    densities: Sequence[float] = (0.01, 0.001),
    against: str = "ddp-gloo",
    steps: int = 100,
    plugins: Sequence[str] = (),
) -> dict[str, Any]:
    """Compares the time of a training step with that of another method, in turns. Run it under mpirun.

    Both models are in one process of each rank, and their steps alternate, so that noise from outside affects both
    alike. A step lasts as long as on the slowest rank. Steps in which a method still chooses are not timed.

    Args:
        tasks: Models to train: cnn (0.3M parameters), gpt (0.9M) or mlp (25.2M).
        methods: Methods to compare. An unknown name lists all methods.
        densities: Densities for the methods that have one.
        against: Method that each is compared with.
        steps: Timed steps of each method.
        plugins: Modules that register more methods.

    Returns:
        ``{"meta": {...}, "rows": [...]}`` with a row per task and method: task, method, density, against, world,
        numel, steps, step_seconds and against_seconds (medians), ratio (median over pairs of steps), ratio_low and
        ratio_high (quartiles), goal, ok.

    Raises:
        ConfigError: An argument is not acceptable; raised before anything runs.
    """
    load_plugins(plugins)
    if steps < 2:
        raise ConfigError(f"steps = {steps}: 2 at least")
    chosen = [task(name) for name in tasks or TASKS]
    runs = runs_of(methods, densities)
    (other,) = runs_of((against,), densities[:1])
    world = sc.init()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [_pair(world, one, mine, other, steps) for one in chosen for mine in runs]
    finally:
        torch.set_num_threads(threads)
    return {"meta": meta() | {"world": world.size, "transport": world.transport}, "rows": rows}


@dataclass(slots=True, eq=False)
class _Training:
    """One model in training, and the seconds of its steps, on this rank."""

    chosen: Task
    attached: Attached
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: list[float] = field(default_factory=list)

    def run(self, rank: int) -> None:
        """Runs one step. Collective."""
        examples = self.chosen.examples(0, rank, self.step)
        self.seconds.append(timed_step(self.attached, self.optimizer, self.chosen, examples))
        self.step += 1


def _training(chosen: Task, run: Run) -> _Training:
    torch.manual_seed(0)
    attached = METHODS[run.method].attach(chosen.build(), run.density or 1.0)
    optimizer = torch.optim.SGD(attached.model.parameters(), lr=chosen.lr, momentum=attached.momentum)
    return _Training(chosen, attached, optimizer)


def _pair(world: sc.World, chosen: Task, mine: Run, other: Run, steps: int) -> dict[str, Any]:
    """Trains two models in turns. Collective."""
    both = [_training(chosen, mine), _training(chosen, other)]
    warmup = max(METHODS[r.method].warmup for r in (mine, other))
    while min(one.step for one in both) < warmup or not all(one.attached.settled() for one in both):
        if both[0].step >= _LONGEST_WAIT:
            raise ConfigError(f"{mine} has not settled after {_LONGEST_WAIT} steps")
        for one in both:
            one.run(world.rank)
    for one in both:
        one.seconds.clear()
    for i in range(steps):
        for one in both[:: 1 if i % 2 else -1]:
            if world.size > 1:
                dist.barrier()  # so that no rank is late from the other model; our own would keep our thread awake
            one.run(world.rank)
    mine_seconds, other_seconds = (slowest(one.seconds) for one in both)
    ratios = [a / b for a, b in zip(mine_seconds, other_seconds, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "task": chosen.name,
        "method": mine.method,
        "density": mine.density,
        "against": other.method,
        "world": world.size,
        "numel": sum(p.numel() for p in both[0].attached.model.parameters()),
        "steps": steps,
        "step_seconds": statistics.median(mine_seconds),
        "against_seconds": statistics.median(other_seconds),
        "ratio": median,
        "ratio_low": low,
        "ratio_high": high,
        "goal": _GOAL,
        "ok": verdict(median, _GOAL),
    }


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints the rows."""
    rows = [row | {"run": str(Run(row["method"], row["density"]))} for row in result["rows"]]
    columns = {
        "task": ("task", ""),
        "method": ("run", ""),
        "step s": ("step_seconds", ".4f"),
        "against s": ("against_seconds", ".4f"),
        "ratio": ("ratio", ".3f"),
        "low": ("ratio_low", ".3f"),
        "high": ("ratio_high", ".3f"),
        "goal": ("goal", ".2f"),
        "": ("ok", ""),
    }
    about = result["meta"]
    against = result["rows"][0]["against"] if result["rows"] else "nothing"
    title = f"steps in turns with {against}: {about['world']} ranks, {about['transport']}"
    (console or Console()).print(table(title, rows, columns))
