"""`Lab`: makes, uses and removes several hosts on this machine."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType

from sparsecomm.errors import LabError
from sparsecomm.tools.lab import teardown
from sparsecomm.tools.lab.inhabit import on_host, write_scripts
from sparsecomm.tools.lab.mpi import find_mpirun, job_environment, launch_line
from sparsecomm.tools.lab.network import SWITCH, bits_per_second, build, shape
from sparsecomm.tools.lab.requirements import missing
from sparsecomm.tools.lab.state import (
    INTERFACE,
    State,
    boot_id,
    check_hosts,
    check_name,
    lab_names,
    load,
    own_cores,
    remedy,
    start_time,
)
from sparsecomm.tools.lab.supervise import supervise

__all__ = ["Lab"]

_SUBNETS = 256


class Lab:
    """Hosts made of network namespaces and joined by links of a given rate; as a context manager, for a `with` block.

    Needs Linux and root. A watchdog process removes the lab if this process dies, even by SIGKILL.

    Args:
        hosts: Number of hosts, 1 to 64.
        rate: Rate of every link in each direction, in tc's units ("1gbit", "100mbit"); None for no limit.
        name: Name of the lab; host names begin with it.
        pin: Whether each host's processes run on a core of their own: host i on core i of those that this process may
            use. Otherwise all hosts share all cores.

    Raises:
        LabError: An argument is not acceptable, or there are fewer cores than hosts to pin.
    """

    def __init__(self, *, hosts: int = 4, rate: str | None = "1gbit", name: str = "lab", pin: bool = False) -> None:
        bits_per_second(rate)
        self._state = State(
            name=check_name(name),
            token=secrets.token_hex(8),
            count=check_hosts(hosts),
            rate=rate,
            cores=own_cores(hosts) if pin else None,
            subnet=0,
            owner=None,
            owner_start=None,
            boot=boot_id() if sys.platform == "linux" else "",
        )
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._pid = 0

    @classmethod
    def find(cls, name: str = "lab") -> Lab:
        """Returns the lab of this name, which must be up.

        Raises:
            LabError: There is no such lab, or the process that owned it is dead.
        """
        state = load(check_name(name))
        if state is None:
            raise LabError(f"no lab {name!r} is up: sparsecomm lab up --name {name}")
        if state.orphaned or set(teardown.pins(name).values()) != {SWITCH, *state.hosts}:
            raise LabError(f"lab {name!r} was left behind by a dead process: remove it with `{remedy(name)}`")
        lab = cls(hosts=state.count, rate=state.rate, name=state.name)
        lab._state = state
        return lab

    @property
    def name(self) -> str:
        """The lab's name."""
        return self._state.name

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host names, valid on the hosts themselves and for mpirun."""
        return self._state.hosts

    @property
    def addresses(self) -> tuple[str, ...]:
        """The hosts' IPv4 addresses, known once the lab is up."""
        return self._state.addresses

    @property
    def interface(self) -> str:
        """The name of every host's network interface."""
        return INTERFACE

    @property
    def rate(self) -> str | None:
        """The rate of every link in each direction; None if there is no limit."""
        return self._state.rate

    @property
    def cores(self) -> tuple[int, ...] | None:
        """The core of each host's processes, by the kernel's numbers; None if the hosts are not pinned."""
        return self._state.cores

    def up(self, *, persistent: bool = False) -> Lab:
        """Makes the hosts. If anything fails or interrupts it, nothing of the lab remains.

        Args:
            persistent: Whether the lab outlives this process; otherwise it is removed when this process ends.

        Returns:
            This lab.

        Raises:
            LabError: This machine cannot make labs, or a lab of this name exists already.
        """
        problem = missing()
        if problem:
            raise LabError(f"no lab can be made here: {problem}")
        with _as_lab_errors(self.name), teardown.locked():
            self._refuse_taken_name()
            self._pid = os.getpid()
            self._state = replace(
                self._state, subnet=_free_subnet(), owner=self._pid, owner_start=start_time(self._pid)
            )
            try:
                self._watchdog = _start_watchdog(self._state)
                self._make(persistent)
            except BaseException:
                self._remove()
                raise
        if persistent:
            self._dismiss_watchdog()
        return self

    def _make(self, persistent: bool) -> None:
        self._state.create()
        write_scripts(self._state)
        build(self._state)
        if persistent:
            self._state = replace(self._state, owner=None, owner_start=None)
            self._state.save()

    def down(self) -> int:
        """Kills all processes inside and removes the hosts; does nothing if they are gone.

        Returns:
            Number of processes killed.

        Raises:
            LabError: A process cannot be killed, or part of the lab cannot be removed.
        """
        with _as_lab_errors(self.name), teardown.locked():
            return self._remove()

    def _remove(self) -> int:
        killed = teardown.take_down(self.name) if self._is_there() else 0
        self._dismiss_watchdog()
        return killed

    def set_rate(self, rate: str | None) -> None:
        """Changes the rate of all links.

        Args:
            rate: Rate in tc's units, as for the class; None for no limit.

        Raises:
            LabError: The rate is not acceptable, or the lab is not up.
        """
        bits_per_second(rate)
        with _as_lab_errors(self.name), teardown.locked():
            self._refuse_if_gone()
            before, self._state = self._state.rate, replace(self._state, rate=rate)
            self._state.save()
            shape(self._state, before)

    def mpirun(
        self,
        command: Sequence[str],
        *,
        ranks: int | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        capture: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on every rank, rank i on host i modulo the number of hosts.

        Only the lab's links carry messages between hosts. A timeout, an interrupt or any other exception kills all
        processes inside the lab, so run one job at a time. The same happens when mpirun has not ended some 10 s after
        its last rank: it waits for a host whose link is down.

        Args:
            command: Program and arguments.
            ranks: Number of ranks; one per host if None.
            env: Variables for all ranks, in addition to those of this process.
            timeout: Seconds; None for no limit.
            capture: Whether to collect the output; otherwise mpirun inherits the streams of this process.

        Returns:
            Exit code, standard output and standard error of mpirun. If it did not end after its ranks, the code is
            not 0, and the last line of `stderr` says so, also without `capture`.

        Raises:
            LabError: The lab is not up, there is no mpirun, or an argument is not acceptable.
            subprocess.TimeoutExpired: The job did not end in time; the exception holds the output so far.
        """
        count = len(self.hosts) if ranks is None else ranks
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise LabError(f"ranks = {ranks!r}: must be an integer of at least 1")
        if isinstance(command, str) or not command:
            raise LabError(f"command = {command!r}: must be a list of a program and its arguments")
        if timeout is not None and (isinstance(timeout, (bool, str)) or not 0 < timeout < math.inf):
            raise LabError(f"timeout = {timeout!r}: must be a number of seconds above 0")
        self._refuse_if_gone()
        launcher = find_mpirun()
        environment, names = job_environment(self._state, launcher, count, env or {})
        line = on_host(self._state, self.hosts[0], launch_line(self._state, launcher, command, count, names))
        try:
            return supervise(self.name, line, environment, timeout=timeout, capture=capture)
        except subprocess.TimeoutExpired as error:
            raise subprocess.TimeoutExpired(list(command), error.timeout, error.stdout, error.stderr) from None

    def __enter__(self) -> Lab:
        return self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() == self._pid:  # a forked child does not own the lab
            self.down()

    def __repr__(self) -> str:
        return f"Lab(hosts={self._state.count}, rate={self.rate!r}, name={self.name!r}, pin={self.cores is not None})"

    def _is_there(self) -> bool:
        found = teardown.read_state(self.name)
        return found is not None and found.get("token") == self._state.token

    def _refuse_if_gone(self) -> None:
        if not self._is_there():
            raise LabError(f"lab {self.name!r} is not up")

    def _refuse_taken_name(self) -> None:
        there = load(self.name)
        if there is not None and there.orphaned:
            raise LabError(f"a dead process left lab {self.name!r} behind: remove it with `{remedy(self.name)}`")
        if there is not None:
            raise LabError(
                f"lab {self.name!r} is up already: use it, give another --name, or remove it with `{remedy(self.name)}`"
            )

    def _dismiss_watchdog(self) -> None:
        if self._watchdog is None or os.getpid() != self._pid:
            return
        watchdog, self._watchdog = self._watchdog, None
        assert watchdog.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the watchdog is dead
            watchdog.stdin.write(teardown.KEEP)
        with contextlib.suppress(BrokenPipeError):
            watchdog.stdin.close()
        watchdog.wait()


@contextlib.contextmanager
def _as_lab_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LabError(f"lab {name!r}: {error}") from error


def _start_watchdog(state: State) -> subprocess.Popen[bytes]:
    """Starts the process that removes the lab when this process dies."""
    command = [sys.executable, "-I", "-S", teardown.__file__, state.name, state.token, str(os.getpid())]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True, bufsize=0, cwd="/"
    )


def _free_subnet() -> int:
    """Returns the first third byte of an address that no lab uses; labs with a damaged state file do not count."""
    taken = {(teardown.read_state(name) or {}).get("subnet") for name in lab_names()}
    for subnet in range(_SUBNETS):
        if subnet not in taken:
            return subnet
    raise LabError(f"there are {_SUBNETS} labs already: `sparsecomm lab status` lists them")
