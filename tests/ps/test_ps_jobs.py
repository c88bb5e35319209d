"""The parameter server under mpirun, with processes that are killed."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import mpirun_command, run_job

sys.path.insert(0, str(Path(__file__).parent))
import chaos

if "--oversubscribe" not in mpirun_command(1):
    pytest.skip("only Open MPI has ULFM", allow_module_level=True)

SMALL = Path(__file__).parent / "jobs" / "small.py"


@pytest.mark.parametrize("victim", ["worker", "server"])
def test_the_others_go_on_when_a_rank_is_killed(victim: str) -> None:
    """The moment of the death differs from run to run; `make chaos` tries many."""
    seed = int.from_bytes(os.urandom(3), "little")
    result = chaos.run(chaos.Trial.draw(f"test {seed}", victim, workers=2, servers=1 if victim == "worker" else 2))
    assert (result.outcome, result.landed) == ("finished", True), result


def test_four_servers_and_six_workers_share_two_cores_and_a_worker_dies() -> None:
    result = chaos.run(chaos.Trial.draw("four by six", "worker", workers=6, servers=4))
    assert (result.outcome, result.landed) == ("finished", True), result


@pytest.mark.parametrize(("servers", "workers"), [(1, 1), (3, 2)])
def test_other_numbers_of_servers_and_workers_without_ulfm(tmp_path: Path, servers: int, workers: int) -> None:
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


def test_workers_join_a_running_job_and_one_of_them_is_killed(tmp_path: Path) -> None:
    """Two workers run, and two join from outside of mpirun. One of these is killed; the others go on without ULFM."""
    steps, dying, meeting = 60, 40, tmp_path / "meeting"
    options = ["--folder", tmp_path, "--servers", "1", "--steps", str(steps), "--rendezvous", meeting]
    options += ["--pause", "0.02", "--timeout", "100"]
    with ThreadPoolExecutor() as pool:
        running = pool.submit(
            run_job, [*mpirun_command(3), sys.executable, SMALL, *options, "--expect", "4"], deadline=200
        )
        while chaos.progress_of(tmp_path, 0)[1] < 3 and not running.done():
            time.sleep(0.01)
        joiner = [sys.executable, SMALL, *options, "--join"]
        dies = pool.submit(run_job, [*joiner, "--die-at", str(dying)], deadline=150)
        stays = run_job(joiner, deadline=150)
        job = running.result()
    assert job.code == 0, job
    assert stays.code == 0, stays
    assert dies.result().code == -signal.SIGKILL, dies.result()
    state = torch.load(tmp_path / "shard-0-at-2.pt")
    pushes, began = state["pushes"], state["joined"]
    (dead,) = (rank for rank in began if f"worker rank {rank} died" in job.err)
    (alive,) = set(began) - {dead}
    assert {dead, alive} == {3, 4}
    assert all(3 < at < dying for at in began.values()), "they joined in the middle"
    assert all(f"worker rank {rank} joins shard 0 at clock {at}" in job.err for rank, at in began.items())
    assert (pushes[0], pushes[1], pushes[alive]) == (steps, steps, steps - began[alive])
    assert dying - 1 - began[dead] <= pushes[dead] <= dying - began[dead]
    check_sums(state, {0: 0, 1: 0} | began)


def check_sums(state: dict[str, Any], began: dict[int, int]) -> None:
    """Checks that the shard's updates are the averages, by round, of the pushes since each worker began."""
    trial = chaos.Trial("", "nobody", 2, 1, "sync", 0.0, "asked", -1, 0.0)
    rounds: list[list[torch.Tensor]] = [[] for _ in range(state["version"])]
    for rank, first in began.items():
        worker = rank if rank < 2 else rank - 1  # the server's rank lies between
        pushed = chaos.pushes_of(worker, trial, rank, range(first, first + state["pushes"][rank]))
        for step, each in enumerate(pushed, first):
            rounds[step].append(each.double())
    sizes = [len(r) for r in rounds]
    assert state["averaged"] == {n: sizes.count(n) for n in set(sizes)}
    expected = sum(torch.stack(r).mean(0) for r in rounds)
    start = torch.cat([p.detach().reshape(-1) for p in chaos.Model().parameters()])
    assert torch.allclose(start.double() - state["values"].double(), expected, atol=1e-3)


def test_workers_read_windows_while_the_server_updates_them() -> None:
    job = run_job([*mpirun_command(4), sys.executable, SMALL.with_name("windows.py")], deadline=200)
    assert job.code == 0, job
    assert len(re.findall(r"worker \d: 41 pulls, \d+ torn, \d+ asked; pulls: one_sided", job.out)) == 3, job
    assert "synchronous, the same bits: [True, True]" in job.out, job
    assert all(way in job.out for way in ("sparse ", "dense ", "one_sided ")), job


def test_windows_are_refused_where_ranks_may_die(tmp_path: Path) -> None:
    command = mpirun_command(2)
    command[1:1] = chaos.ULFM
    options = ["--folder", tmp_path, "--servers", "1", "--steps", "2", "--pull-by", "one_sided"]
    job = run_job([*command, sys.executable, SMALL, *options], deadline=200)
    assert job.code != 0, job
    assert "no kind of window of this MPI goes on after the death of a rank" in job.err, job


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
        (2, ["--servers", "1", "--pull-by", "maybe"], "pull_by must be one of asked, one_sided, auto, got 'maybe'"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(
    tmp_path: Path, ranks: int, options: list[str], text: str
) -> None:
    job = run_job([*mpirun_command(ranks), sys.executable, SMALL, "--folder", tmp_path, *options], deadline=200)
    assert job.code != 0, job
    assert text in job.err, job


LEAVES = SMALL.with_name("leaves.py")


@pytest.mark.parametrize("way", ["exit", "sys.exit(0)", "raise"])
def test_a_training_function_may_leave_the_process(way: str) -> None:
    job = run_job([*mpirun_command(3), sys.executable, LEAVES, way], deadline=200)
    assert job.code == 0, job
    assert "rank 0, worker: returned" in job.out, job
    assert "rank 2, server: {0: 'ended', 1: 'ended'}" in job.out.replace("{1: 'ended', 0", "{0: 'ended', 1"), job
    assert "rank 1, worker" not in job.out, "sys.exit ends the process"


@pytest.mark.parametrize(
    ("way", "status", "text"),
    [("sys.exit(3)", 3, "status 3, by sys.exit(3)"), ("text", 1, "status 1, by sys.exit('no more data')")],
)
def test_a_status_of_failure_ends_the_job_with_it(way: str, status: int, text: str) -> None:
    job = run_job([*mpirun_command(3), sys.executable, LEAVES, way], deadline=200)
    assert job.code == status, job
    assert f"sparsecomm.ps: rank 1 of 3 failed with {text}; ending the job on all ranks" in job.err, job


def test_under_ulfm_the_others_go_on_without_it() -> None:
    command = mpirun_command(3)
    command[1:1] = chaos.ULFM
    job = run_job([*command, sys.executable, LEAVES, "sys.exit(3)"], deadline=200)
    assert "rank 1 of 3 failed with status 3, by sys.exit(3); the others go on" in job.err, job
    assert "rank 0, worker: returned" in job.out, job
    assert "1: 'status 3, by sys.exit(3)'" in job.out, job


def test_under_ulfm_an_end_at_once_is_noticed() -> None:
    """ULFM itself notices no process that ends with another status than 0."""
    command = mpirun_command(3)
    command[1:1] = chaos.ULFM
    job = run_job([*command, sys.executable, LEAVES, "os._exit(3)", "60"], deadline=50)
    assert "server rank 2: worker rank 1 died" in job.err, job
    assert "rank 0, worker: returned" in job.out, job


def test_a_timeout_names_the_rank_that_is_late() -> None:
    """The other worker and the server both wait for worker 1, which sleeps. Whoever ends the job names it."""
    job = run_job([*mpirun_command(3), sys.executable, LEAVES, "sleep", "8"], deadline=200)
    assert job.code != 0, job
    said = re.findall(
        r"CommTimeout: (?:worker rank 0 has waited 8 s .*|server rank 2 has heard .* waits for )(.*)", job.err
    )
    assert said, job
    assert all("push 4 of worker at rank 1 " in each for each in said), job
