"""Examines the machine: processor, shared and lockable memory, RDMA devices, network interfaces."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path

from sparsecomm.tools.cli.doctor.report import Cpu, Network, Rdma

__all__ = ["cpu", "network", "rdma"]

# CPU flags that each build of the kernels needs (sparsecomm/_native/cpu.cpp), best first.
_SIMD = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "bmi1", "bmi2", "popcnt", "sse4_2", "f16c", "abm"},
    "sve": {"sve"},
    "neon": {"asimd"},
}


def cpu() -> Cpu:
    """Returns the processor and the limits of this process."""
    words = _cpuinfo()
    flags = set((words.get("flags") or words.get("Features") or "").split())
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Cpu(
        model=words.get("model name") or platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        usable=len(os.sched_getaffinity(0)),
        simd=[name for name, needs in _SIMD.items() if needs <= flags],
        shm_free=_free("/dev/shm"),
        memlock=None if soft == resource.RLIM_INFINITY else soft,
    )


def rdma() -> list[Rdma]:
    """Returns all ports of all RDMA devices."""
    ports = sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
    return [
        Rdma(
            name=f"{port.parent.parent.name}:{port.name}",
            state=_line(port / "state").split(": ")[-1],  # "4: ACTIVE"
            rate=_line(port / "rate"),
            link_layer=_line(port / "link_layer"),
        )
        for port in ports
    ]


def network() -> list[Network]:
    """Returns the interfaces that are up, fastest first, without loopback."""
    found = []
    for link in sorted(Path("/sys/class/net").glob("*")):
        if link.name == "lo" or _line(link / "operstate") == "down":
            continue
        speed = _number(_line(link / "speed"))
        found.append(Network(link.name, speed if speed > 0 else None, _number(_line(link / "mtu"))))
    return sorted(found, key=lambda n: -(n.speed or 0))


def _cpuinfo() -> dict[str, str]:
    """Returns the first processor's entry of /proc/cpuinfo."""
    entry: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return entry
    for line in text.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        entry[name.strip()] = value.strip()
    return entry


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # many drivers answer "speed" with EINVAL
        return ""


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return 0


def _free(folder: str) -> int | None:
    try:
        stat = os.statvfs(folder)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize
