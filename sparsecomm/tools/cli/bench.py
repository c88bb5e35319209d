"""`sparsecomm bench NAME`: runs one of `sparsecomm.tools.benches`, prints its rows and writes them as JSON.

This module knows no bench by name. Any module in `sparsecomm.tools.benches` may register one. The options come from its
signature and their help from its docstring. If its module defines `print_table(result, console)` and
`plots(result, folder)`, these print and draw the rows. `sparsecomm bench plot | report | compare` read result files.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsecomm.errors import SparseCommError
from sparsecomm.launch import detect
from sparsecomm.tools.benches import companion
from sparsecomm.tools.benches.results import check_drawable, draw
from sparsecomm.tools.cli import bench_files
from sparsecomm.tools.cli.output import bench_console, cell, write_json

__all__ = ["options_of", "run"]

Bench = Callable[..., Mapping[str, Any]]


def run(args: Sequence[str]) -> int:
    """Runs `sparsecomm bench` with these arguments.

    Returns:
        The exit code: 2 for an unknown bench, 1 if it failed.
    """
    benches = _registry()
    if not args or args[0] in ("--list", "--help", "-h"):
        _print_list(benches)
        return 0
    name, *rest = args
    if name in bench_files.COMMANDS:
        return bench_files.run(name, rest)
    if name not in benches:
        known = ", ".join([*sorted(benches), *bench_files.COMMANDS])
        message = Text.assemble(("error:", "red"), f" there is no bench {name!r}; known: {known}")
        Console(stderr=True).print(message, soft_wrap=True)
        return 2
    _command(name, benches[name])(args=rest, prog_name=f"sparsecomm bench {name}")
    return 0


def _registry() -> Mapping[str, Bench]:
    from sparsecomm.tools import benches

    return benches.registry()


def options_of(bench: Bench) -> dict[str, inspect.Parameter]:
    """Returns a bench's parameters as typer options, by name.

    A parameter of type int, float, str or bool, optional or not, becomes a plain option. A sequence becomes an option
    that takes a comma-separated list, may be repeated, and also has a singular name: `--density 0.01` for `densities`.
    Parameters of other types, such as callbacks, keep their defaults.
    """
    hints, helps = get_type_hints(bench), _argument_docs(bench)
    found = {}
    for name, parameter in inspect.signature(bench).parameters.items():
        kind, many = _kind(hints.get(name, str))
        if kind is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        default = None if many or required else parameter.default
        flags = [] if kind is bool else [f"--{word.replace('_', '-')}" for word in _names(name, many)]
        shown: Any = True
        if many and not required:
            shown = "all" if parameter.default is None else ",".join(map(str, parameter.default)) or False
        option = typer.Option(*flags, help=helps.get(name), show_default=shown)
        annotation: Any = list[str] if many else kind
        found[name] = parameter.replace(
            kind=inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if required else default,
            annotation=Annotated[annotation if required else annotation | None, option],
        )
    return found


def _command(name: str, bench: Bench) -> typer.Typer:
    """Returns a command line with this bench as its only command."""
    options = options_of(bench)
    hints = get_type_hints(bench)

    def command(json_file: Path | None, plot: Path | None, **values: Any) -> None:
        given = {key: _parsed(key, value, hints.get(key, str)) for key, value in values.items()}
        # Options that the user did not give are left out, so that the bench's own defaults hold.
        raise typer.Exit(_measure(name, bench, {k: v for k, v in given.items() if v is not None}, json_file, plot))

    json_option = typer.Option("--json", metavar="FILE", help='Write {"meta": ..., "rows": [...]} here.')
    plot_option = typer.Option("--plot", metavar="DIR", help="Draw the result here, as PNG and SVG.")
    parameters = [
        *options.values(),
        *(
            inspect.Parameter(
                key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, option]
            )
            for key, option in (("json_file", json_option), ("plot", plot_option))
        ),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = _description(bench)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(command)
    return app


def _measure(
    name: str, bench: Bench, options: Mapping[str, Any], json_file: Path | None, plot_folder: Path | None
) -> int:
    """Runs a bench; rank 0 prints, writes and draws its result. Returns the exit code."""
    console, errors = bench_console(), Console(stderr=True)
    try:
        if plot_folder is not None:
            check_drawable(name, bench)
        for folder in (json_file.parent if json_file else None, plot_folder):  # fail before the long part
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        result = dict(bench(**options))
        if detect().rank != 0:
            return 0
        result["meta"] = {"bench": name, "command": _command_line(name, options)} | dict(result["meta"])
        print_table = companion(bench, "print_table")
        print_table(result, console) if print_table else _print_rows(name, result, console)
        if json_file is not None:
            write_json(json_file, result)
            console.print(f"written: {json_file}", soft_wrap=True, highlight=False)
        for file in draw(bench, result, plot_folder) if plot_folder else ():
            console.print(f"written: {file}", soft_wrap=True, highlight=False)
    except (SparseCommError, OSError) as error:
        errors.print(Text.assemble(("error:", "red"), f" bench {name}: {error}"), soft_wrap=True)
        return 1
    return 0


def _command_line(name: str, options: Mapping[str, Any]) -> str:
    """Returns the shell command that repeats this measurement."""
    launch = detect()
    words = ["sparsecomm", "bench", name]
    if launch.launcher == "torchrun":
        words = ["torchrun", "--nproc-per-node", str(launch.size), "-m", *words]
    elif launch.size > 1:
        words = ["mpirun", "-n", str(launch.size), *words]
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def _print_list(benches: Mapping[str, Bench]) -> None:
    console = Console()
    usage = "Usage: sparsecomm bench NAME [--json FILE] [--plot DIR] [OPTIONS]   (NAME --help lists the options)\n"
    console.print(usage, markup=False)
    table = Table.grid(padding=(0, 2))
    for name in sorted(benches):
        table.add_row(f"  [bold]{name}[/]", _summary(benches[name]))
    console.print(table)
    console.print("\nCommands for result files:\n")
    table = Table.grid(padding=(0, 2))
    for name, command in bench_files.COMMANDS.items():
        table.add_row(f"  [bold]{name}[/]", _summary(command))
    console.print(table)


def _print_rows(name: str, result: Mapping[str, Any], console: Console) -> None:
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    table = Table(title=f"bench {name}")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        numbers = all(isinstance(row.get(column), (int, float, type(None))) for row in rows)
        table.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns))
    console.print(table)


def _kind(hint: Any) -> tuple[type | None, bool]:
    """Returns the type of an option's value or items (None if it cannot be an option), and whether it is a list."""
    if get_origin(hint) in (Union, UnionType):
        inner = [a for a in get_args(hint) if a is not type(None)]
        return _kind(inner[0]) if len(inner) == 1 else (None, False)
    if hint in (int, float, str, bool):
        return hint, False
    items = [a for a in get_args(hint) if a is not Ellipsis]
    origin = get_origin(hint)
    if isinstance(origin, type) and issubclass(origin, Sequence) and len(items) == 1 and items[0] in (int, float, str):
        return items[0], True
    return None, False


def _names(name: str, many: bool) -> list[str]:
    """Returns the option names of a parameter; "densities" is also called "density"."""
    if not many:
        return [name]
    singular = re.sub(r"ies$", "y", name) if name.endswith("ies") else name.removesuffix("s")
    return [singular, name] if singular != name else [name]


def _parsed(name: str, value: Any, hint: Any) -> Any:
    kind, many = _kind(hint)
    if not many or kind is None or not value:
        return None if many else value
    words = [word.strip() for part in value for word in part.split(",") if word.strip()]
    try:
        return tuple(kind(word) for word in words)
    except ValueError:
        raise typer.BadParameter(f"{','.join(value)!r} is not a list of {kind.__name__}s", param_hint=name) from None


def _summary(bench: Callable[..., Any]) -> str:
    return (inspect.getdoc(bench) or "").split("\n\n")[0].replace("\n", " ")


def _description(bench: Bench) -> str:
    """Returns the paragraphs of a Google docstring before its sections, without the line breaks inside them."""
    text, *_ = re.split(r"^(?:Args|Returns|Raises):\n", inspect.getdoc(bench) or "", maxsplit=1, flags=re.MULTILINE)
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in text.strip().split("\n\n"))


def _argument_docs(bench: Bench) -> dict[str, str]:
    """Returns the description of each parameter in the Args section of a Google docstring."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", inspect.getdoc(bench) or "", re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section.group(1) if section else "", re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in entries}
