"""The Python interface of labs: hosts and links, jobs, refused options, and no effect on the rest of the machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import ROOT as CHECKOUT
from helpers import job_environment
from labs import JOBS, Forks, gone, machine

from sparsecomm.errors import SparseCommError
from sparsecomm.tools.lab import Lab, LabError, network, survey, teardown
from sparsecomm.tools.lab.survey import remove


def entered(lab: Lab, host: int, *command: str) -> str:
    """Returns the output of a command on a host."""
    line = ["/bin/sh", str(teardown.ROOT / lab.name / "enter"), lab.hosts[host], *command]
    return subprocess.run(line, capture_output=True, text=True, check=True, timeout=30).stdout


def cores_of_a_process(lab: Lab, host: int) -> set[int]:
    """Returns the cores that a process on a host may use."""
    code = "import os; print(*os.sched_getaffinity(0))"
    return set(map(int, entered(lab, host, sys.executable, "-c", code).split()))


def test_a_lab_is_hosts_on_one_network_and_the_machine_stays_as_it_was(name: str) -> None:
    before = machine(name)
    with Lab(hosts=3, rate="1gbit", name=name) as lab:
        assert machine(name) == before
        assert lab.hosts == tuple(f"{name}-h{i}" for i in range(3))
        assert len(set(lab.addresses)) == 3
        assert entered(lab, 1, "hostname").strip() == lab.hosts[1]
        assert lab.addresses[1] in entered(lab, 1, "ip", "-br", "-4", "addr", "show", lab.interface)
        assert set(os.listdir("/sys/class/net")) != {"lo", lab.interface}
        assert set(entered(lab, 1, "ls", "/sys/class/net").split()) == {"lo", lab.interface}
        names = entered(lab, 0, sys.executable, "-c", f"import socket; print(socket.gethostbyname({lab.hosts[2]!r}))")
        assert names.strip() == lab.addresses[2]
        assert "rate 1Gbit" in entered(lab, 2, "tc", "qdisc", "show", "dev", lab.interface)
        lab.set_rate(None)
        assert "tbf" not in entered(lab, 2, "tc", "qdisc", "show")
        lab.set_rate(None)
        lab.set_rate("10mbit")
        assert "rate 10Mbit" in entered(lab, 2, "tc", "qdisc", "show")
    assert machine(name) == before
    with pytest.raises(LabError, match="is not up"):
        lab.mpirun(["true"])


def test_two_labs_are_up_at_once(name: str) -> None:
    with Lab(hosts=1, rate=None, name=name) as one, Lab(hosts=2, rate="1gbit", name=f"{name}-b") as two:
        assert not {a.rpartition(".")[0] for a in one.addresses} & {a.rpartition(".")[0] for a in two.addresses}
        found = {lab.name: lab for lab in survey()}
        assert found[name].rate is None
        assert (found[two.name].rate, found[two.name].hosts) == ("1gbit", two.hosts)
        assert found[name].problem is found[two.name].problem is None
        assert found[name].owner == os.getpid()


@pytest.mark.parametrize("megabits", [100, 400])
def test_messages_between_hosts_take_the_time_that_the_rate_says(name: str, megabits: int) -> None:
    with Lab(hosts=2, rate=f"{megabits}mbit", name=name) as lab:
        done = lab.mpirun([sys.executable, str(JOBS / "transfer.py"), str(megabits * 30_000)], ranks=2, timeout=60)
    assert done.returncode == 0, done
    for rate in map(float, done.stdout.split()):
        assert rate == pytest.approx(megabits, rel=0.15)
    assert len(done.stdout.split()) == 2


def test_ranks_are_spread_over_hosts_in_turn(name: str) -> None:
    script = 'echo "$(hostname) $OMPI_COMM_WORLD_RANK $MARK $MASTER_ADDR $GLOO_SOCKET_IFNAME"'
    with Lab(hosts=4, rate="1gbit", name=name) as lab:
        done = lab.mpirun(["/bin/sh", "-c", script], ranks=5, env={"MARK": "a b"}, timeout=60)
    assert done.returncode == 0, done
    expected = [f"{lab.hosts[rank % 4]} {rank} a b {lab.addresses[0]} {lab.interface}" for rank in range(5)]
    assert sorted(done.stdout.splitlines()) == sorted(expected)


CORES = sorted(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="a host each needs two cores")
WHERE = "import os, socket; print(socket.gethostname(), *os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS'])"


@needs_two_cores
def test_all_processes_of_a_pinned_host_run_on_its_core(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    where = [sys.executable, "-c", WHERE]
    with Lab(hosts=2, rate=None, name=name, pin=True) as lab:
        assert lab.cores == tuple(CORES[:2])
        done = lab.mpirun(where, ranks=4, timeout=60)
        assert done.returncode == 0, done
        lines = [f"{host} {core} 1" for host, core in zip(lab.hosts, CORES, strict=False)]
        assert sorted(done.stdout.splitlines()) == sorted(2 * lines)
        child = f"import subprocess; subprocess.run({where!r}, check=True)"
        inherited = lab.mpirun([sys.executable, "-c", child], env={"OMP_NUM_THREADS": "3"}, timeout=60)
        lines = [line.removesuffix("1") + "3" for line in lines]
        assert sorted(inherited.stdout.splitlines()) == lines, "the user's number of threads takes precedence"
        assert cores_of_a_process(lab, 1) == {CORES[1]}
        found = Lab.find(name)
        assert found.cores == lab.cores
        assert repr(found) == repr(lab) == f"Lab(hosts=2, rate=None, name={name!r}, pin=True)"
        assert next(one.cores for one in survey() if one.name == name) == lab.cores


def test_hosts_that_are_not_pinned_share_all_cores(name: str) -> None:
    with Lab(hosts=1, rate=None, name=name) as lab:
        assert lab.cores is Lab.find(name).cores is None
        file = teardown.ROOT / name / teardown.STATE_FILE
        state = json.loads(file.read_text())
        assert state.pop("cores") is None
        file.write_text(json.dumps(state))
        assert Lab.find(name).cores is None, "a lab that was made before hosts could be pinned"
        assert cores_of_a_process(lab, 0) == set(CORES)


def test_fewer_cores_than_pinned_hosts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 3})
    assert Lab(hosts=2, pin=True).cores == (3, 5), "those that this process may use"
    with pytest.raises(LabError, match=r"3 pinned hosts needs 3 cores.* may use 2"):
        Lab(hosts=3, pin=True)


def test_ddp_with_the_hook_trains_across_hosts(name: str) -> None:
    train = [sys.executable, str(CHECKOUT / "tests/mpi/jobs/train.py"), "--steps", "2"]
    with Lab(hosts=2, rate="1gbit", name=name) as lab:
        done = lab.mpirun(train, timeout=120)
    assert done.returncode == 0, done
    said = done.stdout.splitlines()
    assert len(said) == 2
    assert all("of 2 over mpi: 2 steps" in line for line in said)
    assert len({line.rpartition(", ")[2] for line in said}) == 1, "replicas agree"


def test_a_timeout_kills_everything_inside(name: str) -> None:
    script = "echo started; setsid sleep 98 & sleep 98"  # one sleep is outside the job's process group
    with Lab(hosts=2, rate=None, name=name) as lab:
        start = time.monotonic()
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            lab.mpirun(["/bin/sh", "-c", script], timeout=2.5)
        assert time.monotonic() - start < 12
        assert caught.value.cmd == ["/bin/sh", "-c", script]
        assert str(caught.value.stdout).split() == ["started", "started"]
        assert not teardown.inside(name)
        # Open MPI 5.0.11 sometimes hangs with a command that ends at once, such as `true`.
        assert lab.mpirun(["sleep", "0.3"], timeout=30).returncode == 0, "the lab is still usable"


def test_failures_of_a_job_are_its_exit_code(name: str) -> None:
    with Lab(hosts=1, rate=None, name=name) as lab:
        assert lab.mpirun(["/bin/sh", "-c", "echo gone wrong >&2; exit 3"], timeout=30).returncode == 3
        for ranks in (0, -1, True, 1.5):
            with pytest.raises(LabError, match="ranks"):
                lab.mpirun(["true"], ranks=ranks)  # type: ignore[arg-type]
        for command in ("true", []):
            with pytest.raises(LabError, match="command"):
                lab.mpirun(command)


@pytest.mark.parametrize(
    "options",
    [
        *({"hosts": h} for h in (0, -1, 65, True, 2.0, "4")),
        *({"name": n} for n in ("", "a/b", "..", "-a", "UP", "a" * 21, "a b", None)),
        *(
            {"rate": r}
            for r in ("", "fast", "1gb", "-1gbit", "1 gbit", "10%", "0gbit", "1bit", "1000gbit", "1e9bit", 5)
        ),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name_and_value(options: dict[str, Any]) -> None:
    (option, value), *_ = options.items()
    with pytest.raises(LabError) as caught:
        Lab(**options)
    assert f"{option} = {value!r}" in str(caught.value)
    assert isinstance(caught.value, SparseCommError)


@pytest.mark.parametrize(
    ("rate", "bits"),
    [("1gbit", 10**9), ("1GBit", 10**9), ("2.5mbit", 2_500_000), ("1mibit", 2**20), ("125mbps", 10**9), (None, None)],
)
def test_rates_are_read_as_tc_reads_them(rate: str | None, bits: int | None) -> None:
    assert network.bits_per_second(rate) == bits


def test_a_name_that_is_taken_is_refused_and_what_has_it_is_not_touched(name: str) -> None:
    with Lab(hosts=1, name=name) as lab:
        for again in (lab, Lab(hosts=1, name=name)):
            with pytest.raises(LabError, match=r"is up already.*sparsecomm lab down --name"):
                again.up()
        assert entered(lab, 0, "hostname").strip() == lab.hosts[0]
        Lab(hosts=1, name=name).down()  # must not remove another lab of the same name
        assert entered(lab, 0, "hostname").strip() == lab.hosts[0]


def test_what_is_not_a_lab_is_not_touched(name: str) -> None:
    foreign = teardown.ROOT / name / "something"
    foreign.parent.mkdir(parents=True)
    try:
        foreign.write_text("mine")
        for action in (Lab(hosts=1, name=name).up, lambda: remove(name), lambda: Lab.find(name)):
            with pytest.raises(LabError, match="is not a lab that sparsecomm made"):
                action()  # type: ignore[operator]
        assert foreign.read_text() == "mine"
        assert [lab.fix for lab in survey() if lab.name == name] == [f"rm -r {foreign.parent}"]
    finally:
        foreign.unlink()
        foreign.parent.rmdir()
        with teardown.locked():
            pass  # releasing the lock removes the folder of labs if it is empty


@pytest.fixture
def foreign(name: str) -> Iterator[str]:
    """A foreign namespace with a process, and a foreign bridge, named like a lab's host and bridge."""
    made = f"{name}-h0"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, timeout=30)

    ip("netns", "add", made)
    ip("link", "add", "br0", "type", "bridge")
    process = subprocess.Popen(["ip", "netns", "exec", made, "sleep", "96"])
    yield made
    alive = process.poll() is None
    process.kill()
    process.wait()
    ip("link", "del", "br0")
    ip("netns", "del", made)
    assert alive


def test_foreign_namespaces_bridges_and_processes_of_the_same_names_stay(name: str, foreign: str) -> None:
    before = machine(name)
    assert any(line.startswith(foreign) for line in before)
    with Lab(hosts=2, name=name) as lab:
        assert lab.hosts[0] == foreign
        assert lab.mpirun(["hostname"], timeout=30).stdout.split().count(foreign) == 1
        assert not teardown.inside(name)
    assert machine(name) == before


@pytest.mark.parametrize("call", range(1, 7))
def test_a_failure_while_it_is_made_leaves_nothing(name: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., None] = network._run
    calls = iter(range(1, 100))

    def run(command: list[str], text: str = "") -> None:
        # No kernel has this link type, so the command fails as it would on a kernel without tbf.
        real(command, text) if next(calls) != call else real([*command[:2], "ip", "link", "add", "x", "type", "none"])

    monkeypatch.setattr(network, "_run", run)
    with pytest.raises(LabError, match="failed"):
        Lab(hosts=1, name=name).up()
    assert gone(name)


def test_a_lab_whose_owner_and_watchdog_were_killed_is_shown_and_removed(name: str, forks: Forks) -> None:
    code = f"lab = Lab(hosts=1, name={name!r}).up(); os.kill(lab._watchdog.pid, 9); os.kill(os.getpid(), 9)"
    assert forks.start(code).wait() == -signal.SIGKILL
    (dead,) = (lab for lab in survey() if lab.name == name)
    assert "is dead" in str(dead.problem)
    assert dead.fix == f"sparsecomm lab down --name {name}"
    for action in (Lab(hosts=1, name=name).up, lambda: Lab.find(name)):
        with pytest.raises(LabError, match="sparsecomm lab down"):
            action()  # type: ignore[operator]
    assert remove(name) == 0
    assert gone(name)


def test_a_damaged_state_file_is_told_and_removed_with_its_lab(name: str) -> None:
    lab = Lab(hosts=1, name=name).up()
    (teardown.ROOT / name / teardown.STATE_FILE).write_text("{")
    for action in (Lab(hosts=1, name=name).up, lambda: Lab.find(name)):
        with pytest.raises(LabError, match=r"damaged.*sparsecomm lab down"):
            action()  # type: ignore[operator]
    remove(name)
    assert lab.down() == 0


@pytest.mark.timeout(120)
def test_sigkill_at_any_moment_leaves_nothing(name: str) -> None:
    before = machine(name)
    command = [sys.executable, str(JOBS / "die.py"), name]
    done = subprocess.run(command, env=job_environment(), capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done
    *moments, left = done.stdout.splitlines()
    assert Counter(line.partition(": ")[2] for line in moments) == {"killed, gone": 21}, done.stdout
    assert left == "processes left: []"
    assert machine(name) == before
