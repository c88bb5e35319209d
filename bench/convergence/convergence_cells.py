"""The cells of the study: dense and top-k at 1% and 0.1%, with two optimizers and two models.

Tuned settings belong here. All methods of one model and optimizer have grids of the same size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from convergence_study import Cell

RATES = {
    ("gpt", "adamw"): (1.5e-3, 3e-3, 6e-3),
    ("gpt", "sgd"): (0.1, 0.3, 1.0),
    ("digits", "adamw"): (1e-3, 3e-3, 1e-2),
    ("digits", "sgd"): (0.03, 0.1, 0.3),
}


def cell(model: str, optimizer: str, method: str, density: float | None, **settings: Any) -> Cell:
    """Returns a cell with the grid of its model and optimizer."""
    averaging: dict[str, tuple[float, ...]] = (
        {"beta1": (0.5, 0.9)} if optimizer == "adamw" else {"momentum": (0.5, 0.9)}
    )
    grid = {"lr": RATES[model, optimizer], **averaging}
    return Cell(model=model, optimizer=optimizer, method=method, density=density, settings=settings, grid=grid)


EXP = {"warmup_kind": "exp"}
CELLS = [
    cell("gpt", "adamw", "dense", None, lr=3e-3, beta1=0.9),
    cell("gpt", "adamw", "adam-topk", 0.001, lr=6e-3, beta1=0.5, warmup_steps=1500, **EXP),
    cell("gpt", "adamw", "adam-topk", 0.01, lr=6e-3, beta1=0.5, warmup_steps=1500, **EXP),
    cell("gpt", "adamw", "topk", 0.01, lr=6e-3, beta1=0.5, warmup_steps=1500, **EXP),
    cell("gpt", "adamw", "topk", 0.001, lr=6e-3, beta1=0.5, warmup_steps=1500, **EXP),
    cell("gpt", "sgd", "dense", None, lr=0.1, momentum=0.9),
    cell("gpt", "sgd", "dgc", 0.01, lr=0.3, momentum=0.9, warmup_steps=1500, **EXP),
    cell("gpt", "sgd", "dgc", 0.001, lr=1.0, momentum=0.5, warmup_steps=1500, **EXP),
    cell("gpt", "sgd", "topk", 0.01, lr=0.3, momentum=0.9, warmup_steps=1500, **EXP),
    cell("gpt", "sgd", "topk", 0.001, lr=0.3, momentum=0.9, warmup_steps=1500, **EXP),
    cell("digits", "adamw", "dense", None, lr=3e-3, beta1=0.9),
    cell("digits", "adamw", "adam-topk", 0.01, lr=3e-3, beta1=0.5, warmup_steps=300, **EXP),
    cell("digits", "adamw", "adam-topk", 0.001, lr=3e-3, beta1=0.5, warmup_steps=300, **EXP),
    cell("digits", "adamw", "topk", 0.01, lr=3e-3, beta1=0.5, warmup_steps=300, **EXP),
    cell("digits", "adamw", "topk", 0.001, lr=3e-3, beta1=0.5, warmup_steps=300, **EXP),
    cell("digits", "sgd", "dense", None, lr=0.3, momentum=0.9),
    cell("digits", "sgd", "dgc", 0.01, lr=0.3, momentum=0.9, warmup_steps=300, **EXP),
    cell("digits", "sgd", "dgc", 0.001, lr=0.3, momentum=0.9, warmup_steps=300, **EXP),
    cell("digits", "sgd", "topk", 0.01, lr=0.1, momentum=0.9, warmup_steps=300, **EXP),
    cell("digits", "sgd", "topk", 0.001, lr=0.1, momentum=0.9, warmup_steps=300, **EXP),
]
# Longer runs show how many steps it takes to reach dense's final loss. They are last, so that they run last.
CELLS += [
    replace(c, steps=4500, grid={})
    for c in CELLS
    if c.model == "gpt" and c.method in ("adam-topk", "dgc") and c.density
]
