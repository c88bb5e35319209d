"""`bench report`: one self-contained HTML page with tables, verdicts, plots, machine and the commands to repeat."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.errors import MarkupError
from rich.table import Table
from rich.text import Text

from sparsecomm.errors import ConfigError
from sparsecomm.tools.benches import BENCHES, companion, results
from sparsecomm.tools.benches.results import Result

__all__ = ["page"]

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_MACHINE = ("cpu", "cores", "system")
_OPEN_ROWS = 40  # tables with more rows are folded


@dataclass(frozen=True, slots=True)
class _Grid:
    """A table as text.

    Attributes:
        title: Title above the table.
        headings: Headings of the columns.
        numeric: Whether each column holds numbers.
        rows: Cells by row.
    """

    title: str
    headings: list[str]
    numeric: list[bool]
    rows: list[list[str]]

    @property
    def folded(self) -> bool:
        """Whether the page folds the table because it is long."""
        return len(self.rows) > _OPEN_ROWS

    @property
    def misses(self) -> int:
        """Number of rows that missed their goal; a folded table with such rows starts unfolded."""
        return sum("MISS" in row for row in self.rows)


@dataclass(frozen=True, slots=True)
class _Section:
    """The section of one result on the page."""

    anchor: str
    result: Result
    summary: str
    verdicts: dict[str, int]
    grids: list[_Grid]
    notes: list[str]
    pictures: list[tuple[str, str]]
    no_pictures: str


class _Collector(Console):
    """A console that keeps the tables and lines printed to it."""

    def __init__(self) -> None:
        super().__init__(width=10_000, color_system=None)
        self.grids: list[_Grid] = []
        self.notes: list[str] = []

    def print(self, *objects: Any, **_: Any) -> None:
        """Keeps the objects instead of printing them."""
        for shown in objects:
            if isinstance(shown, Table):
                self.grids.append(_grid(shown))
            else:
                self.notes.append(_plain(shown))


def page(found: Sequence[Result], *, mixed: bool = False) -> str:
    """Returns the HTML of a page without external references.

    Args:
        found: At least one result.
        mixed: Whether results of several machines may share the page; each machine then has a separate heading.

    Raises:
        ConfigError: The machines differ and `mixed` is False, or a bench cannot read its rows; names the files.
    """
    machines: dict[str, list[Result]] = {}
    for result in found:
        machines.setdefault(result.machine, []).append(result)
    if len(machines) > 1 and not mixed:
        parts = "; ".join(f"{m}: {', '.join(r.path.name for r in rs)}" for m, rs in machines.items())
        raise ConfigError(
            f"results of {len(machines)} machines cannot share a page, because readers would compare them ({parts}); "
            "--mixed gives each machine its own section"
        )
    # Imported late, because nothing else needs jinja2 and the import takes time.
    from jinja2 import Environment, StrictUndefined

    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    numbers = {id(result): i for i, result in enumerate(found, 1)}
    with tempfile.TemporaryDirectory() as scratch:
        shown = [
            (_facts(group), [_section(r, f"result-{numbers[id(r)]}", Path(scratch)) for r in group])
            for group in machines.values()
        ]
    dates = sorted(str(r.meta.get("date", "")) for r in found)
    return template.render(machines=shown, first=dates[0], last=dates[-1])


def _section(result: Result, anchor: str, scratch: Path) -> _Section:
    bench = BENCHES[result.bench]
    console = _Collector()
    show = companion(bench, "print_table")
    try:
        if show is not None:
            with results.reading(result.bench):
                show(result.content, console)
        else:
            console.grids.append(_rows_as_they_are(result))
        pictures, without = [], "this bench draws nothing"
        if companion(bench, "plots") is not None:
            files = results.draw(bench, result.content, scratch / anchor)
            pictures = [(f.stem.replace("_", " "), _inlined(f)) for f in files if f.suffix == ".svg"]
    except ConfigError as error:
        raise ConfigError(f"{result.path}: {error}") from error
    summary = (bench.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    return _Section(
        anchor, result, summary, result.verdicts(), console.grids, console.notes, pictures, "" if pictures else without
    )


def _facts(group: Sequence[Result]) -> dict[str, str]:
    """Returns the facts in the meta of a machine's results; facts that differ between results list all values."""
    apart = {"bench", "command", "date", "load_average", "world", "transport"}
    keys = dict.fromkeys(k for k in (*_MACHINE, *(k for r in group for k in r.meta)) if k not in apart)
    facts = {}
    for key in keys:
        values = dict.fromkeys(_plain_value(r.meta[key]) for r in group if key in r.meta)
        if values and not any(isinstance(r.meta.get(key), dict) for r in group):
            facts[key.replace("_", " ")] = " / ".join(values)
    return facts


def _plain_value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _grid(shown: Table) -> _Grid:
    columns = [[_plain(cell) for cell in column.cells] for column in shown.columns]
    return _Grid(
        _plain(shown.title or ""),
        [_plain(column.header) for column in shown.columns],
        [column.justify == "right" for column in shown.columns],
        [list(row) for row in zip(*columns, strict=True)],
    )


def _rows_as_they_are(result: Result) -> _Grid:
    headings = list(dict.fromkeys(key for row in result.rows for key in row))
    numeric = [all(isinstance(r.get(h), (int, float, type(None))) for r in result.rows) for h in headings]
    rows = [["" if r.get(h) is None else _short(r[h]) for h in headings] for r in result.rows]
    return _Grid(f"bench {result.bench}", headings, numeric, rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _plain_value(value)


def _plain(shown: Any) -> str:
    if isinstance(shown, Text):
        return shown.plain
    try:
        return Text.from_markup(str(shown)).plain
    except MarkupError:  # the text contains brackets that are not markup
        return str(shown)


def _inlined(file: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(file.read_bytes()).decode()
