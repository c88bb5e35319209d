"""The common style of all plots: sizes, colours, units on axes, PNG and SVG files. Loads matplotlib on first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsecomm.errors import ConfigError

__all__ = ["COLOURS", "MARKERS", "headline", "legend_below", "new_figure", "ratio_axis", "save", "unit_axis"]

# Okabe and Ito's palette, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_WIDTH, _HEIGHT = 5.6, 4.2  # inches per panel


def new_figure(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Makes an empty figure of panels.

    Args:
        rows: Rows of panels.
        columns: Columns of panels.
        options: Options of matplotlib's `Figure.subplots`, such as ``sharex=True``.

    Returns:
        The figure, and its axes as a 2-D array.

    Raises:
        ConfigError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"plots need matplotlib ({error}): pip install 'sparsecomm[demo]'") from error
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(True, which="major", alpha=0.25, linewidth=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure, axes


def unit_axis(axis: Any, unit: str) -> None:
    """Labels the ticks of a matplotlib axis with a unit and an SI prefix: 1 ms, 16 MB."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    axis.set_major_formatter(EngFormatter(unit))
    axis.set_minor_formatter(NullFormatter())


def ratio_axis(axis: Any, subs: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Labels the ticks of a logarithmic axis with plain numbers, at these multiples of each power of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: format(value, "g"))


def legend_below(figure: Any, axes: Any, columns: int = 4) -> None:
    """Puts one legend for all panels below them, where it covers no data; each label appears once."""
    found: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def headline(figure: Any, info: dict[str, Any], subject: str) -> None:
    """Writes the subject, the machine and the date above all panels; `info` is a result's meta."""
    date = str(info.get("date", ""))[:10]
    figure.suptitle(f"{subject}, {info.get('cpu')}, {info.get('cores')} cores, {date}", fontsize=10)


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Writes a figure as NAME.png and NAME.svg.

    Raises:
        OSError: The folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png", folder / f"{name}.svg"]
    for file in files:
        # Files contain no date, so that the same result always gives the same picture.
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
