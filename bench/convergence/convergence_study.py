"""The parts of a convergence study: cells, and the command lines of their runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import options
import study_data
from launching import HERE


class StudyError(ValueError):
    """A study cannot be used; the message names the file or cell and the reason."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A training script and the options that all its runs share.

    Attributes:
        script: Name of a file in this folder.
        steps: Number of updates of a run.
        flags: Options by name, with underscores for hyphens.
        evaluations: Number of evaluations of a run, evenly spaced, in addition to the early ones.
        needs: File or folder that ``study_data.py`` makes and the script reads; None if it reads none.
    """

    script: str
    steps: int
    flags: Mapping[str, Any]
    evaluations: int = 30
    needs: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of training, dense or compressed.

    Attributes:
        title: Its name in tables.
        flags: Options of the training script by name.
    """

    title: str
    flags: Mapping[str, Any]


def light(script: str, flags: Mapping[str, Any], needs: Path | None = None) -> Model:
    """Returns a task of transfer_cells.py: few evaluations on much data, since its ranks share two cores."""
    return Model(script=script, steps=3000, flags={**flags, "skip_early_evals": True}, evaluations=4, needs=needs)


CODE: dict[str, Any] = {"global_batch": 16, "block": 64, "held_out": 64}
PROSE = CODE | {"text": str(study_data.PROSE)}
MODELS = {
    "gpt": Model(script="study_gpt.py", steps=3000, flags={"size": "tiny", "batch": 8, "block": 64}),
    "digits": Model(script="study_digits.py", steps=1000, flags={"batch": 16}),
    "code": light("study_gpt.py", CODE | {"size": "tiny"}),
    "prose": light("study_gpt.py", PROSE | {"size": "tiny"}, study_data.PROSE),
    "cnn": light("study_fashion.py", {"global_batch": 64}, study_data.FASHION),
    "lstm": light("study_lstm.py", CODE),
    "tied": light("study_gpt.py", PROSE | {"size": "short"}, study_data.PROSE),
    "prose-25m": replace(light("study_gpt.py", PROSE | {"size": "25m", "held_out": 8}, study_data.PROSE), steps=400),
}
METHODS = {
    "dense": Method(title="dense", flags={"compressor": "none"}),
    "topk": Method(title="top-k", flags={"compressor": "topk", "feedback": "ef"}),
    "dgc": Method(title="DGC", flags={"compressor": "topk", "feedback": "dgc"}),
    "ahead": Method(title="step-ahead", flags={"compressor": "topk", "feedback": "ahead"}),
    "adam-topk": Method(title="Adam, then top-k", flags={"compressor": "topk", "feedback": "adam"}),
    "fp16": Method(title="fp16", flags={"compressor": "fp16"}),
    "powersgd-r4": Method(title="PowerSGD rank 4", flags={"compressor": "powersgd-r4"}),
    "powersgd-r1": Method(title="PowerSGD rank 1", flags={"compressor": "powersgd-r1"}),
    "silent": Method(title="no exchange", flags={"compressor": "silent"}),
    "drop": Method(title="top-k, rest dropped", flags={"compressor": "topk", "feedback": "none"}),
}
CHECKPOINTS = 4  # in a run; an interruption costs at most the steps between two of them
SET_BY_THE_DRIVER = {
    *("seed", "steps", "judge", "eval_every", "skip_early_evals", "out", "resume", "save_every", "stop_after"),
    *("log", "plot"),
}
SETTABLE = {f.name for f in fields(options.Settings)} - SET_BY_THE_DRIVER - {"optimizer", "density", "progress"}
SETTABLE |= {"size", "block", "text", "held_out", "data"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line of the table: a method with its settings, trained once per seed.

    Attributes:
        model: Key of ``MODELS``.
        optimizer: "adamw" or "sgd".
        method: Key of ``METHODS``.
        density: Density; None with methods that select no elements.
        settings: Options of the training script by name, with underscores for hyphens, e.g. ``{"lr": 3e-3}``.
        grid: Values that ``--tune`` tries, by name of a setting; every combination is run.
        seeds: Seeds of the reported runs.
        steps: Number of updates; None for the model's.
        ranks: Number of processes; None for that of the command line.
    """

    model: str
    optimizer: str
    method: str
    density: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    steps: int | None = None
    ranks: int | None = None

    @property
    def name(self) -> str:
        """Name of the cell on the command line and on disk."""
        parts = [self.model, self.optimizer, self.method]
        parts += [f"{self.density:g}"] if self.density is not None else []
        parts += [f"p{self.ranks}"] if self.ranks is not None else []
        return "-".join([*parts, *([str(self.steps)] if self.steps is not None else [])])

    @property
    def total_steps(self) -> int:
        """Number of updates of a run without ``--steps``."""
        return MODELS[self.model].steps if self.steps is None else self.steps

    def tries(self) -> list[dict[str, Any]]:
        """Returns the points of the grid as settings; none without a grid."""
        if not self.grid:
            return []
        return [dict(zip(self.grid, point, strict=True)) for point in itertools.product(*self.grid.values())]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Conditions that the runs of a study share.

    Attributes:
        judge: "validation" to tune, "test" to report.
        ranks: Number of processes of the cells that do not say it.
        steps: Number of updates in place of the model's. Longer cells and the density warm-up are scaled alike.
        evaluations: Number of evaluations of a run in place of the model's.
        place: Facts of the machine and the network on which times depend. Runs in another place are different runs.
            Empty where only losses matter.
    """

    judge: str
    ranks: int
    steps: int | None = None
    evaluations: int | None = None
    place: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training with its options and files.

    Attributes:
        cell: Cell of the run.
        title: Name of the run within the study.
        flags: Every option of the script that shapes the run.
        ranks: Number of processes.
        folder: Folder of all runs that differ only in their seed. Its name holds a digest of the other options, so
            that a run with other settings is never taken for this one.
    """

    cell: Cell
    title: str
    flags: Mapping[str, Any]
    ranks: int
    folder: Path

    @property
    def seed(self) -> int:
        """Random seed of model and batches."""
        return int(self.flags["seed"])

    @property
    def log(self) -> Path:
        """Path of the log, which is written at the end of the run."""
        return self.folder / f"seed-{self.seed}.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints from which a half run continues."""
        return self.folder / f"seed-{self.seed}.checkpoints"

    @property
    def output(self) -> Path:
        """Path of the run's printed output."""
        return self.folder / f"seed-{self.seed}.txt"

    def command(self, *, resume: bool) -> list[str]:
        """Returns script and options, which follow the launcher and the interpreter."""
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
    cell: Cell, out: Path, conditions: Conditions, *, seed: int, point: Mapping[str, Any] | None = None
) -> Run:
    """Returns the run of one seed.

    Args:
        cell: Cell of the run.
        out: Folder of the study.
        conditions: Judge, ranks, steps and place; runs that differ in any of them are different runs.
        seed: Seed of model and batches.
        point: Settings that replace those of the cell.
    """
    total = cell.total_steps
    if conditions.steps is not None:
        total = max(1, conditions.steps * total // MODELS[cell.model].steps)
    settings = {**cell.settings, **(point or {})}
    if settings.get("warmup_steps"):
        stages = len(settings.get("warmup_densities", (0, 0, 0))) if settings.get("warmup_kind") != "exp" else 1
        settings["warmup_steps"] = settings["warmup_steps"] * total // cell.total_steps // stages * stages
    flags = {**MODELS[cell.model].flags, **METHODS[cell.method].flags, "optimizer": cell.optimizer, **settings}
    if cell.density is not None:
        flags["density"] = cell.density
    flags |= {"steps": total, "judge": conditions.judge}
    flags["eval_every"] = max(1, total // (conditions.evaluations or MODELS[cell.model].evaluations))
    ranks = conditions.ranks if cell.ranks is None else cell.ranks
    place = [dict(conditions.place)] if conditions.place else []
    digest = hashlib.sha256(json.dumps([ranks, flags, *place], sort_keys=True).encode()).hexdigest()[:8]
    title = " ".join([f"{cell.name} seed {seed}", *(f"{name} {value}" for name, value in (point or {}).items())])
    folder = out / "runs" / f"{cell.name}.{digest}"
    return Run(cell=cell, title=title, flags=flags | {"seed": seed}, ranks=ranks, folder=folder)


def load_study(path: Path) -> list[Cell]:
    """Reads a study: a Python file that defines ``CELLS``, a list of ``Cell``.

    Raises:
        StudyError: The file cannot be read, or a cell is not valid.
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
    for name, (value, choices) in known.items():
        if value not in choices:
            raise StudyError(f"{name} {value!r} is not one of {', '.join(choices)}")
    if cell.optimizer not in options.WEIGHT_DECAY:
        raise StudyError(f"{cell.name}: optimizer {cell.optimizer!r} is not one of {', '.join(options.WEIGHT_DECAY)}")
    if (cell.density is None) == (METHODS[cell.method].flags["compressor"] in options.SPARSE):
        raise StudyError(f"{cell.name}: density is {cell.density}, but the method is {cell.method}")
    unknown = sorted({*cell.settings, *cell.grid} - SETTABLE)
    if unknown:
        raise StudyError(f"{cell.name}: a cell cannot set {', '.join(unknown)}; it can {', '.join(sorted(SETTABLE))}")
    if not cell.seeds or len(set(cell.seeds)) != len(cell.seeds):
        raise StudyError(f"{cell.name}: seeds must be different numbers, got {list(cell.seeds)}")
    if cell.total_steps < 1:
        raise StudyError(f"{cell.name}: steps must be positive, got {cell.steps}")
    if cell.ranks is not None and cell.ranks < 1:
        raise StudyError(f"{cell.name}: ranks must be positive, got {cell.ranks}")


def check_data(cells: Sequence[Cell]) -> None:
    """Checks that the data of the cells are there.

    Raises:
        StudyError: Data are missing; the message says what to run.
    """
    for cell in cells:
        needs = MODELS[cell.model].needs
        if needs is not None and not needs.exists():
            raise StudyError(f"{cell.model} needs {needs}, which is missing{study_data.hint(needs)}")


def _check_tries(cells: Sequence[Cell]) -> None:
    """Checks that all methods of a model and an optimizer are tuned with as many tries: else the study is not fair."""
    tuned: dict[tuple[str, str], Cell] = {}
    for cell in filter(lambda c: c.grid, cells):
        first = tuned.setdefault((cell.model, cell.optimizer), cell)
        if len(cell.tries()) != len(first.tries()):
            raise StudyError(
                f"{cell.name} would be tuned with {len(cell.tries())} tries, {first.name} with {len(first.tries())}: "
                "give every method the same number"
            )
