"""The pictures of `bench time-to-loss`: loss against seconds, with each method's name under the end of its line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsecomm.tools.benches.figures import COLOURS, new_figure, save

__all__ = ["plots"]

_NAMES = {
    "limit": "no exchange (limit)",
    "dense": "dense",
    "fp16": "fp16",
    "powersgd-r4": "PowerSGD rank 4",
    "powersgd-r1": "PowerSGD rank 1",
    "sparsecomm": "sparsecomm",
}
_ABOVE = 1.6  # the highest loss shown, as a multiple of the target
_ROOM = 3.5  # seconds at the right end of the axis, as a multiple of the slowest run's
_LINE = 0.045  # height of a name, as a share of the axis

Row = Mapping[str, Any]


def plots(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws a picture of each task and rate, as PNG and SVG.

    Args:
        result: Result of `bench time-to-loss`.
        folder: Folder to write to; made if it does not exist.

    Returns:
        The files written; none of a task and rate at which dense failed.

    Raises:
        ConfigError: Matplotlib is not installed.
    """
    least = min((row["margin"] for row in result["rows"]), default=0.0)  # curves do not depend on it
    rows = [row for row in result["rows"] if not row["error"] and row["margin"] == least]
    files = []
    for task, rate in dict.fromkeys((row["task"], row["rate"]) for row in rows):
        group = [row for row in rows if (row["task"], row["rate"]) == (task, rate)]
        files += save(_picture(group, f"{task}, {group[0]['hosts']} hosts at {rate}"), folder, f"{task}_{rate}")
    return files


def _picture(rows: Sequence[Row], title: str) -> Any:
    figure, axes = new_figure()
    axis, target = axes[0, 0], rows[0]["target"]
    ends = []
    for i, row in enumerate(rows):
        # A logarithmic axis has no zero, so the first point, before training, is left out.
        seconds, losses = [p[1] for p in row["curve"][1:]], [p[3] for p in row["curve"][1:]]
        style = {"color": "0.5", "linestyle": "--"} if row["method"] == "limit" else {"color": COLOURS[i]}
        axis.plot(seconds, losses, linewidth=1.4, **style)
        ends.append((seconds[-1], losses[-1], _name(row), style["color"]))
    axis.axhline(target, color="0.7", linewidth=0.8)
    axis.set(xscale="log", xlabel="seconds of training (log)", ylabel="validation loss (nats)", title=title)
    axis.set_xlim(right=_ROOM * max(x for x, _, _, _ in ends))
    heights = [target, *(y for _, y, _, _ in ends)]
    top, lowest = max(_ABOVE * target, 1.02 * max(heights)), min(heights)
    names = _LINE * (len(ends) + 1)  # the part of the axis below all lines
    axis.set_ylim((lowest - names * top) / (1.0 - names), top)
    axis.set_yticks([tick for tick in axis.get_yticks() if lowest <= tick <= top])
    _label(axis, ends)
    return figure


def _name(row: Row) -> str:
    name = _NAMES[row["method"]]
    return name if row["density"] is None else f"{name} {100 * row['density']:g}%"


def _label(axis: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes the names of the lines below their ends, in their colours, each on a line of its own.

    The later a line ends, the higher its name: so no line from a name to an end crosses another name.
    """
    for place, (x, y, name, colour) in enumerate(sorted(ends)):
        axis.annotate(
            f" {name}",
            (x, y),
            xytext=(x, _LINE * (place + 0.6)),
            textcoords=axis.get_xaxis_transform(),
            fontsize=7,
            color=colour,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )
