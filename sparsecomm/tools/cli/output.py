"""Output of the commands: a console wide enough for tables, the text of cells, and atomically written files."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsecomm.launch import detect

__all__ = ["bench_console", "cell", "on_terminal", "write_json"]

_WIDE = 160  # characters


def on_terminal() -> bool:
    """Returns whether stdout reaches a terminal.

    Open MPI gives every rank a pseudo-terminal even if mpirun's stdout is a file or a pipe. Under Open MPI the answer
    therefore comes from the parent process, which is mpirun or its daemon.
    """
    if not sys.stdout.isatty() or "OMPI_COMM_WORLD_RANK" not in os.environ:
        return sys.stdout.isatty()
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False


def bench_console() -> Console:
    """Returns a console for tables.

    It is wide in a log or a pipe, which have room for all columns, and under mpirun, whose pseudo-terminals always have
    80 columns whatever the width of the user's terminal.
    """
    if not on_terminal():
        return Console(width=_WIDE, force_terminal=False)
    if detect().size > 1 and "COLUMNS" not in os.environ:
        return Console(width=_WIDE)
    return Console()


def cell(value: object) -> str:
    """Returns the text of a row's value."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a result atomically: at any time `path` is either the old file or the whole new one."""
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
