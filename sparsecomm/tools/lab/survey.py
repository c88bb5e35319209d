"""Lists all labs of this machine, including the remains of dead ones, and removes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sparsecomm.errors import LabError
from sparsecomm.tools.lab import teardown
from sparsecomm.tools.lab.network import SWITCH
from sparsecomm.tools.lab.state import check_name, lab_names, load, remedy

__all__ = ["LabStatus", "remove", "survey"]


@dataclass(frozen=True)
class LabStatus:
    """The status of one lab.

    Attributes:
        name: Name of the lab.
        hosts: Host names.
        addresses: IPv4 addresses of the hosts.
        rate: Rate of every link in each direction; None if unshaped.
        cores: Core of each host's processes; None if the hosts are not pinned.
        processes: Number of processes on each host.
        owner: Id of the process with which the lab ends; None if it stays until somebody removes it.
        problem: Why it is not usable; None if it is.
        fix: The command that removes it.
    """

    name: str
    hosts: tuple[str, ...]
    addresses: tuple[str, ...]
    rate: str | None
    cores: tuple[int, ...] | None
    processes: tuple[int, ...]
    owner: int | None
    problem: str | None
    fix: str


def survey() -> list[LabStatus]:
    """Returns all labs by name, both those that are up and the remains of dead ones."""
    return [_status(name) for name in lab_names()]


def _status(name: str) -> LabStatus:
    try:
        state = load(name)
    except LabError as error:
        fix = f"rm -r {teardown.ROOT / name}" if teardown.read_state(name) is None else remedy(name)
        return LabStatus(name, (), (), None, None, (), None, str(error), fix)
    if state is None:  # removed since it was listed
        return LabStatus(name, (), (), None, None, (), None, "it is being removed", remedy(name))
    running = Counter(teardown.inside(name).values())
    problem = None
    if state.orphaned:
        problem = f"the process that owned it ({state.owner}) is dead" if state.owner else "the machine was restarted"
    elif set(teardown.pins(name).values()) != {SWITCH, *state.hosts}:
        problem = "it is being made or removed" if state.owner else "some of its namespaces are gone"
    return LabStatus(
        name=name,
        hosts=state.hosts,
        addresses=state.addresses,
        rate=state.rate,
        cores=state.cores,
        processes=tuple(running[host] for host in state.hosts),
        owner=state.owner,
        problem=problem,
        fix=remedy(name),
    )


def remove(name: str) -> int:
    """Removes the lab of this name, even if its owner is dead or its state file is damaged.

    Returns:
        Number of processes killed.

    Raises:
        LabError: There is no such lab, its folder is not a lab, or something cannot be killed or removed.
    """
    try:
        with teardown.locked():
            if teardown.read_state(check_name(name)) is None:
                load(name)  # raises if something else occupies the folder
                raise LabError(f"there is no lab {name!r}; `sparsecomm lab status` lists all labs")
            return teardown.take_down(name)
    except OSError as error:
        raise LabError(f"lab {name!r} cannot be removed: {error}") from error
