"""The network of a lab: a namespace per host, one for the switch that joins them, a shaper at both ends of each link.

The bridge and its ends of the links live in a separate namespace rather than among the machine's interfaces. They can
therefore not collide with names or addresses of the machine, its firewall does not see their traffic, and they vanish
with the namespace.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sparsecomm.errors import LabError
from sparsecomm.tools.lab.state import INTERFACE, State

__all__ = ["SWITCH", "bits_per_second", "build", "shape"]

SWITCH = "switch"
_SECONDS = 30.0  # limit for one command
_UNITS = {"bit": 1, "bps": 8}
_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_RATE = re.compile(r"(\d+(?:\.\d+)?)(k|m|g|ki|mi|gi|)(bit|bps)", re.IGNORECASE)
_SLOWEST, _FASTEST = 10**4, 4 * 10**11  # bits per second
_BURST_SECONDS = 0.002  # burst of a shaper: long enough for its timer, short compared to a message
_SMALLEST_BURST = 16 * 1024  # bytes
_QUEUE = "50ms"


def bits_per_second(rate: str | None) -> int | None:
    """Returns a rate in bits per second; None for None, an unshaped link.

    Args:
        rate: A number and one of tc's units: "1gbit", "100mbit", "12.5mbps" (bytes per second), "1gibit".

    Raises:
        LabError: The text is not a rate, or the rate is out of the range of tbf.
    """
    if rate is None:
        return None
    found = _RATE.fullmatch(rate) if isinstance(rate, str) else None
    if found is None:
        raise LabError(
            f"rate = {rate!r}: give a number and a unit, such as 100mbit, 1gbit or 125mbps (bytes per second)"
        )
    number, prefix, unit = found.groups()
    bits = round(float(number) * _PREFIXES[prefix.lower()] * _UNITS[unit.lower()])
    if not _SLOWEST <= bits <= _FASTEST:
        raise LabError(f"rate = {rate!r}: a link can have 10kbit to 400gbit")
    return bits


def build(state: State) -> None:
    """Makes the namespaces and the links of a lab whose folder exists.

    Raises:
        LabError: A command failed; the message holds its error output.
    """
    for name in (SWITCH, *state.hosts):
        state.pin(name).touch()
        _run(["unshare", f"--net={state.pin(name)}", "true"])
    links = ["link add br0 type bridge", "link set br0 up"]
    for i, host in enumerate(state.hosts):
        links += [
            f"link add v{i} type veth peer name {INTERFACE} netns {state.pin(host)}",
            f"link set v{i} master br0 up",
        ]
    _batch(state, SWITCH, "ip", links)
    for host, address in zip(state.hosts, state.addresses, strict=True):
        lines = [f"addr add {address}/24 dev {INTERFACE}", "link set lo up", f"link set {INTERFACE} up"]
        _batch(state, host, "ip", lines)
    if state.rate is not None:
        shape(state, None)


def shape(state: State, before: str | None) -> None:
    """Gives all links the rate in the state, in both directions.

    Args:
        state: The lab.
        before: Rate of the links until now; None if they are unshaped.

    Raises:
        LabError: A command failed.
    """
    bits = bits_per_second(state.rate)
    if bits is None and before is None:
        return
    if bits is None:
        action, shaper = "del", ""
    else:
        burst = max(_SMALLEST_BURST, round(bits / 8 * _BURST_SECONDS))
        action, shaper = "replace", f" tbf rate {bits}bit burst {burst}b latency {_QUEUE}"
    _batch(state, SWITCH, "tc", [f"qdisc {action} dev v{i} root{shaper}" for i in range(state.count)])
    for host in state.hosts:
        _batch(state, host, "tc", [f"qdisc {action} dev {INTERFACE} root{shaper}"])


def _batch(state: State, where: str, tool: str, lines: Sequence[str]) -> None:
    """Runs several commands of ip or tc in one process in one namespace."""
    _run(["nsenter", f"--net={state.pin(where)}", tool, "-batch", "-"], "\n".join(lines) + "\n")


def _run(command: Sequence[str | Path], text: str = "") -> None:
    try:
        done = subprocess.run(
            list(map(str, command)),
            input=text,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            env=os.environ | {"LC_ALL": "C", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"`{' '.join(map(str, command))}` did not end within {_SECONDS:g} s") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LabError(f"`{' '.join(map(str, command))}` failed: {said}")
