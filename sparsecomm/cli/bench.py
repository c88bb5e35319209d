"""`sparsecomm bench NAME`: runs a measurement of `sparsecomm.benches`, shows its rows and writes them as JSON.

Nothing here knows a bench by name. Any module in `sparsecomm.benches` may register one; its signature says which
options it takes, its docstring what they mean, and `print_table(result, console)` beside it, if there, shows its rows.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
import tempfile
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

__all__ = ["options_of", "run", "write_json"]

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
    if name not in benches:
        known = ", ".join(sorted(benches))
        message = Text.assemble(("error:", "red"), f" there is no bench {name!r}; known: {known}")
        Console(stderr=True).print(message, soft_wrap=True)
        return 2
    _command(name, benches[name])(args=rest, prog_name=f"sparsecomm bench {name}")
    return 0


def _registry() -> Mapping[str, Bench]:
    """Returns all benches: a module registers its own when it is imported."""
    from sparsecomm import benches

    for module in pkgutil.iter_modules(benches.__path__):
        importlib.import_module(f"{benches.__name__}.{module.name}")
    return benches.BENCHES


def options_of(bench: Bench) -> dict[str, inspect.Parameter]:
    """Returns a bench's parameters as typer options, by name.

    int, float, str, bool and optional ones of these become plain options; a sequence becomes an option that takes a
    comma-separated list, may be repeated, and goes by its singular as well: `--density 0.01` for `densities`.
    Parameters of other types, such as a callback, are left at their defaults.
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
            shown = "all" if parameter.default is None else ",".join(map(str, parameter.default))
        option = typer.Option(*flags, help=helps.get(name), show_default=shown)
        annotation: Any = list[str] if many else kind
        found[name] = parameter.replace(
            kind=inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if required else default,
            annotation=Annotated[annotation if required else annotation | None, option],
        )
    return found


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a result, so that at `path` there is at any time either the old file or the whole new one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            json.dump(data, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _command(name: str, bench: Bench) -> typer.Typer:
    """Returns a command line whose one command is this bench."""
    options = options_of(bench)
    hints = get_type_hints(bench)

    def command(json_file: Path | None, **values: Any) -> None:
        given = {key: _parsed(key, value, hints.get(key, str)) for key, value in values.items()}
        # What was not given is left out, so that the bench's own default holds.
        raise typer.Exit(_measure(name, bench, {k: v for k, v in given.items() if v is not None}, json_file))

    json_option = inspect.Parameter(
        "json_file",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None, typer.Option("--json", metavar="FILE", help='Write {"meta": ..., "rows": [...]} here.')
        ],
    )
    parameters = [*options.values(), json_option]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = _summary(bench)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(command)
    return app


def _measure(name: str, bench: Bench, options: Mapping[str, Any], json_file: Path | None) -> int:
    """Runs a bench; rank 0 shows and writes what it returns."""
    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=160)  # a log or a pipe has room for all columns
    try:
        if json_file is not None:  # before the long part
            json_file.parent.mkdir(parents=True, exist_ok=True)
        result = bench(**options)
        if detect().rank != 0:
            return 0
        print_table = getattr(sys.modules[bench.__module__], "print_table", None)
        print_table(result, console) if print_table else _print_rows(name, result, console)
        if json_file is not None:
            write_json(json_file, result)
            console.print(f"written: {json_file}", soft_wrap=True, highlight=False)
    except (SparseCommError, OSError) as error:
        errors.print(Text.assemble(("error:", "red"), f" bench {name}: {error}"), soft_wrap=True)
        return 1
    return 0


def _print_list(benches: Mapping[str, Bench]) -> None:
    console = Console()
    console.print("Usage: sparsecomm bench NAME [--json FILE] [OPTIONS]   (NAME --help lists them)\n", markup=False)
    table = Table.grid(padding=(0, 2))
    for name in sorted(benches):
        table.add_row(f"  [bold]{name}[/]", _summary(benches[name]))
    console.print(table)


def _print_rows(name: str, result: Mapping[str, Any], console: Console) -> None:
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    table = Table(title=f"bench {name}")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        numbers = all(isinstance(row.get(column), (int, float, type(None))) for row in rows)
        table.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console.print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _kind(hint: Any) -> tuple[type | None, bool]:
    """Returns the type of an option's value or of its items, None if it cannot be an option; and whether it is many."""
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
    """Returns a parameter's option names: "densities" goes by "density" as well."""
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


def _summary(bench: Bench) -> str:
    return (inspect.getdoc(bench) or "").split("\n\n")[0].replace("\n", " ")


def _argument_docs(bench: Bench) -> dict[str, str]:
    """Returns what the Args section of a Google docstring says of each parameter."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", inspect.getdoc(bench) or "", re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section.group(1) if section else "", re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in entries}
