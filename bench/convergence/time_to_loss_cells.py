"""The trainings of `sparsecomm bench time-to-loss`: four tasks, and every method with its own best settings.

    python bench/convergence/convergence.py --study bench/convergence/time_to_loss_cells.py --tune prose-25m-adamw-dense

Learning rates, steps and the warm-ups of the density are those of transfer_cells.py. ``prose-25m`` is the GPT on prose
with 25 million parameters, and too slow for 3,000 steps. Its rate was not tuned: run the command above on a quiet
machine first.

PowerSGD sends whole gradients in the first twentieth of a run, while the learning rate rises: torch's documentation
advises such a start.
"""

from __future__ import annotations

from typing import Any

import transfer_cells
from convergence_study import MODELS, Cell

OPTIMIZER = "adamw"
STEPS = {task: MODELS[task].steps for task in ("prose", "cnn", "prose-25m", "code")}
UNTUNED = {"prose-25m": (1e-3, (3e-4, 1e-3, 3e-3))}
FEWER_EVALUATIONS = {
    "prose": {"held_out": 16},
    "code": {"held_out": 16},
}  # they take longer than the training between them otherwise
POWERSGD = ("powersgd-r4", "powersgd-r1")


def cell(task: str, method: str, density: float | None = None, *, ranks: int = 2) -> Cell:
    """Returns the training of a task by a method.

    Args:
        task: Key of ``STEPS``.
        method: "dense", "fp16", "silent", "ahead" or one of ``POWERSGD``.
        density: Density of "ahead"; None with the other methods.
        ranks: Number of processes.
    """
    best, tried = UNTUNED[task] if task in UNTUNED else transfer_cells.RATES[task, OPTIMIZER]
    settings: dict[str, Any] = {"lr": best, **transfer_cells.AVERAGING[OPTIMIZER], **FEWER_EVALUATIONS.get(task, {})}
    if density is not None:
        falling = transfer_cells.warm_up(method, density, STEPS[task])
        settings |= {"warmup_kind": "exp", "warmup_steps": falling, "collective": "auto", "value_codec": "int8"}
    if method in POWERSGD:
        settings |= {"warmup_steps": STEPS[task] // 20}
    return Cell(
        model=task,
        optimizer=OPTIMIZER,
        method=method,
        density=density,
        settings=settings,
        grid={"lr": tried} if method == "dense" else {},
        steps=STEPS[task],
        ranks=ranks,
    )


CELLS = [
    cell(task, method, density)
    for task in STEPS
    for method, density in (
        *((name, None) for name in ("dense", "fp16", *POWERSGD)),
        *(("ahead", density) for density in transfer_cells.DENSITIES),
    )
]
