"""Waits for a job in a lab, and ends what hangs: a job past its time, or a launcher that outlives its ranks.

A launcher that has lost a host waits for its daemon there, in Open MPI until TCP gives up after a quarter of an hour.
"""

from __future__ import annotations

import re
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparsecomm.tools.lab import teardown

__all__ = ["supervise"]

_LOOK_SECONDS = 1.0
_GRACE_LOOKS = 10
_LAUNCHERS = frozenset({"mpirun", "mpiexec", "prterun", "mpiexec.hydra"})
_DAEMON = re.compile(rb"\b(prted|hydra_\w+_proxy)\b")  # also in the shell by which the launch agent starts it
_STREAMS = (1, 2)


class _LauncherHangs(Exception):
    """All ranks have ended, and the launcher has not."""


def supervise(
    name: str, line: Sequence[str], environment: Mapping[str, str], *, timeout: float | None, capture: bool
) -> subprocess.CompletedProcess[str]:
    """Runs a launcher in a lab until it ends. Whatever interrupts that kills all processes inside the lab.

    Args:
        name: Name of the lab.
        line: Command of the launcher.
        environment: Variables of the launcher.
        timeout: Seconds; None for no limit.
        capture: Whether to collect the output.

    Returns:
        Exit code and output. If the launcher did not end after its ranks, the code is not 0, and the last line of
        `stderr`, which is otherwise None without `capture`, says so.

    Raises:
        subprocess.TimeoutExpired: The job did not end in time; the exception holds the output so far.
    """
    before = set(teardown.inside(name))
    pipe = subprocess.PIPE if capture else None
    process = subprocess.Popen(
        line,
        env=environment,
        stdin=subprocess.DEVNULL if capture else None,
        stdout=pipe,
        stderr=pipe,
        text=True,
        errors="replace",
    )
    try:
        out, err = _wait(process, _Watch(name, {process.pid, *before}, capture=capture), timeout)
    except BaseException as error:
        teardown.kill_inside(name)
        process.kill()  # in case it had not entered the lab yet
        out, err = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise subprocess.TimeoutExpired(line, error.timeout, out, err) from None
        if not isinstance(error, _LauncherHangs):
            raise
        said = (
            f"all ranks had ended, but {Path(line[0]).name} did not within "
            f"{_GRACE_LOOKS * _LOOK_SECONDS:g} s, so it was killed: it has probably lost a host of lab {name!r}\n"
        )
        return subprocess.CompletedProcess(line, process.returncode or 1, out, (err or "") + said)
    return subprocess.CompletedProcess(line, process.returncode, out, err)


def _wait(process: subprocess.Popen[str], watch: _Watch, timeout: float | None) -> tuple[str, str]:
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = _LOOK_SECONDS if deadline is None else deadline - time.monotonic()
        try:
            return process.communicate(timeout=max(0.0, min(left, _LOOK_SECONDS)))
        except subprocess.TimeoutExpired as error:
            if left <= _LOOK_SECONDS and timeout is not None:
                error.timeout = timeout
                raise
        if watch.launcher_hangs():
            raise _LauncherHangs


class _Watch:
    """Looks whether any rank is left. Counts looks and not seconds, since this process may be stopped and continued.

    Args:
        name: Name of the lab.
        others: Ids of processes that are no ranks: the launcher, and those that were in the lab before it.
        capture: Whether this process reads the output of the launcher.
    """

    def __init__(self, name: str, others: set[int], *, capture: bool) -> None:
        self._name = name
        self._others = others
        self._seen = False
        self._without = 0  # looks in succession that found no rank
        self._streams = select.poll()
        for stream in () if capture else _STREAMS:
            self._streams.register(stream, select.POLLOUT)
        self._count = 0 if capture else len(_STREAMS)

    def launcher_hangs(self) -> bool:
        """Looks; returns whether there were ranks, and long since there are none."""
        if any(pid not in self._others and not _launches(pid) for pid in teardown.inside(self._name)):
            self._seen = True
            self._without = 0
        elif self._seen and self._output_flows():
            self._without += 1
        return self._without > _GRACE_LOOKS

    def _output_flows(self) -> bool:
        """Returns whether nobody makes the launcher wait who reads its output slowly."""
        return len(self._streams.poll(0)) == self._count


def _launches(pid: int) -> bool:
    """Returns whether a process is part of a launcher, or has ended."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True
    return Path(line.partition(b"\0")[0].decode(errors="replace")).name in _LAUNCHERS or bool(_DAEMON.search(line))
