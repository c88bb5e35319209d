"""`sparsecomm bench plot | report | compare`: commands that read result files of benches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsecomm.errors import SparseCommError
from sparsecomm.tools.benches import BENCHES, report, results
from sparsecomm.tools.cli.output import bench_console, cell, write_json

__all__ = ["COMMANDS", "run"]


def _plot(
    files: Annotated[list[Path], typer.Argument(help="Result files.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write the pictures to.")],
) -> None:
    """Draws result files as PNG and SVG."""
    loaded = [results.load(file) for file in files]
    for result in loaded:
        for file in results.draw(BENCHES[result.bench], result.content, out):
            typer.echo(f"written: {file}")


def _report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the result files.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Page to write; DIR/report.html by default.")
    ] = None,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Accept results of several machines; each has its own section.")
    ] = False,
) -> None:
    """Makes one self-contained HTML page of all result files in a folder."""
    page = folder / "report.html" if out is None else out
    text = report.page(results.load_folder(folder), mixed=mixed)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    typer.echo(f"written: {page}")


def _compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="The baseline.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="The result to compare with it.")],
    field: Annotated[
        list[str] | None, typer.Option(help="Field to compare; may be repeated. By default the measures of the bench.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the rows here.")] = None,
) -> None:
    """Compares two results of one bench, row by row, as ratios B/A."""
    first, second = results.load(a), results.load(b)
    found = results.compare(first, second, field or ())
    table = Table(title=f"bench {first.bench}: A = {a}, B = {b}, {first.machine}")
    for column in found.rows[0]:
        table.add_column(column, justify="left" if column in found.keys else "right")
    for row in found.rows:
        table.add_row(*(cell(value) for value in row.values()))
    console = bench_console()
    console.print(table)
    for measure, mean in found.means.items():
        console.print(f"{measure}: B/A = {mean:.3f} (geometric mean)", highlight=False)
    for letter, missing in (("A", found.only_a), ("B", found.only_b)):
        for row in missing:
            console.print(f"only in {letter}: " + ", ".join(f"{k} = {v}" for k, v in row.items()), highlight=False)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        meta = {"a": first.meta, "b": second.meta, "means": found.means}
        write_json(json_file, {"meta": meta, "rows": found.rows})


COMMANDS: dict[str, Callable[..., None]] = {"plot": _plot, "report": _report, "compare": _compare}
"""Commands by the word that follows `sparsecomm bench`; no bench may have one of these names."""


def run(name: str, args: list[str]) -> int:
    """Runs one of `COMMANDS`.

    Returns:
        The exit code: 1 if a file or an option is not acceptable.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(COMMANDS[name])
    try:
        app(args=args, prog_name=f"sparsecomm bench {name}")
    except (SparseCommError, OSError) as error:
        message = Text.assemble(("error:", "red"), f" bench {name}: {error}")
        Console(stderr=True).print(message, soft_wrap=True)
        return 1
    return 0
