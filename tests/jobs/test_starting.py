"""The start of a job has a deadline, also while MPI itself waits for a rank that is gone."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
from helpers import JOBS, job_environment, run_job
from kills import Trial, run
from test_jobs import by_hand
from test_leaving import launch_line

from sparsecomm.launch import Launch
from sparsecomm.launch.starting import deadline, who_is_missing

LATE = JOBS / "late.py"


def some_launch(**changes: object) -> Launch:
    launch = Launch("python", 0, 3, 0, "mpi", local_size=3, job="test of missing ranks")
    return dataclasses.replace(launch, **changes)  # type: ignore[arg-type]


def test_ranks_that_have_not_come_are_named() -> None:
    said = who_is_missing(some_launch())
    assert re.search(r"on this node \(.*\) rank 0 came, ranks 1, 2 did not: ended or stuck before this call", said)


def test_of_several_nodes_the_ranks_of_this_one_are_counted() -> None:
    assert "2 of its 3 ranks did not" in who_is_missing(some_launch(size=9))
    assert "of the ranks on other nodes this one knows nothing" in who_is_missing(some_launch(size=9, local_size=1))
    assert "knows nothing" in who_is_missing(some_launch(size=9, local_size=None))


def test_a_process_is_seen_as_long_as_it_lives() -> None:
    code = (
        "from sparsecomm.launch import Launch\n"
        "from sparsecomm.launch.starting import deadline\n"
        "with deadline(60, Launch('python', 2, 3, 0, 'mpi', local_size=3, job='test of missing ranks'), 'x'):\n"
        "    print('here', flush=True)\n"
        "    input()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=job_environment()
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    assert "ranks 0, 2 came, rank 1 did not" in who_is_missing(some_launch())
    child.communicate("\n", timeout=30)
    assert "ranks 1, 2 did not" in who_is_missing(some_launch())


def test_a_long_name_of_a_job_fits_into_an_address() -> None:
    assert "ranks 1, 2 did not" in who_is_missing(some_launch(job="x" * 500))


def test_what_is_done_in_time_goes_on() -> None:
    with deadline(0.2, some_launch(size=1), "x"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "how"), [("mpirun", "end"), ("ulfm", "sleep")])
def test_a_rank_that_does_not_come_is_named_after_the_timeout(launcher: str, how: str) -> None:
    command = [*launch_line(launcher, 3), LATE, how, *(["60"] if how == "sleep" else [])]
    job = run_job(command, deadline=90.0, env={"SPARSECOMM_TIMEOUT": "5"})
    assert job.code != 0, job
    said = r"sparsecomm.init\(\) has waited 5 s for other ranks.*ranks 0, 2 came, rank 1 did not"
    assert re.search(said, job.err), job


@pytest.mark.slow
def test_a_rank_that_torchs_store_waits_for_is_named_too() -> None:
    ended = by_hand(env={"SPARSECOMM_TIMEOUT": "5"}, ranks=(0,))
    assert ended[0][0] != 0, ended
    assert "sparsecomm.init() has waited 5 s for other ranks" in ended[0][2], ended
    assert "rank 0 came; of the ranks on other nodes this one knows nothing" in ended[0][2], ended


@pytest.mark.slow
def test_a_job_ends_when_a_rank_is_killed_while_it_starts() -> None:
    """`make faults` kills a hundred. Under plain mpirun the launcher itself ends the job."""
    code, said = run(Trial("ps", ulfm=True, victim=2, at=1.5))
    assert code is not None, f"hung\n{said}"
