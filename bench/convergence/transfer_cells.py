"""A study that cannot be tuned to: five tasks, four numbers of ranks and three lengths, one choice of settings.

    python bench/convergence/convergence.py --study bench/convergence/transfer_cells.py --only 'cnn-adamw-*'

A method may be chosen on ``code``. On the other tasks it is then run unchanged: it takes the optimizer settings of
dense there, whatever they are. The global batch of a task is the same for every number of ranks, and so is dense
training, to rounding: it is run once, in one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from convergence_study import Cell

STEPS = (800, 3000, 10000)
RANKS = (2, 4, 8, 16)
DENSITIES = (0.01, 0.001)
# Dense's rate is the best of three: bench/convergence/README.md has the losses.
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("code", "adamw"): {"lr": 3e-3, "beta1": 0.9},
    ("code", "sgd"): {"lr": 0.1, "momentum": 0.9},
    ("prose", "adamw"): {"lr": 3e-3, "beta1": 0.9},
    ("prose", "sgd"): {"lr": 0.1, "momentum": 0.9},
    ("cnn", "adamw"): {"lr": 3e-3, "beta1": 0.9},
    ("cnn", "sgd"): {"lr": 0.1, "momentum": 0.9},
    ("lstm", "adamw"): {"lr": 3e-3, "beta1": 0.9},
    ("lstm", "sgd"): {"lr": 0.1, "momentum": 0.9},
    ("tied", "adamw"): {"lr": 3e-3, "beta1": 0.9},
    ("tied", "sgd"): {"lr": 0.1, "momentum": 0.9},
}
# Keys of METHODS in convergence_study.py, which gives each its options. A new method is one entry there and one here.
METHODS: dict[str, tuple[str, ...]] = {"adamw": ("topk", "adam-topk"), "sgd": ("topk", "dgc")}
WARM_UP = {"adam-topk": 0.5, "dgc": 0.5}  # share of the run over which their density falls from 25%


def compressed(task: str, optimizer: str, steps: int) -> Iterator[Cell]:
    """Yields the cells of all methods, densities and ranks."""
    for method in METHODS[optimizer]:
        settings = dict(SETTINGS[task, optimizer])
        if method in WARM_UP:
            settings |= {"warmup_kind": "exp", "warmup_steps": int(WARM_UP[method] * steps)}
        for density in DENSITIES:
            for ranks in RANKS:
                yield Cell(
                    model=task,
                    optimizer=optimizer,
                    method=method,
                    density=density,
                    settings=settings,
                    steps=steps,
                    ranks=ranks,
                )


CELLS: list[Cell] = []
for length in STEPS:  # short runs first
    for (task, optimizer), settings in SETTINGS.items():
        CELLS.append(Cell(model=task, optimizer=optimizer, method="dense", settings=settings, steps=length, ranks=1))
        CELLS += compressed(task, optimizer, length)
