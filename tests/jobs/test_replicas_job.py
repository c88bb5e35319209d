"""Whole jobs of FSDP2 with replicas: 4 ranks as 2 replicas of 2 shards."""

from __future__ import annotations

import sys

import pytest
from helpers import JOBS, Job, mpirun_command, run_job

pytestmark = pytest.mark.slow

RANKS = 4
REPLICAS = JOBS / "replicas.py"
EXACT = ["dense", "add_up", "methods", "optimizers"]
NOTHING_LOST = ["conserve", "conserve_fused", "conserve_large", "conserve_bf16", "conserve_accumulated"]
BOOKS = ["checkpoint", "other_replicas", "other_shards"]
REFUSED = ["bad_models", "bad_passes", "interrupted"]


def replicas_job(backend: str, *checks: str, deadline: float = 480.0) -> Job:
    return run_job([*mpirun_command(RANKS), sys.executable, REPLICAS, backend, *checks], deadline=deadline)


@pytest.mark.parametrize("checks", [EXACT, NOTHING_LOST, BOOKS, REFUSED], ids=" ".join)
def test_replicas_of_a_sharded_model(checks: list[str]) -> None:
    job = replicas_job("sparsecomm", *checks)
    assert job.code == 0, job
    assert sorted(job.out.splitlines()) == sorted(f"{check} {rank}" for check in checks for rank in range(RANKS)), job


def test_replicas_over_gloo() -> None:
    checks = ["dense", "conserve", "checkpoint", "optimizers", "bad_passes"]
    job = replicas_job("gloo", *checks)
    assert job.code == 0, job
    assert sorted(job.out.splitlines()) == sorted(f"{check} {rank}" for check in checks for rank in range(RANKS)), job


def test_replicas_that_use_different_layers_say_so_at_once() -> None:
    """The deadline is below the time limit of an exchange."""
    job = replicas_job("sparsecomm", "other_layers", deadline=240.0)
    assert job.code not in (0, -1), job
    assert "CollectiveMismatch: ranks disagree on" in job.err, job
