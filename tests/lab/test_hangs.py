"""What ends a job that hangs: the limit of the run, and the watch on a launcher that outlives its ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from labs import JOBS, Forks, gone, until

from sparsecomm.tools.lab import Lab, LabError, supervise, teardown

LIMIT = 5.0  # seconds of the collectives
SLACK = 45.0  # seconds for all else on a busy machine: the deadline of the ranks, their end, and the grace of mpirun


def cut(name: str, host: int) -> None:
    """Sets a host's link down."""
    pin = teardown.ROOT / name / "ns" / f"{name}-h{host}"
    subprocess.run(["nsenter", f"--net={pin}", "ip", "link", "set", "eth0", "down"], check=True, timeout=30)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("host", [0, 1], ids=["the host of mpirun", "another host"])
def test_a_run_ends_when_a_link_goes_down(name: str, host: int, forks: Forks, tmp_path: Path) -> None:
    trains = tmp_path / "trains"
    job = [sys.executable, str(JOBS / "train_on.py"), str(trains)]
    line = ["lab", "run", "--hosts", "3", "--name", name, "--env", f"SPARSECOMM_TIMEOUT={LIMIT:g}", "--", *job]
    run = forks.start(f"app({line!r})")
    assert until(trains.exists, 60.0), run.output.read_text()
    cut(name, host)
    start = time.monotonic()
    code = run.wait()
    said = run.output.read_text()
    assert code not in (0, 124), said
    assert time.monotonic() - start < LIMIT + SLACK, said
    assert "CommTimeout" in said, said
    assert "so it was killed: it has probably lost a host of lab" in " ".join(said.split()), said
    assert gone(name)


def test_a_run_ends_after_its_limit(name: str, forks: Forks) -> None:
    line = ["lab", "run", "--hosts", "2", "--name", name, "--timeout", "4", "--", "sleep", "93"]
    start = time.monotonic()
    run = forks.start(f"app({line!r})")
    assert run.wait() == 124
    assert time.monotonic() - start < 4 + SLACK
    assert f"the job did not end within 4 s: all processes in lab '{name}' were killed" in run.output.read_text()
    assert gone(name)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), True, "5"])
def test_limits_that_are_none_are_refused(name: str, timeout: float) -> None:
    with Lab(hosts=1, rate=None, name=name) as lab, pytest.raises(LabError, match="timeout = "):
        lab.mpirun(["true"], timeout=timeout)


def test_what_a_rank_leaves_running_counts_as_a_rank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_LOOK_SECONDS", 0.1)
    script = "(sleep 4; echo late) & sleep 0.5"  # mpirun waits for all who hold its output
    with Lab(hosts=1, rate=None, name=name) as lab:
        done = lab.mpirun(["/bin/sh", "-c", script], timeout=60)
    assert (done.returncode, done.stdout) == (0, "late\n"), done


def test_a_launcher_that_waits_for_the_reader_of_its_output_does_not_hang(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    monkeypatch.setattr(supervise, "_STREAMS", (writes,))
    with Lab(hosts=1, rate=None, name=name) as lab:
        enter = ["/bin/sh", str(teardown.ROOT / name / "enter"), lab.hosts[0]]
        watch = supervise._Watch(name, set(), capture=False)
        with subprocess.Popen([*enter, "sleep", "92"]) as rank:
            assert until(lambda: teardown.inside(name))
            assert not watch.launcher_hangs()
            rank.kill()
        written = 0
        while True:
            try:
                written += os.write(writes, bytes(4096))
            except BlockingIOError:
                break
        assert not any(watch.launcher_hangs() for _ in range(100))
        os.read(reads, written)
        assert [watch.launcher_hangs() for _ in range(11)] == [False] * 10 + [True]
    os.close(reads)
    os.close(writes)
