"""Every collective on more ranks than a small machine has cores."""

from __future__ import annotations

import sys

import pytest
from helpers import JOBS, mpirun_command, run_job

from sparsecomm.exchange.method import methods


@pytest.mark.slow
@pytest.mark.parametrize("nodes", ["0,0,0,0,0,0,0,0", "0,0,0,1,1,1,1,2"], ids=["one node", "three nodes"])
def test_eight_ranks_lose_nothing_by_any_collective(nodes: str) -> None:
    command = [*mpirun_command(8), sys.executable, JOBS / "every_collective.py"]
    job = run_job(command, deadline=150, env={"SPARSECOMM_NODES": nodes, "SPARSECOMM_TIMEOUT": "60"})
    assert job.code == 0, job
    assert f"{len(methods())} collectives, 8 ranks: nothing lost, all alike" in job.out
