"""Whole jobs in subprocesses: how they start under each launcher, and how they end when something goes wrong."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Sequence

import pytest
from helpers import JOBS, Job, job_environment, mpirun_command, run_job

pytestmark = pytest.mark.slow

TRAIN, INITIALIZED = JOBS / "train.py", JOBS / "initialized.py"
STRICT = [sys.executable, "-W", "error"]
"""Any warning ends the job."""


def mpi_train(ranks: int, *args: str, deadline: float = 60.0, timeout: float = 30.0) -> Job:
    command = [*mpirun_command(ranks), *STRICT, TRAIN, *args]
    return run_job(command, deadline=deadline, env={"SPARSECOMM_TIMEOUT": str(timeout)})


def assert_quiet_success(job: Job, ranks: int, transport: str, steps: int = 6) -> None:
    """All ranks end well, agree, and say nothing else."""
    assert job.code == 0, job
    assert job.err == "", job
    lines = sorted(job.out.splitlines())
    assert len(lines) == ranks, job
    for rank, line in enumerate(lines):
        assert line.startswith(f"rank {rank} of {ranks} over {transport}: {steps} steps, "), job
    assert len({line.split()[-1] for line in lines}) == 1, job


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_mpirun_trains_and_ends_quietly(ranks: int) -> None:
    job = mpi_train(ranks)
    assert_quiet_success(job, ranks, "mpi")
    assert job.seconds < 80, job


@pytest.mark.parametrize("order", ["forget", "forget_early"])
def test_a_forgotten_hook_is_spoken_of_once(order: str) -> None:
    """Whether the state is made before `init` or after it."""
    job = mpi_train(2, "--fail", order)
    assert job.code == 0, job
    assert job.err.count("Was the hook registered? ddp.register_comm_hook(state, sparsecomm.sparse_hook)") == 1, job


def test_a_wrong_option_is_explained_once_not_by_every_rank() -> None:
    job = mpi_train(3, "--collective", "nonsense")
    assert job.code != 0, job
    assert job.err.count("collective must be one of auto") == 2, job  # the traceback's last line, and who ends the job


def test_plain_python_is_a_world_of_one() -> None:
    job = run_job([*STRICT, TRAIN], deadline=60.0)
    assert_quiet_success(job, 1, "solo")


def test_torchrun_trains_over_gloo() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = run_job([*torchrun, TRAIN], deadline=90.0)
    assert job.code == 0, job
    assert sorted(line.split(":")[0] for line in job.out.splitlines()) == [
        "rank 0 of 2 over gloo",
        "rank 1 of 2 over gloo",
    ], job
    assert "Error" not in job.err, job


def test_torchrun_ends_the_job_when_a_rank_fails() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = run_job([*torchrun, TRAIN, "--fail", "raise"], deadline=90.0, env={"SPARSECOMM_TIMEOUT": "30"})
    assert job.code != 0, job
    assert "sparsecomm: rank 1 of 2 failed with ValueError: the dog ate the batch" in job.err, job


def by_hand(*args: str, env: dict[str, str] | None = None, ranks: Sequence[int] = (0, 1)) -> list[tuple[int, str, str]]:
    """Starts the ranks of a world of two with RANK and WORLD_SIZE set, without any launcher."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = job_environment() | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "SPARSECOMM_TIMEOUT": "30",
    }
    common |= env or {}
    common = {k: v for k, v in common.items() if v}
    processes = [
        subprocess.Popen(
            [*STRICT, TRAIN, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**common, "RANK": str(rank)},
        )
        for rank in ranks
    ]
    try:
        return [(p.returncode, out, err) for p in processes for out, err in [p.communicate(timeout=60)]]
    finally:
        for p in processes:
            p.kill()


@pytest.mark.parametrize("collective", ["allgather", "split_reduce"])
def test_rank_and_world_size_set_by_hand_train_over_gloo(collective: str) -> None:
    ended = by_hand("--collective", collective)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert [err for _, _, err in ended] == ["", ""], ended
    assert "rank 0 of 2 over gloo: 6 steps" in ended[0][1]
    assert "rank 1 of 2 over gloo: 6 steps" in ended[1][1]


def test_processes_started_by_hand_all_end_when_one_fails() -> None:
    ended = by_hand("--fail", "raise")
    assert all(code != 0 for code, _, _ in ended), ended
    assert "rank 1 of 2 failed with ValueError: the dog ate the batch" in ended[1][2]
    assert "rank 1" in ended[0][2], "the survivor names the rank that it lost"


def test_an_exception_on_one_rank_ends_the_job_and_is_named() -> None:
    job = mpi_train(3, "--fail", "raise", "--rank", "1", timeout=120.0)
    assert job.code != 0, job
    assert "ValueError: the dog ate the batch" in job.err, job
    assert (
        "sparsecomm: rank 1 of 3 failed with ValueError: the dog ate the batch; ending the job on all ranks" in job.err
    )
    assert job.seconds < 80, "it must not wait for the timeout"


def test_a_rank_that_stops_taking_part_is_named_and_the_job_ends() -> None:
    job = mpi_train(3, "--fail", "sleep", "--rank", "2", timeout=20.0)
    assert job.code != 0, job
    assert re.search(r"did not finish within 20 s; late: rank 2; this rank still waits for: .*rank 2", job.err), job
    assert "late: rank 1" not in job.err, job
    assert re.search(r"bucket \d+ of step 3", job.err), job
    assert "CommTimeout" in job.err, job
    assert job.seconds < 80, job


@pytest.mark.parametrize("collective", ["allgather", "split_reduce"])
def test_a_killed_rank_ends_the_job(collective: str) -> None:
    job = mpi_train(3, "--fail", "kill", "--rank", "1", "--collective", collective, timeout=120.0)
    assert job.code != 0, job
    assert job.seconds < 80, job


def test_a_second_world_under_torchrun_does_not_meet_the_first_in_the_store() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = run_job([*torchrun, INITIALIZED, "again"], deadline=90.0, env={"SPARSECOMM_TIMEOUT": "30"})
    assert job.code == 0, job
    assert sorted(job.out.split("\n")) == ["", "ok 0", "ok 1"], job


@pytest.mark.parametrize("what", ["twice", "own_torch", "again", "fork", "loader"])
def test_init_under_mpirun(what: str) -> None:
    job = run_job([*mpirun_command(2), *STRICT, INITIALIZED, what], deadline=60.0)
    assert job.code == 0, job
    assert sorted(job.out.split("\n")) == ["", "ok 0", "ok 1"], job
    assert job.err == "", job


def test_a_torch_distributed_of_another_world_is_refused_with_both_worlds_in_the_message() -> None:
    job = run_job([*mpirun_command(2), *STRICT, INITIALIZED, "other_torch"], deadline=60.0)
    assert job.code != 0, job
    for rank in range(2):
        assert re.search(rf"LaunchError: .*rank 0 of 1, the launcher says rank {rank} of 2", job.err), job


@pytest.mark.parametrize("what", ["twice", "no_init", "again", "fork", "loader", "bad_timeout", "spawned"])
def test_init_in_plain_python(what: str) -> None:
    job = run_job([*STRICT, INITIALIZED, what], deadline=60.0)
    assert job.code == 0, job
    assert (job.out, job.err) == ("ok 0\n", ""), job


def test_a_spawned_rank_that_fails_ends_the_job() -> None:
    job = run_job([*STRICT, INITIALIZED, "spawned_failure"], deadline=60.0)
    assert job.code != 0, job
    assert "ValueError: the dog ate the batch" in job.err, job


def test_world_size_without_a_rank_is_an_error_not_a_world_of_one() -> None:
    job = run_job([*STRICT, TRAIN], deadline=60.0, env={"WORLD_SIZE": "2"})
    assert job.code != 0, job
    assert "WORLD_SIZE = 2 is set, but not RANK" in job.err, job


def test_world_size_without_an_address_is_an_error_not_a_world_of_one() -> None:
    """RANK and WORLD_SIZE alone: two processes that each train alone would be a silent disaster."""
    ended = by_hand(env={"MASTER_ADDR": "", "MASTER_PORT": ""})
    assert all(code != 0 for code, _, _ in ended), ended
    assert all("MASTER_ADDR" in err for _, _, err in ended), ended
