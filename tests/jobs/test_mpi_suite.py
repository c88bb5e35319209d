"""Runs tests/mpi under mpirun with one to four ranks; `make test-mpi` does so on three MPIs.

Every case of a test runs with 1 and 2 ranks, and with 3 or 4. SPARSECOMM_SUITE_WHOLE=1 runs all of them with all
numbers of ranks, as `make test-mpi` does.

Part of it also runs under other default dtypes of torch; `make dtypes` runs all of it under these.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, mpirun_command, run_job

DEADLINE = float(os.environ.get("SPARSECOMM_SUITE_DEADLINE", "600"))  # seconds
MPI = ROOT / "tests" / "mpi"
SUITE = MPI / os.environ.get("SPARSECOMM_SUITE_PATH", "")
PROOF = "test_default_dtype.py::test_the_default_is_the_one_that_was_asked_for"
QUICK = {
    "float64": (PROOF, "test_training.py", "modes/test_half_precision.py"),
    "bfloat16": (PROOF, "modes/test_momentum_modes.py", "modes/test_optim_modes.py"),
}
"""Compressors and methods under one default, feedback and optimizers under the other."""


def passed(ranks: int, *paths: Path, **env: str) -> str:
    """Runs files, folders or tests of the suite on `ranks` ranks; returns how many tests passed on each."""
    pytest_args = ["-x", "-q", "--color=no", "-p", "no:cacheprovider", *paths]
    command = [*mpirun_command(ranks, tag=True), sys.executable, "-m", "pytest", *pytest_args]
    job = run_job(command, deadline=DEADLINE, env={"SPARSECOMM_TIMEOUT": "60"} | env)
    assert job.code == 0, job
    found = re.findall(r"(\d+) passed", job.out)
    assert len(found) == ranks, job
    return found[0]


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE + 30)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_mpi_suite_passes(ranks: int, record_property: Callable[[str, object], None]) -> None:
    half = "" if ranks < 3 or os.environ.get("SPARSECOMM_SUITE_WHOLE") else str(ranks % 2)
    record_property("passed", passed(ranks, SUITE, SPARSECOMM_SUITE_HALF=half))


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE + 30)
@pytest.mark.parametrize("dtype", QUICK)
def test_the_quick_part_passes_under_another_default_dtype(dtype: str) -> None:
    passed(2, *(MPI / name for name in QUICK[dtype]), SPARSECOMM_TEST_DTYPE=dtype)
