"""Whole jobs of the backend: how they start, and how operations end when a rank leaves, is late or errs."""

from __future__ import annotations

import sys

import pytest
from helpers import JOBS, Job, mpirun_command, run_job

pytestmark = pytest.mark.slow

BACKEND = JOBS / "backend.py"
STRICT = [sys.executable, "-W", "error"]
"""Any warning ends the job."""


def backend_job(ranks: int, what: str, **env: str) -> Job:
    command = [*mpirun_command(ranks), *STRICT, BACKEND, what]
    return run_job(command, deadline=90.0, env={"SPARSECOMM_TIMEOUT": "30"} | env)


def assert_all_well(job: Job, ranks: int) -> None:
    assert job.code == 0, job
    assert sorted(job.out.splitlines()) == [f"ok {rank}" for rank in range(ranks)], job
    assert job.err == "", job


@pytest.mark.parametrize(
    ("what", "ranks"), [("start", 1), ("start", 3), ("address", 2), ("neighbours", 3), ("closed", 2)]
)
def test_it_starts_without_an_address(what: str, ranks: int) -> None:
    assert_all_well(backend_job(ranks, what), ranks)


def test_it_starts_without_a_launcher_by_its_own_address() -> None:
    assert_all_well(run_job([*STRICT, BACKEND, "address"], deadline=60.0), 1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_models_are_sharded_and_split(ranks: int) -> None:
    ways = ["fsdp2", "mesh", "tensor_parallel", "zero", "checkpoint"]
    job = run_job([*mpirun_command(ranks), sys.executable, JOBS / "sharded.py", *ways], deadline=240.0)
    assert job.code == 0, job
    assert sorted(job.out.splitlines()) == sorted(f"{way} {rank}" for way in ways for rank in range(ranks)), job


def test_a_mismatch_names_both_sides_on_every_rank() -> None:
    assert_all_well(backend_job(3, "mismatch", TORCH_DISTRIBUTED_DEBUG="DETAIL"), 3)


def test_a_rank_that_leaves_is_named_by_the_others() -> None:
    ranks = 3
    job = backend_job(ranks, "leave")
    assert job.code != 0, job
    assert sorted(job.out.splitlines()) == [f"ok {rank}" for rank in range(ranks) if rank != 1], job
    assert job.err.count("ValueError: the dog ate the batch") >= 1, job
    assert "rank 1 of" in job.err, job


def test_a_late_rank_is_named_by_the_others() -> None:
    job = backend_job(3, "late")
    assert sorted(job.out.splitlines())[-2:] == ["ok 1", "ok 2"], job


def test_under_torchrun_it_says_what_to_do() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = run_job([*torchrun, BACKEND, "start"], deadline=90.0)
    assert job.code != 0, job
    assert "launch with mpirun or srun, or use the backend" in job.err, job
