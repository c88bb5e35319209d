"""Finds the mpiruns and Open MPI's components. The only commands that it runs are of the kind of `--version`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from sparsecomm.tools.cli.doctor.child import run_tool
from sparsecomm.tools.cli.doctor.probe import identify
from sparsecomm.tools.cli.doctor.report import Mpi, Mpirun

__all__ = ["describe_mpi"]

_FRAMEWORKS = ("pml", "osc", "mtl", "btl")


def describe_mpi(said: dict[str, dict[str, Any]], problem: str | None) -> Mpi:
    """Returns the MPI section of the report.

    Args:
        said: Facts from the probe, by stage.
        problem: Why the probe failed, or None.
    """
    library = said.get("library", {})
    if "library" not in said:
        problem = said.get("failed", {}).get("problem") or problem or "mpi4py was not reached"
    elif "initialized" in said:
        problem = None  # MPI itself works; later failures concern the world
    mpiruns = _find_mpiruns(library)
    return Mpi(
        **library,
        **said.get("initialized", {}),
        mpiruns=mpiruns,
        components=_components(library, mpiruns),
        problem=problem,
    )


def _find_mpiruns(library: dict[str, Any]) -> list[Mpirun]:
    """Returns the mpiruns on PATH, next to the interpreter and next to the library, without duplicates."""
    on_path = shutil.which("mpirun") or shutil.which("mpiexec")
    places = [Path(sys.executable).parent / "mpirun"]
    if library.get("library"):
        places.append(Path(library["library"]).parent.parent / "bin" / "mpirun")
    candidates = ([on_path] if on_path else []) + [str(p) for p in places if os.access(p, os.X_OK)]
    found: dict[tuple[int, int], Mpirun] = {}
    for path in candidates:
        stat = os.stat(path)
        if (stat.st_dev, stat.st_ino) not in found:
            family, version = identify(run_tool(path, "--version"))
            same = (family, version) == (library.get("family"), library.get("version"))
            known = bool(library) and family != "unknown"
            found[stat.st_dev, stat.st_ino] = Mpirun(path, path == on_path, family, version, same if known else None)
    return list(found.values())


def _components(library: dict[str, Any], mpiruns: list[Mpirun]) -> dict[str, list[str]]:
    """Returns Open MPI's components by framework, read from the ompi_info next to the library's mpirun."""
    if library.get("family") != "Open MPI":
        return {}
    folder = next((Path(m.path).parent for m in mpiruns if m.matches), None)
    tool = str(folder / "ompi_info") if folder else shutil.which("ompi_info")
    found: dict[str, list[str]] = {}
    for line in run_tool(tool, "--parsable").splitlines() if tool else ():
        words = line.split(":")  # mca:pml:ucx:version:...
        if words[0] == "mca" and len(words) > 3 and words[1] in _FRAMEWORKS:
            names = found.setdefault(words[1], [])
            if words[2] not in names:
                names.append(words[2])
    return found
