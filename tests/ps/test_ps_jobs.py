"""The parameter server under mpirun: real processes, really killed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import mpirun_command, run_job

sys.path.insert(0, str(Path(__file__).parent))
import chaos

if "--oversubscribe" not in mpirun_command(1):
    pytest.skip("only Open MPI has ULFM", allow_module_level=True)

SMALL = Path(__file__).parent / "jobs" / "small.py"


@pytest.mark.parametrize("victim", ["worker", "server"])
def test_the_rest_goes_on_when_one_is_killed(victim: str) -> None:
    """A moment that differs from run to run; `make chaos` tries many."""
    seed = int.from_bytes(os.urandom(3), "little")
    result = chaos.run(chaos.Trial.draw(f"test {seed}", victim, workers=2, servers=1 if victim == "worker" else 2))
    assert (result.outcome, result.landed) == ("finished", True), result


def test_four_servers_and_six_workers_share_two_cores_and_a_worker_dies() -> None:
    result = chaos.run(chaos.Trial.draw("four by six", "worker", workers=6, servers=4))
    assert (result.outcome, result.landed) == ("finished", True), result


@pytest.mark.parametrize(("servers", "workers"), [(1, 1), (3, 2)])
def test_servers_and_workers_in_other_numbers_without_ulfm(tmp_path: Path, servers: int, workers: int) -> None:
    job = run_job(
        [
            *mpirun_command(servers + workers),
            sys.executable,
            SMALL,
            "--folder",
            tmp_path,
            "--servers",
            str(servers),
            "--steps",
            "5",
        ],
        deadline=200,
    )
    assert job.code == 0, job
    for index in range(servers):
        assert torch.load(tmp_path / f"shard-{index}-at-{workers + index}.pt")["pushes"] == dict.fromkeys(
            range(workers), 5
        )


def test_without_ulfm_a_death_ends_the_job(tmp_path: Path) -> None:
    command = [*mpirun_command(3), sys.executable, SMALL, "--folder", tmp_path, "--servers", "1"]
    job = run_job([*command, "--kill", "1", "--at", "2", "--pause", "0.2"], deadline=200)
    assert job.code != 0, job
    assert "signal 9" in job.err, job


@pytest.mark.parametrize(
    ("ranks", "options", "text"),
    [
        (2, ["--servers", "2"], "servers = 2 of 2 ranks leave zero workers"),
        (
            2,
            ["--servers", "1", "--tolerant"],
            "this job was not started with ULFM; start the job with Open MPI's mpirun",
        ),
    ],
)
def test_what_cannot_work_is_said_at_once(tmp_path: Path, ranks: int, options: list[str], text: str) -> None:
    job = run_job([*mpirun_command(ranks), sys.executable, SMALL, "--folder", tmp_path, *options], deadline=200)
    assert job.code != 0, job
    assert text in job.err, job
