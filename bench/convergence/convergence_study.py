"""What a convergence study is made of: cells, and the command lines of their runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import options
from launching import HERE


class StudyError(ValueError):
    """A study cannot be used; the message names the file or cell and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A training script and what all its runs have in common.

    Attributes:
        script: File beside this one.
        steps: Updates of a run.
        flags: Options by name, underscores for hyphens.
    """

    script: str
    steps: int
    flags: Mapping[str, Any]


MODELS = {
    "gpt": Model(script="study_gpt.py", steps=3000, flags={"size": "tiny", "batch": 8, "block": 64}),
    "digits": Model(script="study_digits.py", steps=1000, flags={"batch": 16}),
}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"compressor": "none"},
    "topk": {"compressor": "topk", "feedback": "ef"},
    "dgc": {"compressor": "topk", "feedback": "dgc"},
    "adam-topk": {"compressor": "topk", "feedback": "adam"},
    "drop": {"compressor": "topk", "feedback": "none"},
}
EVALUATIONS = 30  # of a run, evenly spaced, beside the early ones
CHECKPOINTS = 4  # of a run: what an interruption may cost
SET_BY_THE_DRIVER = {"seed", "steps", "judge", "eval_every", "out", "resume", "save_every", "stop_after", "log", "plot"}
SETTABLE = {f.name for f in fields(options.Settings)} - SET_BY_THE_DRIVER - {"optimizer", "density", "progress"}
SETTABLE |= {"size", "block", "text"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line of the table: a method with its settings, trained once a seed.

    Attributes:
        model: Of ``MODELS``.
        optimizer: "adamw" or "sgd".
        method: Of ``METHODS``.
        density: Share sent; None with "dense".
        settings: Options of the training script by name, underscores for hyphens, e.g. ``{"lr": 3e-3}``.
        grid: What ``--tune`` tries: values by name of a setting; their product is run.
        seeds: Of the runs that are reported.
        steps: Updates; None for the model's.
    """

    model: str
    optimizer: str
    method: str
    density: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    steps: int | None = None

    @property
    def name(self) -> str:
        """Names the cell on the command line and on disk."""
        parts = [self.model, self.optimizer, self.method]
        parts += [f"{self.density:g}"] if self.density is not None else []
        return "-".join([*parts, *([str(self.steps)] if self.steps is not None else [])])

    @property
    def total_steps(self) -> int:
        """Updates of a run that nothing shortens."""
        return MODELS[self.model].steps if self.steps is None else self.steps

    def tries(self) -> list[dict[str, Any]]:
        """Points of the grid, as settings; none without a grid."""
        if not self.grid:
            return []
        return [dict(zip(self.grid, point, strict=True)) for point in itertools.product(*self.grid.values())]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: its options, and where it writes.

    Attributes:
        cell: The cell it belongs to.
        title: Names it among the runs of a study.
        flags: Every option of the script that shapes the run.
        folder: Shared by runs that differ by their seed alone; its name holds a digest of the other options, so that
            runs with other settings are never taken for this one.
    """

    cell: Cell
    title: str
    flags: Mapping[str, Any]
    folder: Path

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.flags["seed"])

    @property
    def log(self) -> Path:
        """Written when the run is over; its existence says so."""
        return self.folder / f"seed-{self.seed}.json"

    @property
    def checkpoints(self) -> Path:
        """Where a half run goes on."""
        return self.folder / f"seed-{self.seed}.checkpoints"

    @property
    def output(self) -> Path:
        """What the run printed."""
        return self.folder / f"seed-{self.seed}.txt"

    def command(self, *, resume: bool) -> list[str]:
        """Script and options, to follow the launcher and the interpreter."""
        words = [str(HERE / MODELS[self.cell.model].script)]
        for name, value in self.flags.items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words += [flag] if value else []
            else:
                text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
                words += [flag, text]
        words += ["--log", str(self.log), "--out", str(self.checkpoints), "--progress", "off"]
        words += ["--save-every", str(max(1, int(self.flags["steps"]) // CHECKPOINTS))]
        return words + (["--resume"] if resume else [])


def make_run(
    cell: Cell,
    out: Path,
    *,
    seed: int,
    judge: str,
    ranks: int,
    steps: int | None,
    point: Mapping[str, Any] | None = None,
) -> Run:
    """The run of one seed.

    Args:
        cell: Its cell.
        out: The study's folder.
        seed: Of model and batches.
        judge: "validation" to tune, "test" to report.
        ranks: Processes, which belong to what a run is.
        steps: Updates instead of the model's; a longer cell stays longer and the density warm-up is scaled alike.
        point: Settings that replace the cell's.
    """
    total = cell.total_steps if steps is None else max(1, steps * cell.total_steps // MODELS[cell.model].steps)
    settings = {**cell.settings, **(point or {})}
    if settings.get("warmup_steps"):
        stages = len(settings.get("warmup_densities", (0, 0, 0))) if settings.get("warmup_kind") != "exp" else 1
        settings["warmup_steps"] = settings["warmup_steps"] * total // cell.total_steps // stages * stages
    flags = {**MODELS[cell.model].flags, **METHODS[cell.method], "optimizer": cell.optimizer, **settings}
    if cell.density is not None:
        flags["density"] = cell.density
    flags |= {"steps": total, "eval_every": max(1, total // EVALUATIONS), "judge": judge}
    digest = hashlib.sha256(json.dumps([ranks, flags], sort_keys=True).encode()).hexdigest()[:8]
    title = " ".join([f"{cell.name} seed {seed}", *(f"{name} {value}" for name, value in (point or {}).items())])
    folder = out / "runs" / f"{cell.name}.{digest}"
    return Run(cell=cell, title=title, flags=flags | {"seed": seed}, folder=folder)


def load_study(path: Path) -> list[Cell]:
    """Read a study: a Python file that defines ``CELLS``, a list of ``Cell``.

    Raises:
        StudyError: It cannot be read, or a cell makes no sense.
    """
    try:
        content = runpy.run_path(str(path))
    except Exception as error:
        raise StudyError(f"cannot read the study {path}: {error!r}") from error
    cells = content.get("CELLS")
    if not isinstance(cells, list) or not cells or not all(isinstance(cell, Cell) for cell in cells):
        raise StudyError(f"{path} defines no CELLS = [Cell(...), ...]")
    for cell in cells:
        _check(cell)
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise StudyError(f"{path} has two cells named {name}")
    _check_tries(cells)
    return cells


def _check(cell: Cell) -> None:
    known: dict[str, tuple[str, Mapping[str, Any]]] = {"model": (cell.model, MODELS), "method": (cell.method, METHODS)}
    for what, (value, choices) in known.items():
        if value not in choices:
            raise StudyError(f"{what} {value!r} is not one of {', '.join(choices)}")
    if cell.optimizer not in options.WEIGHT_DECAY:
        raise StudyError(f"{cell.name}: optimizer {cell.optimizer!r} is not one of {', '.join(options.WEIGHT_DECAY)}")
    if (cell.density is None) != (cell.method == "dense"):
        raise StudyError(f"{cell.name}: density is {cell.density}, but the method is {cell.method}")
    unknown = sorted({*cell.settings, *cell.grid} - SETTABLE)
    if unknown:
        raise StudyError(f"{cell.name}: a cell cannot set {', '.join(unknown)}; it can {', '.join(sorted(SETTABLE))}")
    if not cell.seeds or len(set(cell.seeds)) != len(cell.seeds):
        raise StudyError(f"{cell.name}: seeds must be different numbers, got {list(cell.seeds)}")
    if cell.total_steps < 1:
        raise StudyError(f"{cell.name}: steps must be positive, got {cell.steps}")


def _check_tries(cells: Sequence[Cell]) -> None:
    """Methods are compared fairly only if each was tuned with as many tries."""
    tuned: dict[tuple[str, str], Cell] = {}
    for cell in filter(lambda c: c.grid, cells):
        first = tuned.setdefault((cell.model, cell.optimizer), cell)
        if len(cell.tries()) != len(first.tries()):
            raise StudyError(
                f"{cell.name} would be tuned with {len(cell.tries())} tries, {first.name} with {len(first.tries())}: "
                "give every method the same number"
            )
