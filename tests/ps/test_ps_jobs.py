"""The parameter server under mpirun: real processes, really killed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
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
    trial = chaos.Trial.draw(seed, victim, small=True)
    print(trial)
    chaos.run(trial)


def test_without_ulfm_a_death_ends_the_job(tmp_path: Path) -> None:
    command = [*mpirun_command(3), sys.executable, SMALL, "--folder", tmp_path, "--servers", "1"]
    job = run_job([*command, "--kill", "1", "--after", "0.5", "--pause", "0.2"], deadline=200)
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
