"""Result files: reads and checks them, draws them, and compares two of them."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecomm.errors import ConfigError, SparseCommError
from sparsecomm.tools.benches import BENCHES, ROWS, Fields, companion, figures, registry

__all__ = ["Comparison", "Result", "check_drawable", "compare", "draw", "load", "load_folder", "reading"]


@dataclass(frozen=True, slots=True)
class Result:
    """The content of a result file.

    Attributes:
        path: The file.
        bench: Name of the bench that wrote it.
        meta: Versions, machine, date, command.
        rows: Measurements.
    """

    path: Path
    bench: str
    meta: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def machine(self) -> str:
        """Processor and cores. Only results of the same machine may be compared."""
        return f"{self.meta['cpu']}, {self.meta['cores']} cores"

    @property
    def content(self) -> dict[str, Any]:
        """The result as the bench returned it."""
        return {"meta": self.meta, "rows": self.rows}

    def verdicts(self) -> dict[str, int]:
        """Returns the numbers of rows with verdict "ok", with verdict "MISS", and with an error."""
        said = [("error" if row.get("error") else row.get("ok")) for row in self.rows]
        return {word: said.count(word) for word in ("ok", "MISS", "error")}


def load(path: Path) -> Result:
    """Reads a result file.

    Raises:
        ConfigError: It cannot be read or is not a result of `sparsecomm bench`; names the file and the problem.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise ConfigError(f"{path} is damaged, or no JSON: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path} is not a result of sparsecomm bench: it is nested too deeply") from None
    problem = _problem(data)
    if problem:
        raise ConfigError(f"{path} is not a result of sparsecomm bench: {problem}")
    name = data["meta"]["bench"]
    if name not in registry():
        raise ConfigError(f"{path} is of bench {name!r}, which is not here; known are {', '.join(sorted(BENCHES))}")
    return Result(path, name, data["meta"], data["rows"])


def load_folder(folder: Path) -> list[Result]:
    """Reads all result files (*.json) of a folder, sorted by bench and then by file name.

    Raises:
        ConfigError: There is no such file, or one is not a result.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    found = [load(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise ConfigError(
            f"{folder} holds no result files: write some with sparsecomm bench NAME --json {folder}/NAME.json"
        )
    return sorted(found, key=lambda result: (result.bench, result.path.name))


def check_drawable(name: str, bench: Callable[..., Any]) -> None:
    """Raises ConfigError if the bench has no plots or matplotlib is missing. Call it before a long measurement."""
    if companion(bench, "plots") is None:
        raise ConfigError(f"bench {name} has no plots")
    figures.new_figure()


def draw(bench: Callable[..., Any], content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws a result with the `plots` of its bench; returns the files written.

    Args:
        bench: The bench function that measured it.
        content: ``{"meta": {...}, "rows": [...]}``; meta holds the bench's name.
        folder: Folder for the files; made if it does not exist.

    Raises:
        ConfigError: The bench has no plots, matplotlib is missing, or the rows are not those of that bench.
    """
    name = content["meta"]["bench"]
    check_drawable(name, bench)
    with reading(name):
        files: list[Path] = companion(bench, "plots")(content, folder)
    return files


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns errors of code that reads a bench's rows into a ConfigError about rows of another version."""
    try:
        yield
    except SparseCommError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"bench {name} cannot read this result ({type(error).__name__}: {error}): another version of the bench "
            "wrote its rows"
        ) from error


def _problem(data: Any) -> str:
    """Returns why the data is not a valid ``{"meta": {...}, "rows": [{...}, ...]}``; "" if it is."""
    if not isinstance(data, dict) or not isinstance(data.get("meta"), dict) or not isinstance(data.get("rows"), list):
        return 'it is not {"meta": {...}, "rows": [...]}'
    for key, kind in {"bench": str, "cpu": str, "cores": int}.items():
        if type(data["meta"].get(key)) is not kind:  # a bool is an int
            return f"meta.{key} = {data['meta'].get(key)!r}"
    if not data["rows"]:
        return "it has no rows"
    for i, row in enumerate(data["rows"]):
        if not isinstance(row, dict):
            return f"rows[{i}] = {row!r} is not an object"
    return ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison of two results of one bench, row by row.

    Attributes:
        keys: Fields by which rows were matched.
        measures: Fields that were compared.
        rows: The keys, and for each measure "NAME A", "NAME B" and "NAME B/A" (None if A is zero).
        means: Geometric mean of B/A over rows, for each measure with at least one ratio.
        only_a: Keys of rows that B lacks.
        only_b: Keys of rows that A lacks.
    """

    keys: tuple[str, ...]
    measures: tuple[str, ...]
    rows: list[dict[str, Any]]
    means: dict[str, float]
    only_a: list[dict[str, Any]]
    only_b: list[dict[str, Any]]


def compare(a: Result, b: Result, measures: Sequence[str] = ()) -> Comparison:
    """Compares two results of the same bench on the same machine.

    Args:
        a: The baseline.
        b: The result to compare with it.
        measures: Fields to compare; if empty, those that the bench declares.

    Raises:
        ConfigError: The benches or the machines differ, a field does not exist, two rows of a result have equal keys,
            or no rows match.
    """
    if a.bench != b.bench:
        raise ConfigError(f"{a.path} is of bench {a.bench}, {b.path} of bench {b.bench}: there is nothing to compare")
    if a.machine != b.machine:
        raise ConfigError(
            f"{a.path} was measured on {a.machine}, {b.path} on {b.machine}: a ratio would compare the machines"
        )
    fields = _fields(a, b, measures)
    ours, theirs = _by_key(a, fields.keys), _by_key(b, fields.keys)
    both = [key for key in ours if key in theirs]
    if not both:
        raise ConfigError(f"{a.path} and {b.path} have no row in common: no two agree on {', '.join(fields.keys)}")
    rows = [_side_by_side(ours[key], theirs[key], fields) for key in both]
    means = {}
    for measure in fields.measures:
        ratios = [row[f"{measure} B/A"] for row in rows if (row[f"{measure} B/A"] or 0) > 0]
        if ratios:
            means[measure] = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    return Comparison(
        fields.keys,
        fields.measures,
        rows,
        means,
        [_named(fields.keys, key) for key in ours if key not in theirs],
        [_named(fields.keys, key) for key in theirs if key not in ours],
    )


def _fields(a: Result, b: Result, wanted: Sequence[str]) -> Fields:
    """Returns the fields that the bench declares; by default, text fields are keys and seconds are measures."""
    declared = ROWS.get(a.bench, Fields())
    rows = [*a.rows, *b.rows]
    present = list(dict.fromkeys(key for row in rows for key in row))
    for measure in wanted:
        if not any(_number(row.get(measure)) for row in rows):
            numbers = [key for key in present if any(_number(row.get(key)) for row in rows)]
            raise ConfigError(f"field {measure!r} is not a number in any row; numbers are: {', '.join(numbers)}")
    guessed = [k for k in present if k in ("density", "numel", "world") or any(isinstance(r.get(k), str) for r in rows)]
    keys = declared.keys or tuple(key for key in guessed if key != "ok")
    seconds = [key for key in present if key.endswith("seconds") and key not in keys]
    measures = tuple(wanted) or declared.measures or tuple(seconds)
    return Fields(keys, tuple(m for m in measures if m in present))


def _by_key(result: Result, keys: Sequence[str]) -> dict[tuple[Any, ...], dict[str, Any]]:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in result.rows:
        key = tuple(json.dumps(row.get(k)) for k in keys)
        if key in found:
            raise ConfigError(f"{result.path} has two rows about {_named(keys, key)}")
        found[key] = row
    return found


def _named(keys: Sequence[str], key: Sequence[str]) -> dict[str, Any]:
    values = {name: json.loads(text) for name, text in zip(keys, key, strict=True)}
    return {name: value for name, value in values.items() if value is not None}


def _side_by_side(a: Mapping[str, Any], b: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    row = {key: a.get(key) for key in fields.keys}
    for measure in fields.measures:
        x, y = a.get(measure), b.get(measure)
        ratio = y / x if _number(x) and _number(y) and x else None
        row |= {f"{measure} A": x, f"{measure} B": y, f"{measure} B/A": ratio}
    return row


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
