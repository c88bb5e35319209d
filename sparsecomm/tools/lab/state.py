"""The description of a lab, and the state file that holds it before anything else of the lab exists."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sparsecomm.errors import LabError
from sparsecomm.tools.lab.teardown import ROOT, STATE_FILE, read_state

__all__ = [
    "INTERFACE",
    "MOST_HOSTS",
    "State",
    "boot_id",
    "check_hosts",
    "check_name",
    "lab_names",
    "load",
    "own_cores",
    "remedy",
    "start_time",
]

INTERFACE = "eth0"
MOST_HOSTS = 64
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?")


@dataclass(frozen=True)
class State:
    """A lab, as its state file describes it.

    Attributes:
        name: Name of the lab.
        token: Distinguishes this lab from earlier labs of the same name.
        count: Number of hosts.
        rate: Rate of each link in each direction, as the user gave it; None if unshaped.
        cores: Core of each host's processes, by the kernel's numbers; None if all hosts share all cores.
        subnet: Third byte of its addresses, 10.88.subnet.0/24.
        owner: Id of the process with which the lab ends; None if the lab outlives its maker.
        owner_start: Start of that process in clock ticks since boot, since process ids are reused.
        boot: Id of the machine's boot in which the lab was made.
    """

    name: str
    token: str
    count: int
    rate: str | None
    cores: tuple[int, ...] | None
    subnet: int
    owner: int | None
    owner_start: int | None
    boot: str

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host names; the files that pin the namespaces have the same names."""
        return tuple(f"{self.name}-h{i}" for i in range(self.count))

    @property
    def addresses(self) -> tuple[str, ...]:
        """IPv4 addresses of the hosts."""
        return tuple(f"10.88.{self.subnet}.{i + 1}" for i in range(self.count))

    @property
    def folder(self) -> Path:
        """The folder with all files of this lab."""
        return ROOT / self.name

    @property
    def scratch(self) -> Path:
        """The folder for mpirun's session files."""
        return self.folder / "tmp"

    def pin(self, host: str) -> Path:
        """Returns the file that a host's namespace is mounted on."""
        return self.folder / "ns" / host

    @property
    def orphaned(self) -> bool:
        """Whether its owner is dead or the machine has been restarted."""
        return self.boot != boot_id() or (self.owner is not None and start_time(self.owner) != self.owner_start)

    def create(self) -> None:
        """Makes the lab's folder, which holds the state file from the start. Call it under the lock."""
        draft = ROOT / f".{self.name}.{os.getpid()}"
        for part in ("ns", self.scratch.name):
            (draft / part).mkdir(parents=True)
        self._write(draft)
        draft.rename(self.folder)

    def save(self) -> None:
        """Replaces the state file atomically."""
        self._write(self.folder)

    def _write(self, folder: Path) -> None:
        draft = folder / f"{STATE_FILE}.new"
        draft.write_text(json.dumps(asdict(self), indent=2) + "\n")
        draft.replace(folder / STATE_FILE)


def load(name: str) -> State | None:
    """Reads a lab's state file.

    Returns:
        None if there is no lab of this name.

    Raises:
        LabError: The file is damaged, or something that is not a lab occupies its folder.
    """
    values = read_state(name)
    folder = ROOT / name
    if values is None:
        if folder.exists() or folder.is_symlink():
            raise LabError(f"{folder} exists and is not a lab that sparsecomm made: use another name or remove it")
        return None
    values.setdefault("cores", None)  # a lab of an earlier version may be up
    if set(values) != {field.name for field in fields(State)}:
        raise LabError(f"{folder / STATE_FILE} is damaged: remove the lab with `{remedy(name)}`")
    cores = values.pop("cores")
    return State(**values, cores=None if cores is None else tuple(cores))


def remedy(name: str) -> str:
    """Returns the command that removes a lab."""
    return f"sparsecomm lab down --name {name}"


def lab_names() -> Iterator[str]:
    """Yields the names of all labs, including dead ones."""
    if ROOT.is_dir():
        yield from sorted(path.name for path in ROOT.iterdir() if _NAME.fullmatch(path.name))


def check_name(name: str) -> str:
    """Returns the name if a lab can have it.

    Raises:
        LabError: It cannot.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise LabError(
            f"name = {name!r}: a lab's name has 1 to 20 of a-z, 0-9 and inner hyphens, since it is part of host names"
        )
    return name


def check_hosts(hosts: int) -> int:
    """Returns the number of hosts if a lab can have it.

    Raises:
        LabError: It cannot.
    """
    if isinstance(hosts, bool) or not isinstance(hosts, int) or not 1 <= hosts <= MOST_HOSTS:
        raise LabError(f"hosts = {hosts!r}: a lab has 1 to {MOST_HOSTS} hosts")
    return hosts


def own_cores(hosts: int) -> tuple[int, ...]:
    """Returns a core for each host: the first of those that this process may use.

    Raises:
        LabError: This process may use fewer cores than there are hosts.
    """
    usable = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    if len(usable) < hosts:
        raise LabError(
            f"a lab of {hosts} pinned hosts needs {hosts} cores, one for each, and this process may use "
            f"{len(usable)}: make fewer hosts, or do not pin them"
        )
    return tuple(usable[:hosts])


def boot_id() -> str:
    """Returns the id of the machine's current boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time(pid: int) -> int | None:
    """Returns the start of a process in clock ticks since boot; None if it has ended."""
    try:
        # The second field is the program's name in parentheses; the name itself may contain spaces and parentheses.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(rest[18])
