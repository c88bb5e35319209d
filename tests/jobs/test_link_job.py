"""Ranks of one machine that stand for several hosts measure their link by real messages."""

from __future__ import annotations

import sys

import pytest
from helpers import JOBS, mpirun_command, run_job


@pytest.mark.slow
@pytest.mark.parametrize("nodes", ["0,1,1", "0,1,2,3"])
def test_all_ranks_of_a_group_find_the_same_link_and_choose_alike(nodes: str) -> None:
    ranks = nodes.count(",") + 1
    job = run_job(
        [*mpirun_command(ranks), sys.executable, JOBS / "link.py"],
        deadline=150,
        env={"SPARSECOMM_NODES": nodes, "SPARSECOMM_TIMEOUT": "60"},
    )
    assert job.code == 0, job
    assert f"{ranks} ranks have measured alike" in job.out
