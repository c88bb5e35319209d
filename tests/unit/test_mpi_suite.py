"""Runs tests/mpi under mpirun with one to four ranks."""

from __future__ import annotations

import sys

import pytest
from helpers import ROOT, mpirun_command, run_job


@pytest.mark.slow
@pytest.mark.timeout(630)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_mpi_suite_passes(ranks: int) -> None:
    pytest_args = ["-x", "-q", "--color=no", "-p", "no:cacheprovider", ROOT / "tests" / "mpi"]
    command = [*mpirun_command(ranks, options=["--output", "tag"]), sys.executable, "-m", "pytest", *pytest_args]
    job = run_job(command, deadline=600.0, env={"SPARSECOMM_TIMEOUT": "60"})
    assert job.code == 0, job
    assert job.out.count(" passed") == ranks, job
