"""The table of transfer_cells.py: the gap of every cell to dense, and a summary against the goals."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from convergence_report import Logs, method_name
from convergence_study import Cell
from run_log import RunLog, replace_file

from sparsecomm.tools.benches import meta

SHORT = 3000  # steps; the goals of shorter runs are weaker
LIMIT = 0.03  # no cell of at least SHORT steps may be above it
LISTED = 20  # missing runs that the text names
FIRST, WINDOW = 10, 10  # steps


@dataclass(frozen=True, kw_only=True)
class Gap:
    """One line of the table. Losses are means over the seeds that both the method and dense have.

    Attributes:
        cell: Name of the cell.
        task: Model and data.
        optimizer: Optimizer of the cell.
        method: Method of the cell, with its density.
        density: Density of the cell.
        ranks: Number of processes.
        steps: Number of updates of a run.
        seeds: The common seeds.
        missing: The other seeds of the cell.
        dense_loss: Dense's held-out loss at the end.
        loss: The method's.
        gap: ``loss`` over ``dense_loss``, minus 1.
        ratio: Bytes of an fp32 ring allreduce in all steps over those that one rank sent, warm-up included.
        dense_jump: ``jump`` of dense, the highest over seeds.
        jump: ``jump`` of the method.
        goal: Gap that is allowed.
    """

    cell: str
    task: str
    optimizer: str
    method: str
    density: float
    ranks: int
    steps: int
    seeds: list[int]
    missing: list[int]
    dense_loss: float
    loss: float
    gap: float
    ratio: float
    dense_jump: float
    jump: float
    goal: float

    @property
    def misses(self) -> bool:
        """Whether the gap is beyond the goal."""
        return self.gap > self.goal

    @property
    def above_limit(self) -> bool:
        """Whether a run that is not short is above the limit of all cells."""
        return self.steps >= SHORT and self.gap > LIMIT


def goal(density: float, steps: int) -> float:
    """Returns the largest gap that is allowed: 1% at a density of 1%, 2% below, and three times as much early."""
    allowed = 0.01 if density >= 0.01 else 0.02
    return allowed if steps >= SHORT else 3 * allowed


def jump(log: RunLog) -> float:
    """Returns how far the training loss rose at worst: a loss after step 10 over the smallest loss before it.

    The smallest loss before is the lowest mean of ten successive steps, since the loss of one small batch can be low
    by chance. A run without a jump is a little above 1. One that ends within 11 steps has 0.
    """
    losses = [row.train_loss for row in log.rows if row.train_loss is not None]
    lowest, worst = float("inf"), 0.0
    for i in range(max(FIRST, WINDOW), len(losses)):
        lowest = min(lowest, statistics.fmean(losses[i - WINDOW : i]))
        worst = max(worst, losses[i] / lowest)
    return worst


def compare(cell: Cell, logs: Logs, dense: Logs) -> Gap | None:
    """Compares a compressed cell with dense; None without a common seed."""
    seeds = sorted(logs.keys() & dense.keys())
    if not seeds or cell.density is None:
        return None
    ours, theirs = [logs[seed] for seed in seeds], [dense[seed] for seed in seeds]
    first = ours[0].meta
    loss, dense_loss = (statistics.fmean(log.evaluated()[-1][1] for log in each) for each in (ours, theirs))
    sent = statistics.fmean(log.rows[-1].bytes_sent for log in ours)
    return Gap(
        cell=cell.name,
        task=cell.model,
        optimizer=cell.optimizer,
        method=method_name(cell),
        density=cell.density,
        ranks=int(first["world_size"]),
        steps=int(first["steps"]),
        seeds=seeds,
        missing=[seed for seed in cell.seeds if seed not in seeds],
        dense_loss=dense_loss,
        loss=loss,
        gap=loss / dense_loss - 1.0,
        ratio=int(first["dense_bytes_per_step"]) * int(first["steps"]) / sent if sent else float("inf"),
        dense_jump=max(map(jump, theirs)),
        jump=max(map(jump, ours)),
        goal=goal(cell.density, int(first["steps"])),
    )


def all_gaps(cells: Sequence[Cell], logs: dict[str, Logs], dense_cells: Sequence[Cell]) -> list[Gap]:
    """Compares every compressed cell that has runs.

    Args:
        cells: Cells of the table.
        logs: Finished runs by the name of a cell, those of ``dense_cells`` among them.
        dense_cells: The baselines. Each belongs to the cells of its model, optimizer and length.
    """
    dense = {(c.model, c.optimizer, c.total_steps): logs[c.name] for c in dense_cells}
    found = (compare(c, logs[c.name], dense.get((c.model, c.optimizer, c.total_steps), {})) for c in cells)
    return [gap for gap in found if gap is not None]


HEADINGS = (
    *("task", "optimizer", "method", "ranks", "steps", "dense's loss", "loss", "gap", "goal"),
    *("fewer bytes in the run", "jump", "dense's jump", "seeds"),
)
TERMINAL = ("dense's loss", "loss", "gap", "fewer bytes in the run", "jump", "dense's jump", "seeds")


def line(gap: Gap) -> list[str]:
    """Returns the fields of a gap in the order of ``HEADINGS``."""
    g = gap
    note = " (above the limit)" if g.above_limit else " (misses)" if g.misses else ""
    return [
        *(g.task, g.optimizer, g.method, str(g.ranks), f"{g.steps:,}", f"{g.dense_loss:.4f}", f"{g.loss:.4f}"),
        *(f"{100 * g.gap:+.2f}%{note}", f"{100 * g.goal:g}%", f"{g.ratio:.1f}x", f"{g.jump:.2f}"),
        *(f"{g.dense_jump:.2f}", f"{len(g.seeds)} of {len(g.seeds) + len(g.missing)}"),
    ]


SUMMARY = (
    *("method", "optimizer", "cells", "mean gap", "worst gap", "worst cell", "beyond the goal", "above the limit"),
    "worst jump over dense's",
)


def summary(gaps: Sequence[Gap]) -> list[list[str]]:
    """Returns one row per method, density and optimizer, in the order of ``SUMMARY``."""

    def key(gap: Gap) -> tuple[str, str, float]:
        return gap.optimizer, gap.method, gap.density

    rows = []
    for _, group in groupby(sorted(gaps, key=key), key):
        some = list(group)
        worst = max(some, key=lambda g: g.gap)
        relative = [g.jump / g.dense_jump for g in some if g.dense_jump]
        rows.append(
            [
                *(
                    worst.method,
                    worst.optimizer,
                    str(len(some)),
                    f"{100 * statistics.fmean(g.gap for g in some):+.2f}%",
                ),
                *(f"{100 * worst.gap:+.2f}%", worst.cell, str(sum(g.misses for g in some))),
                *(str(sum(g.above_limit for g in some)), f"{max(relative):.2f}" if relative else "-"),
            ]
        )
    return rows


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows)]


def markdown(gaps: Sequence[Gap], missing: Sequence[str]) -> str:
    """Returns the text: the summary, the cells beyond the goal, the table and the missing runs."""
    beyond = [gap for gap in sorted(gaps, key=lambda g: g.goal - g.gap) if gap.misses]
    text = ["# Gaps to dense", "", *_table(SUMMARY, summary(gaps)), ""]
    text += [f"Goals: within 1% of dense at a density of 1%, within 2% below, from {SHORT:,} steps on; three times as "]
    text[-1] += f"much in shorter runs. No cell of at least {SHORT:,} steps above {100 * LIMIT:g}%."
    text += ["", f"Beyond the goal: {', '.join(f'{g.cell} ({100 * g.gap:+.2f}%)' for g in beyond) or 'no cell'}.", ""]
    text += [*_table(HEADINGS, [line(gap) for gap in gaps]), ""]
    more = ["..."] if len(missing) > LISTED else []
    named = f" ({', '.join([*missing[:LISTED], *more])})" if missing else ""
    text += [f"Missing runs: {len(missing)}{named}.", ""]
    return "\n".join(text)


def write(out: Path, gaps: Sequence[Gap], missing: Sequence[str]) -> list[Path]:
    """Writes gaps.md and gaps.json and returns their paths."""
    paths = [out / "gaps.md", out / "gaps.json"]
    rows = [asdict(gap) | {"misses": gap.misses, "above_limit": gap.above_limit} for gap in gaps]
    document = {"meta": meta() | {"missing": list(missing)}, "rows": rows}
    replace_file(paths[0], markdown(gaps, missing).encode())
    replace_file(paths[1], (json.dumps(document, indent=1) + "\n").encode())
    return paths
