"""`bench train`: the same training with every method, under the launcher of this job, and the time to reach a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

import sparsecomm as sc
from sparsecomm.errors import ConfigError
from sparsecomm.tools.benches import bench, meta, table
from sparsecomm.tools.benches.methods import Run, load_plugins, runs_of
from sparsecomm.tools.benches.plots_train import plots
from sparsecomm.tools.benches.tasks import task
from sparsecomm.tools.benches.training import Schedule, agreed

__all__ = ["plots", "print_table", "run", "time_to"]

_FLOOR = Run("none")


@bench("train", keys=("method", "density", "world", "task"), measures=("step_seconds", "exposed_seconds"))
def run(
    methods: Sequence[str] = (),
    densities: Sequence[float] = (0.01, 0.001),
    steps: int = 100,
    eval_every: int = 5,
    target: float | None = None,
    task_name: str = "cnn",
    lr: float | None = None,
    seed: int = 0,
    limit: float = 600.0,
    plugins: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains the same model with every method and compares step time, bytes and time to a loss. Run it under mpirun.

    Args:
        methods: Methods to compare; by default all but special ones. An unknown name lists all methods.
        densities: Densities for the methods that have one.
        steps: Training steps; those of a method's warm-up are not timed.
        eval_every: Steps between losses on held-out examples; 0 evaluates only at the end.
        target: Loss to reach; by default the highest final loss of all methods that communicate and did not fail.
        task_name: Model to train: cnn (0.3M parameters), gpt (0.9M) or mlp (25.2M).
        lr: Learning rate of SGD with momentum 0.9; by default that of the task.
        seed: Seed of the model and the examples.
        limit: Seconds after which a run counts as hung and the job ends.
        plugins: Modules that register more methods.

    Returns:
        ``{"meta": {...}, "rows": [...]}`` with a row per run: the fields of `training.train`, exposed_seconds
        (step_seconds minus that of `none`), target, seconds_to_target and bytes_to_target (None if the target was not
        reached).

    Raises:
        ConfigError: An argument is not acceptable; raised before anything runs.
    """
    load_plugins(plugins)
    chosen, runs = task(task_name), runs_of(methods, densities)
    if limit <= 0 or eval_every < 0:
        raise ConfigError(f"limit must be positive and eval_every at least 0, got {limit:g} and {eval_every}")
    schedule = Schedule(steps, eval_every, lr, seed, limit)
    world = sc.init()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ordered = [_FLOOR, *(r for r in runs if r != _FLOOR)]
        rows = [agreed(world, r, chosen, schedule) for r in ordered]
    finally:
        torch.set_num_threads(threads)
    reached = [row["final_loss"] for row in rows[1:] if not row["error"]]
    goal = target if target is not None else max(reached, default=None)
    rows = [_with_target(row, rows[0], goal) for row in rows]
    about = {"world": world.size, "transport": world.transport, "task": chosen.name, "target": goal, "seed": seed}
    return {"meta": meta() | about | {"lr": lr or chosen.lr}, "rows": rows}


def _with_target(row: Mapping[str, Any], floor: Mapping[str, Any], goal: float | None) -> dict[str, Any]:
    if row["error"]:
        return dict(row)
    seconds, sent = time_to(goal, row["curve"])
    exposed = None if floor["error"] else row["step_seconds"] - floor["step_seconds"]
    extra = {"exposed_seconds": exposed, "target": goal, "seconds_to_target": seconds, "bytes_to_target": sent}
    return {**row, **extra}


def time_to(target: float | None, curve: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """Returns the point at which a loss curve first reaches a target.

    Args:
        target: A loss, or None.
        curve: Points [step, seconds, bytes, loss], in order.

    Returns:
        Seconds and bytes at the first loss at or below the target; None and None if there is none.
    """
    for _, seconds, sent, loss in curve:
        if target is not None and loss <= target:
            return seconds, sent
    return None, None


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints the rows, and below them the errors of runs without figures."""
    out = console or Console()
    about = result["meta"]
    rows = [row | {"run": str(Run(row["method"], row["density"]))} for row in result["rows"]]
    goal = "target" if about["target"] is None else f"loss {about['target']:.3f}"
    columns = {
        "method": ("run", ""),
        "step s": ("step_seconds", ".4f"),
        "spread": ("step_spread", ".0%"),
        "cpu s": ("cpu_seconds", ".4f"),
        "exposed s": ("exposed_seconds", ".4f"),
        "bytes/step": ("bytes_per_step", ",d"),
        "are": ("bytes_are", ""),
        "loss": ("final_loss", ".3f"),
        f"s to {goal}": ("seconds_to_target", ".2f"),
        f"bytes to {goal}": ("bytes_to_target", ",d"),
    }
    title = f"train {about['task']}: {about['world']} ranks, {about['transport']}"
    out.print(table(title, rows, columns))
    for row in rows:
        if row["error"]:
            out.print(f"  {row['run']}: {row['error']}", markup=False, highlight=False, soft_wrap=True)
