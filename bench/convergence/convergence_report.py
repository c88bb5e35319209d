"""The tables and pictures of a convergence study, made from the finished runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compare_runs import having_sent, summarise
from convergence_study import METHODS, Cell
from options import TRAJECTORY
from run_log import RunLog, replace_file

from sparsecomm.tools.benches import meta


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and range of a number over seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Returns the spread of at least one value."""
        return cls(mean=statistics.fmean(values), low=min(values), high=max(values))


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the table. Unknown numbers are None.

    Attributes:
        cell: Name of the cell.
        model: Model of the cell.
        optimizer: Optimizer of the cell.
        method: Method of the cell, with its density, and its steps if they are not the model's.
        settings: Every option that shapes the runs, by name.
        steps: Number of updates of a run.
        seeds: Seeds of the finished runs.
        missing: Seeds of the missing runs.
        loss: Held-out loss after the last step.
        accuracy: Share of held-out examples classified correctly.
        loss_over_dense: Mean loss over dense's mean loss, minus 1, on the seeds that both have.
        accuracy_points: Accuracy minus dense's accuracy, in percentage points.
        bytes_in_all: Bytes sent by one rank in a run, mean over seeds.
        bytes_per_step: Bytes sent by one rank in a step after the density warm-up, mean over seeds.
        fewer: Bytes of an fp32 ring allreduce over ``bytes_per_step``.
        dense_at_equal_bytes: Dense's mean loss when it had sent as many bytes as the whole run.
        dense_steps_at_equal_bytes: Step of that loss, the latest over seeds.
        steps_to_dense: First evaluated step with a loss no higher than dense's final loss, mean over seeds.
        seeds_that_reach_dense: Number of compared seeds with such a step.
        compared: Number of seeds that both have.
    """

    cell: str
    model: str
    optimizer: str
    method: str
    settings: dict[str, Any]
    steps: int
    seeds: list[int]
    missing: list[int]
    loss: Spread
    accuracy: Spread | None
    loss_over_dense: float | None
    accuracy_points: float | None
    bytes_in_all: float
    bytes_per_step: float
    fewer: float | None
    dense_at_equal_bytes: float | None
    dense_steps_at_equal_bytes: int | None
    steps_to_dense: float | None
    seeds_that_reach_dense: int
    compared: int


Logs = dict[int, RunLog]  # by seed


def method_name(cell: Cell) -> str:
    """Returns the name of the method with its density."""
    density = f" {100 * cell.density:g}%" if cell.density is not None else ""
    return METHODS[cell.method].title + density


def reduce(cell: Cell, logs: Logs, dense: Logs) -> Result:
    """Reduces the runs of a cell to one line.

    Args:
        cell: The cell.
        logs: Finished runs, at least one.
        dense: Finished runs, possibly none, of the dense cell with the same model and optimizer.
    """
    summaries = [summarise(log) for log in logs.values()]
    last = {seed: log.rows[-1] for seed, log in logs.items()}
    accuracies = [row.val_accuracy for row in last.values() if row.val_accuracy is not None]
    first = next(iter(logs.values())).meta
    ratios = [s.ratio for s in summaries if s.ratio is not None]
    return Result(
        cell=cell.name,
        model=cell.model,
        optimizer=cell.optimizer,
        method=method_name(cell) + (f", {cell.steps} steps" if cell.steps is not None else ""),
        settings={name: first.get(name) for name in TRAJECTORY if name not in ("seed", "steps", "optimizer")},
        steps=int(first["steps"]),
        seeds=sorted(logs),
        missing=[seed for seed in cell.seeds if seed not in logs],
        loss=Spread.of([s.val_loss for s in summaries]),
        accuracy=Spread.of(accuracies) if accuracies else None,
        bytes_in_all=statistics.fmean(s.total_bytes for s in summaries),
        bytes_per_step=statistics.fmean(s.bytes_per_step for s in summaries),
        fewer=statistics.fmean(ratios) if ratios else None,
        **_against(logs, dense if cell.method != "dense" else {}),
    )


def _against(logs: Logs, dense: Logs) -> dict[str, Any]:
    """Returns the fields of a ``Result`` that compare with dense, seed by seed."""
    pairs = [(logs[seed], dense[seed]) for seed in sorted(logs.keys() & dense.keys())]
    names = ("loss_over_dense", "accuracy_points", "dense_at_equal_bytes", "dense_steps_at_equal_bytes")
    found: dict[str, Any] = dict.fromkeys(names) | {"steps_to_dense": None, "seeds_that_reach_dense": 0}
    found["compared"] = len(pairs)
    if not pairs:
        return found
    ends = [(ours.evaluated()[-1], theirs.evaluated()[-1]) for ours, theirs in pairs]
    found["loss_over_dense"] = sum(a for (_, a), _ in ends) / sum(b for _, (_, b) in ends) - 1.0
    points = [
        100 * (a.val_accuracy - b.val_accuracy)
        for (a, _), (b, _) in ends
        if a.val_accuracy is not None and b.val_accuracy is not None
    ]
    found["accuracy_points"] = statistics.fmean(points) if points else None
    equal = [having_sent(theirs, ours.rows[-1].bytes_sent) for ours, theirs in pairs]
    found["dense_at_equal_bytes"] = statistics.fmean(loss for _, loss in equal)
    found["dense_steps_at_equal_bytes"] = max(row.step for row, _ in equal)
    reached = [step for a, b in pairs if (step := steps_to(a, b.evaluated()[-1][1])) is not None]
    found["seeds_that_reach_dense"] = len(reached)
    if len(reached) == len(pairs):
        found["steps_to_dense"] = statistics.fmean(reached)
    return found


def steps_to(log: RunLog, loss: float) -> int | None:
    """Returns the first evaluated step whose loss is at most ``loss``, or None."""
    return next((row.step for row, value in log.evaluated() if value <= loss), None)


def settings_text(settings: dict[str, Any]) -> str:
    """Returns the settings that differ from cell to cell, as text for a table."""
    parts = [f"lr {settings['lr']:g}"]
    parts += [f"{name} {settings[name]:g}" for name in ("beta1", "momentum") if settings[name] is not None]
    parts += ["Nesterov"] if settings["nesterov"] else []
    if settings["warmup_steps"]:
        densities = [f"{100 * d:g}%" for d in settings["warmup_densities"]]
        stages = f"stages {', '.join(densities)}"
        schedule = f"falling from {densities[0]}" if settings["warmup_kind"] == "exp" else stages
        parts.append(f"{settings['warmup_steps']} warm-up steps {schedule}")
    return ", ".join(parts)


def _common(results: Sequence[Result]) -> str:
    """Returns the settings that rarely differ between the cells of a model and an optimizer, as text."""
    names = ("batch", "clip", "value_codec", "index_codec", "collective", "judge", "weight_decay")
    lines = []
    for key in dict.fromkeys((r.model, r.optimizer) for r in results):
        values = {n: {str(r.settings[n]) for r in results if (r.model, r.optimizer) == key} for n in names}
        text = ", ".join(f"{n.replace('_', ' ')} {' or '.join(sorted(v))}" for n, v in values.items())
        lines.append(f"{key[0]}, {key[1]}: {text}")
    return "; ".join(lines)


HEADINGS = (
    *("model", "optimizer", "method", "settings", "steps", "loss (min-max)", "against dense", "accuracy (min-max)"),
    *("MB in all", "bytes a step after warm-up", "fewer than dense", "dense's loss at equal bytes"),
    *("steps to dense's final loss", "seeds"),
)
TERMINAL = (
    *("loss (min-max)", "against dense", "MB in all", "fewer than dense"),
    *("steps to dense's final loss", "seeds"),
)


def line(result: Result) -> list[str]:
    """Returns the fields of a result in the order of ``HEADINGS``."""
    r = result
    accuracy = against = "-"
    if r.accuracy is not None:
        accuracy = f"{100 * r.accuracy.mean:.2f}% ({100 * r.accuracy.low:.2f}-{100 * r.accuracy.high:.2f})"
    if r.loss_over_dense is not None:
        against = f"{100 * r.loss_over_dense:+.1f}%"
    if r.accuracy_points is not None:
        against += f", {r.accuracy_points:+.2f} points"
    equal = needed = "-"
    if r.dense_at_equal_bytes is not None:
        equal = f"{r.dense_at_equal_bytes:.4f} (step {r.dense_steps_at_equal_bytes})"
    if r.compared:
        some = f" ({r.seeds_that_reach_dense} of {r.compared} seeds did)" if r.seeds_that_reach_dense else ""
        needed = f"{r.steps_to_dense:,.0f}" if r.steps_to_dense is not None else f"not in {r.steps:,}{some}"
    return [
        *(r.model, r.optimizer, r.method, settings_text(r.settings), f"{r.steps:,}"),
        f"{r.loss.mean:.4f} ({r.loss.low:.4f}-{r.loss.high:.4f})",
        *(against, accuracy, f"{r.bytes_in_all / 1e6:,.1f}", f"{r.bytes_per_step:,.0f}"),
        *("-" if r.fewer is None else f"{r.fewer:.1f}x", equal, needed),
        f"{len(r.seeds)} of {len(r.seeds) + len(r.missing)}",
    ]


def markdown(results: Sequence[Result], missing: Sequence[str], tuning: Sequence[dict[str, Any]]) -> str:
    """Returns the text of the report: the table, the missing runs and the tuning."""
    rows = [list(HEADINGS), ["---"] * len(HEADINGS), *(line(r) for r in results)]
    text = ["# Convergence", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    if results:
        text += [f"Common settings: {_common(results)}. Bytes are those that one rank sends, headers included.", ""]
    text += [f"Missing runs: {', '.join(missing) if missing else 'none'}.", ""]
    if tuning:
        text += [
            "| tuned cell | tries | failed | steps | best | loss on validation data |",
            "|---|---|---|---|---|---|",
        ]
        for one in tuning:
            best = next((row for row in one["rows"] if row["val_loss"] is not None), None)
            named = "none" if best is None else ", ".join(f"{k} {v}" for k, v in best["settings"].items())
            failed = sum(row["val_loss"] is None for row in one["rows"])
            loss = "-" if best is None else f"{best['val_loss']:.4f}"
            name, steps = one["meta"]["cell"], one["meta"]["steps"]
            text.append(f"| {name} | {len(one['rows'])} | {failed} | {steps} | {named} | {loss} |")
        text.append("")
    return "\n".join(text)


def write(
    out: Path,
    results: Sequence[Result],
    logs: dict[str, Logs],
    missing: Sequence[str],
    tuning: Sequence[dict[str, Any]],
) -> list[Path]:
    """Writes report.md, report.json, and a PNG and an SVG per model; returns the paths."""
    document = {
        "meta": meta() | {"missing": list(missing), "tuning": list(tuning)},
        "rows": [asdict(result) for result in results],
    }
    paths = [out / "report.md", out / "report.json"]
    replace_file(paths[0], markdown(results, missing, tuning).encode())
    replace_file(paths[1], (json.dumps(document, indent=1) + "\n").encode())
    for model in dict.fromkeys(r.model for r in results):
        paths += draw([r for r in results if r.model == model], logs, out / f"{model}.png")
    return paths


def draw(results: Sequence[Result], logs: dict[str, Logs], path: Path) -> tuple[Path, Path]:
    """Draws mean and range of the loss against steps and bytes, one row of pictures per optimizer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    optimizers = list(dict.fromkeys(r.optimizer for r in results))
    size = (11.0, 4.2 * len(optimizers))
    figure, axes = plt.subplots(len(optimizers), 2, figsize=size, squeeze=False, sharey=True, layout="constrained")
    colours = ("#4c4c4c", "#d1495b", "#00798c", "#edae49", "#6a4c93", "#8ab17d")
    for optimizer, (by_steps, by_bytes) in zip(optimizers, axes, strict=True):
        by_steps.set(title=f"{results[0].model}, {optimizer}: at equal steps", xlabel="step")
        by_bytes.set(title="at equal bytes", xlabel="bytes sent per rank (MB, log scale)", xscale="log")
        chosen = [r for r in results if r.optimizer == optimizer]
        for i, result in enumerate(chosen):
            curves = [log.evaluated() for log in logs[result.cell].values()]
            style: dict[str, Any] = {"color": colours[i % len(colours)], "linestyle": "-" if i < len(colours) else "--"}
            _band(by_steps, curves, lambda row: float(row.step), style | {"label": result.method})
            _band(by_bytes, curves, lambda row: row.bytes_sent / 1e6, style)
        by_steps.set_ylabel(next(iter(logs[chosen[0].cell].values())).loss_name)
        by_steps.legend(frameon=False)
        for axis in (by_steps, by_bytes):
            axis.set_yscale("log")
            axis.grid(True, which="both", alpha=0.2)
    vector = path.with_suffix(".svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    figure.savefig(vector)
    plt.close(figure)
    return path, vector


def _band(axis: Any, curves: Sequence[list[tuple[Any, float]]], x: Any, style: dict[str, Any]) -> None:
    """Draws mean and range of curves evaluated at the same steps, without step 0, where no bytes are sent yet."""
    points = [(point[0][0], [loss for _, loss in point]) for point in zip(*curves, strict=True) if point[0][0].step]
    positions = [x(row) for row, _ in points]
    axis.plot(positions, [statistics.fmean(losses) for _, losses in points], linewidth=1.4, **style)
    low, high = [min(losses) for _, losses in points], [max(losses) for _, losses in points]
    axis.fill_between(positions, low, high, color=style["color"], alpha=0.2, linewidth=0)
