"""Runs tests/mpi under mpirun with one to four ranks; `make test-mpi` does so on three MPIs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

import pytest
from helpers import ROOT, mpirun_command, run_job

DEADLINE = float(os.environ.get("SPARSECOMM_SUITE_DEADLINE", "600"))  # seconds
SUITE = ROOT / "tests" / "mpi" / os.environ.get("SPARSECOMM_SUITE_PATH", "")


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE + 30)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_mpi_suite_passes(ranks: int, record_property: Callable[[str, object], None]) -> None:
    pytest_args = ["-x", "-q", "--color=no", "-p", "no:cacheprovider", SUITE]
    command = [*mpirun_command(ranks, tag=True), sys.executable, "-m", "pytest", *pytest_args]
    job = run_job(command, deadline=DEADLINE, env={"SPARSECOMM_TIMEOUT": "60"})
    assert job.code == 0, job
    passed = re.findall(r"(\d+) passed", job.out)
    assert len(passed) == ranks, job
    record_property("passed", passed[0])
