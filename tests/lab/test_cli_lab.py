"""`sparsecomm lab`: labs that stay, labs for one run, and the signals that end a run."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from labs import Forks, gone, until
from typer.testing import CliRunner, Result

from sparsecomm.tools.cli.app import app
from sparsecomm.tools.lab import requirements, teardown


def call(*args: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["lab", *args])


def test_a_lab_stays_is_used_changed_shown_and_removed(
    name: str, forks: Forks, capfd: pytest.CaptureFixture[str]
) -> None:
    maker = forks.start(f"app(['lab', 'up', '--hosts', '2', '--rate', '1gbit', '--name', {name!r}])")
    assert maker.wait() == 0
    assert "is up" in maker.output.read_text()
    assert call("up", "--name", name).exit_code == 1
    script = "echo $(hostname) $A; exit 4"
    assert call("run", "--name", name, "--env", "A=x", "-n", "3", "--", "/bin/sh", "-c", script).exit_code == 4
    assert f"{name}-h0 x" in capfd.readouterr().out.splitlines()
    assert call("rate", "100mbit", "--name", name).exit_code == 0
    line = ["/bin/sh", str(teardown.ROOT / name / "enter"), f"{name}-h1", "sleep", "95"]
    with subprocess.Popen(line) as process:
        assert until(lambda: commands_inside(name) == ["sleep"])
        shown = call("status").output
        assert f"{name}, 100mbit each way" in shown
        host = next(row for row in shown.splitlines() if f"{name}-h1" in row)
        assert host.split()[-1] == "1"
        assert "1 processes inside were killed" in call("down", "--name", name).output
        assert process.wait(10) == -signal.SIGKILL
    assert gone(name)
    assert call("down", "--name", name).exit_code == 1


def commands_inside(name: str) -> list[str]:
    """Returns the names of the processes in a lab; an empty list if one of them is just ending."""
    try:
        return [Path(f"/proc/{pid}/comm").read_text().strip() for pid in teardown.inside(name)]
    except OSError:
        return []


def test_a_lab_for_one_run_goes_with_it(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("run", "--hosts", "3", "--rate", "none", "--name", name, "--", "hostname").exit_code == 0
    assert sorted(capfd.readouterr().out.split()) == [f"{name}-h{i}" for i in range(3)]
    assert gone(name)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a host each needs two cores")
def test_pinned_hosts_are_shown_with_their_cores(name: str, forks: Forks, capfd: pytest.CaptureFixture[str]) -> None:
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))[:2]]
    maker = forks.start(f"app(['lab', 'up', '--hosts', '2', '--pin', '--name', {name!r}])")
    assert maker.wait() == 0
    assert f"on cores {', '.join(cores)}" in maker.output.read_text()
    shown = [line.split() for line in call("status").output.splitlines() if line.strip().startswith(f"{name}-h")]
    assert [line[2] for line in shown] == cores
    script = ["--", "/bin/sh", "-c", "echo $(hostname) $(grep Cpus_allowed_list /proc/self/status | cut -f 2)"]
    assert call("run", "--name", name, *script).exit_code == 0
    expected = [f"{name}-h{i} {core}" for i, core in enumerate(cores)]
    assert sorted(capfd.readouterr().out.splitlines()) == expected
    assert call("down", "--name", name).exit_code == 0
    assert call("run", "--pin", "--hosts", "2", "--name", name, *script).exit_code == 0
    assert sorted(capfd.readouterr().out.splitlines()) == expected
    assert gone(name)
    too_many = call("run", "--pin", "--hosts", "64", "--name", name, *script)
    assert too_many.exit_code == 1
    assert f"needs 64 cores, one for each, and this process may use {len(os.sched_getaffinity(0))}" in too_many.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_signals_end_a_run_and_its_lab(name: str, number: signal.Signals, forks: Forks) -> None:
    process = forks.start(f"app(['lab', 'run', '--hosts', '2', '--name', {name!r}, '--', 'sleep', '94'])")
    ranks = until(lambda: sum(map(_sleeps, teardown.inside(name))) == 2)
    os.kill(process.pid, number)
    assert process.wait() == {signal.SIGKILL: -9, signal.SIGINT: 130}.get(number, 128 + number)
    assert ranks
    assert gone(name)


def _sleeps(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip() == "sleep"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("run", "--", "true"), "no lab 'NAME' is up: sparsecomm lab up"),
        (("run", "--hosts", "1", "--env", "A", "--", "true"), "--env 'A' is not KEY=VALUE"),
        (("run", "--hosts", "0", "--", "true"), "hosts = 0"),
        (("up", "--rate", "warp"), "rate = 'warp'"),
        (("rate", "1gbit"), "no lab 'NAME' is up"),
        (("down",), "there is no lab 'NAME'"),
    ],
)
def test_mistakes_are_one_clear_error(name: str, args: tuple[str, ...], expected: str) -> None:
    done = call(args[0], "--name", name, *args[1:])
    assert done.exit_code == 1, done.output
    assert expected.replace("NAME", name) in done.output
    assert "Traceback" not in done.output


def test_a_missing_tool_is_named_with_its_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(requirements._PACKAGES, "no-such-tool", "some-package")
    assert "`no-such-tool` is not installed: install some-package" in call("up", "--name", name).output


def test_other_users_than_root_are_refused(name: str, forks: Forks) -> None:
    process = forks.start(f"os.setuid(65534); Lab(name={name!r}).up()")
    assert process.wait() == 1
    assert "needs root, and this is user 65534" in process.output.read_text()
