"""A study that cannot be tuned to: five tasks, four numbers of ranks and three lengths, one choice of settings.

    python bench/convergence/convergence.py --study bench/convergence/transfer_cells.py --only 'cnn-adamw-*'

A method may be chosen on ``code``. On the other tasks it is then run unchanged: it takes the optimizer settings of
dense there, whatever they are. The global batch of a task is the same for every number of ranks, and so is dense
training, to rounding: it is run once, in one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from convergence_study import Cell

STEPS = (800, 3000, 10000)
RANKS = (2, 4, 8, 16)
DENSITIES = (0.01, 0.001)
# Dense's rate, and the rates that --tune tries after 800 steps, on validation data and with another seed. At 1e-2 the
# GPTs on prose end anywhere, by seed; their rate is the best of three seeds. README.md has the losses.
RATES: dict[tuple[str, str], tuple[float, tuple[float, ...]]] = {
    ("code", "adamw"): (3e-3, (1e-3, 3e-3, 1e-2)),
    ("code", "sgd"): (0.1, (0.03, 0.1, 0.3)),
    ("prose", "adamw"): (3e-3, (3e-3, 1e-2, 3e-2)),
    ("prose", "sgd"): (0.3, (0.1, 0.3, 1.0)),
    ("cnn", "adamw"): (1e-2, (3e-3, 1e-2, 3e-2)),
    ("cnn", "sgd"): (0.1, (0.03, 0.1, 0.3)),
    ("lstm", "adamw"): (3e-2, (1e-2, 3e-2, 1e-1)),
    ("lstm", "sgd"): (3.0, (1.0, 3.0, 10.0)),
    ("tied", "adamw"): (3e-3, (3e-3, 1e-2, 3e-2)),
    ("tied", "sgd"): (0.1, (0.03, 0.1, 0.3)),
}
AVERAGING = {"adamw": {"beta1": 0.9}, "sgd": {"momentum": 0.9}}
# Keys of METHODS in convergence_study.py, which gives each its options. A new method is one entry there and one here.
METHODS: dict[str, tuple[str, ...]] = {"adamw": ("topk", "adam-topk", "ahead"), "sgd": ("topk", "dgc", "ahead")}


def warm_up(method: str, density: float, steps: int) -> int:
    """Returns the steps over which the density falls from 25%."""
    if method == "topk":
        return 0
    if method == "ahead" and steps > min(STEPS):  # so that the whole run sends about 1% of dense's bytes
        return steps // 10 if density >= 0.01 else 2 * steps // 5
    return steps // 2


def cells(task: str, optimizer: str, steps: int) -> Iterator[Cell]:
    """Yields dense, and all methods, densities and ranks, of one task, optimizer and length."""
    best, tried = RATES[task, optimizer]
    dense = Cell(
        model=task,
        optimizer=optimizer,
        method="dense",
        settings={"lr": best, **AVERAGING[optimizer]},
        grid={"lr": tried} if steps == min(STEPS) else {},
        steps=steps,
        ranks=1,
    )
    yield dense
    for method in METHODS[optimizer]:
        for density, ranks in product(DENSITIES, RANKS):
            falling = warm_up(method, density, steps)
            settings = {**dense.settings, **({"warmup_kind": "exp", "warmup_steps": falling} if falling else {})}
            if method == "ahead":
                settings["value_codec"] = "int8"  # as in the presets
                if ranks > 2:  # an allgather sends P - 1 copies
                    settings["collective"] = "split_reduce"
            yield replace(dense, method=method, density=density, ranks=ranks, settings=settings, grid={})


# Short runs are first.
CELLS = [cell for steps in STEPS for task, optimizer in RATES for cell in cells(task, optimizer, steps)]
