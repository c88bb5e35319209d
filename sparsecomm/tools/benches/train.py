"""`bench train`: the same training by every method under the launcher that started this, and the time to a loss."""

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
    """Trains the same model by every method and reports step time, bytes, and the time to a loss. Run it under mpirun.

    Args:
        methods: which; all but the special ones if none is named (an unknown name is answered with a list).
        densities: of the methods that have one.
        steps: of training; those of a method's warm-up are not timed.
        eval_every: steps between losses on held-out examples; 0 for one at the end.
        target: the loss to reach; if not given, what the worst method reached that averages and did not fail.
        task_name: cnn (0.3M parameters), gpt (0.9M) or mlp (25.2M).
        lr: learning rate of SGD with momentum 0.9; the task's if not given.
        seed: of the model and the examples.
        limit: seconds after which a run counts as hung and the job ends.
        plugins: modules that register more methods.

    Returns:
        ``{"meta": {...}, "rows": [...]}``, a row a run: what `training.train` returns, and exposed_seconds
        (step_seconds minus that of `none`), target, seconds_to_target and bytes_to_target (None if it was not
        reached), and error.

    Raises:
        ConfigError: for an argument that is not acceptable, before anything runs.
    """
    load_plugins(plugins)
    chosen, runs = task(task_name), runs_of(methods, densities)
    if limit <= 0 or eval_every < 0:
        raise ConfigError(f"limit = {limit:g} and eval_every = {eval_every}: a positive time, and 0 steps or more")
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
    """Returns when a loss curve first is at or below a target.

    Args:
        target: a loss, or None.
        curve: [step, seconds, bytes, loss], in order.

    Returns:
        Seconds and bytes, or None and None if it never is.
    """
    for _, seconds, sent, loss in curve:
        if target is not None and loss <= target:
            return seconds, sent
    return None, None


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints the rows, and below them why runs have no figures."""
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
