"""Pictures of `bench train` and `bench peers`: exposed time by bandwidth, loss by time and by bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsecomm.errors import ConfigError
from sparsecomm.tools.benches.figures import save

__all__ = ["plots", "run_label"]

Rows = Sequence[Mapping[str, Any]]


def plots(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws a result of `bench train` or `bench peers`, each picture as PNG and SVG.

    Args:
        result: Result of either bench.
        folder: Folder to write to; made if it does not exist.

    Returns:
        The files written; none if all runs failed.

    Raises:
        ConfigError: Matplotlib is not installed.
    """
    rows = [row for row in result["rows"] if not row["error"]]
    if not rows:
        return []
    if "rate" not in rows[0]:
        return [
            *_by(rows, "seconds", "seconds of training", folder / "train_loss_by_time"),
            *_by(rows, "bytes", "bytes sent per rank", folder / "train_loss_by_bytes"),
        ]
    fastest = [row for row in rows if row["rate"] == result["meta"]["fastest"]]
    files = [
        *_exposed(rows, folder / "peers_exposed"),
        *_by(fastest, "bytes", "bytes sent per rank", folder / "peers_loss_by_bytes"),
    ]
    for rate in dict.fromkeys(row["rate"] for row in rows):
        label = f"seconds at {rate}, steps x median step"
        files += _by([r for r in rows if r["rate"] == rate], "seconds", label, folder / f"peers_loss_by_time_{rate}")
    return files


def _figure() -> tuple[Any, Any]:
    """Returns a figure and its axes, without a window."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install 'sparsecomm[demo]'") from None
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=[colormaps["tab20"](i) for i in range(20)])  # the default cycle has only ten colours
    return figure, axes


def run_label(row: Mapping[str, Any]) -> str:
    """Returns the name of a row's run in tables and legends: its method, and its density if it has one."""
    return row["method"] if row["density"] is None else f"{row['method']} {row['density']:.3g}"


def _marker(row: Mapping[str, Any]) -> str:
    """Returns the marker and line style of a row: circles for our methods, squares for others."""
    return "o-" if row["method"].startswith("sparsecomm") else "s--"


def _exposed(rows: Rows, stem: Path) -> list[Path]:
    """Draws the seconds that communication adds to a step against the rate of the links."""
    figure, axes = _figure()
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] != "none" and row["exposed_seconds"] is not None:
            lines.setdefault(run_label(row), []).append(row)
    rates = list(dict.fromkeys(row["rate"] for row in rows))
    for label, points in lines.items():
        # A logarithmic axis has no zero, and values below a millisecond are noise.
        heights = [max(row["exposed_seconds"], 1e-3) for row in points]
        axes.plot([rates.index(row["rate"]) for row in points], heights, _marker(points[0]), label=label)
    axes.set(yscale="log", ylabel="exposed seconds per step (log)", xlabel="rate of every link")
    axes.set_xticks(range(len(rates)), rates)
    return _finish(figure, axes, stem)


def _by(rows: Rows, unit: str, label: str, stem: Path) -> list[Path]:
    """Draws loss against the seconds or bytes since the start; `unit` is "seconds" or "bytes"."""
    figure, axes = _figure()
    for row in rows:
        if row["method"] != "none":
            axes.plot(
                [_reached(row, p, unit) for p in row["curve"]],
                [p[-1] for p in row["curve"]],
                _marker(row),
                label=run_label(row),
            )
    axes.set(xscale="log", xlabel=f"{label} (log)", ylabel="held-out loss (nats)")
    return _finish(figure, axes, stem)


def _reached(row: Mapping[str, Any], point: Sequence[float], unit: str) -> float:
    """Returns the seconds or bytes at a point of a curve, [step, seconds, bytes, loss] or [step, bytes, loss]."""
    if unit == "bytes":
        return point[-2]
    return point[1] if len(point) == 4 else point[0] * float(row["step_seconds"])


def _finish(figure: Any, axes: Any, stem: Path) -> list[Path]:
    axes.grid(visible=True, alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7, ncols=2)
    return save(figure, stem.parent, stem.name)
