"""The hook and MPI windows over real RDMA verbs, on soft-RoCE in an emulated guest, for machines without RDMA hardware.

`make test-rdma` runs this test. The ordinary suite skips it, since the guest takes minutes. UCX's log and the packet
counter of the device show which transport carried the messages.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import ROOT, Job, mpirun_command, run_job

HERE = Path(__file__).parent
LIMIT = float(os.environ.get("SPARSECOMM_RDMA_LIMIT", "1800"))  # seconds; minutes on idle cores, 17 min on busy ones
MTU = 4096  # bytes of payload that one packet of rxe0 can carry
RXE = "kernel/drivers/infiniband/sw/rxe"
SYSTEM = (
    "apt-get install linux-image-amd64 rdma-core ibverbs-providers qemu-system-x86 busybox-static kmod iproute2 "
    "(all but the RDMA parts may be there)"
)
PATH = os.pathsep.join([str(ROOT / ".venvs" / "vng" / "bin"), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def kernel() -> Path | None:
    """Returns the newest kernel image whose modules include soft-RoCE."""
    modules = Path("/lib/modules").glob(f"*/{RXE}/rdma_rxe.ko*")
    images = [Path("/boot") / f"vmlinuz-{module.parents[5].name}" for module in modules]
    return max((i for i in images if i.exists()), key=lambda i: i.stat().st_mtime, default=None)


def guest_problem() -> str | None:
    """Returns why this machine cannot run the guest, with the line that installs the missing parts. None if it can."""
    if os.geteuid() != 0:
        return "needs root: the guest sees the machine's files as their owner"
    if kernel() is None:
        return f"no kernel with the module rdma_rxe in /boot: {SYSTEM}"
    absent = [t for t in ("qemu-system-x86_64", "rdma", "ip", "modprobe", "busybox") if not shutil.which(t, path=PATH)]
    if not any(Path("/usr/lib").glob("*/libibverbs/librxe*")):
        absent.append("librxe (verbs provider)")
    if absent:
        return f"no {', '.join(absent)}: {SYSTEM}"
    if not shutil.which("vng", path=PATH):
        return "no vng: pip install virtme-ng (make test-rdma does, into .venvs/vng)"
    return None


def run_in_guest(script: Path, *args: str) -> Job:
    """Boots the guest, runs a script in it, and shuts the guest down, after LIMIT seconds at the latest."""
    line = " ".join(["bash", str(script), *args])
    machine = ["--cpus", "2", "--memory", "4G", "--rw", "--user", "root", "--disable-kvm", "--qemu-opts=-cpu max"]
    vng = ["vng", "--run", str(kernel()), *machine, "--exec", line]
    return run_job(["env", f"PATH={PATH}", *vng], deadline=LIMIT)


def lanes(log: str) -> dict[str, set[str]]:
    """Returns the transports that carried each kind of lane ("tag", "rma", "amo", ...), as read from UCX's log."""
    found: dict[str, set[str]] = {}
    for line in re.findall(r"UCX +INFO +ucp_context_\d+ .*cfg#\d+ (.*)", log):
        for kind, ways in re.findall(r"(\w+)\(([^)]*)\)", line):
            found.setdefault(kind, set()).update(way.split("/")[0] for way in ways.split())
    return found


def numbers(pattern: str, log: str) -> list[int]:
    """Returns every number that the group of the pattern matches."""
    return [int(n) for n in re.findall(pattern, log)]


def test_ucx_lanes_are_read_as_ucx_writes_them() -> None:
    """The lines are those of UCX 1.20.1."""
    log = (
        "[1.5] [vm:1:0] ucp_worker.c:1912 UCX  INFO    ucp_context_0 self cfg#0 tag(self/memory tcp/eth0)\n"
        "[1.5] [vm:1:0] ucp_worker.c:1912 UCX  INFO    ucp_context_0 intra-node cfg#1 tag(rc_verbs/rxe0:1)\n"
        "[1.5] [vm:1:0] ucp_worker.c:1912 UCX  INFO    ucp_context_1 intra-node cfg#0 rma_am(tcp/lo)  amo_am(tcp/lo)\n"
    )
    assert lanes(log) == {"tag": {"self", "tcp", "rc_verbs"}, "rma_am": {"tcp"}, "amo_am": {"tcp"}}


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.skipif(
    "SPARSECOMM_TEST_RDMA" not in os.environ, reason="takes minutes in an emulated guest: make test-rdma"
)
def test_the_hook_and_windows_run_over_rdma_verbs() -> None:
    problem = guest_problem()
    if problem:
        pytest.skip(problem)
    mpirun = mpirun_command(2)[0]
    job = run_in_guest(HERE / "guest.sh", str(ROOT), sys.executable, mpirun, str(int(LIMIT * 0.9)))
    assert "guest: job ended with exit code 0" in job.out, job
    assert "UCX_TLS=rc_v,ud_v,self" in job.out, job

    used = lanes(job.out)
    assert "rc_verbs" in used["tag"], job
    assert "rc_verbs" in used["rma"], job
    assert set().union(*used.values()) <= {"rc_verbs", "ud_verbs", "self"}, used

    hook = numbers(r"hook: (\d+) bytes sent by rank \d", job.out)
    windows = numbers(r"windows: (\d+) bytes moved by rank \d", job.out)
    assert (len(hook), len(windows)) == (2, 2), job
    [packets] = numbers(r"guest: (\d+) packets sent through rxe0", job.out)
    assert packets * MTU >= sum(hook) + sum(windows), job
    print(f"{sum(hook)} bytes by the hook and {sum(windows)} by windows in {packets} packets; lanes {used}")
