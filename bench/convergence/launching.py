"""Starts other scripts under mpirun on one machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent


def find_mpirun() -> str | None:
    """Returns the mpirun beside this Python (installed as a wheel), or the one on PATH, or None."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def launch_line(mpirun: str, ranks: int) -> list[str]:
    """Returns the command that starts ``ranks`` processes; Open MPI needs leave to start more ranks than cores."""
    placing = ["--oversubscribe", "--bind-to", "none"] if "Open MPI" in _version(mpirun) else []
    return [mpirun, *placing, "-n", str(ranks)]


@cache
def _version(mpirun: str) -> str:
    return subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False).stdout


def launch_environment() -> dict[str, str]:
    """Returns an environment with one compute thread per rank and leave to run as root (containers)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return environment
