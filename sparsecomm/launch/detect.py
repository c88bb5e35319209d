"""Detects the launcher of this process from its environment alone.

`LAUNCHERS` is the table from a launcher to the variables that it sets and to the transport of its processes. A new
launcher is one row here. A new transport is one file and one row in `sparsecomm.launch.join.JOINS`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from sparsecomm.errors import LaunchError

__all__ = ["LAUNCHERS", "Launch", "Launcher", "detect", "without_launcher"]


@dataclass(frozen=True, slots=True)
class Launcher:
    """A launcher, the variables by which it tells a process its rank, and the transport of its processes.

    Attributes:
        name: Name for messages.
        transport: Name of the transport, a key of `sparsecomm.launch.join.JOINS`.
        rank: Variable with the rank.
        size: Variable with the world size.
        local_rank: Variable with the rank on this node.
        local_size: Variable with the number of ranks on this node; None if there is none.
        marker: Variable that only this launcher sets. If None, the launcher is recognized when both `rank` and `size`
            are set.
        address: Further variables that ranks need to find each other.
    """

    name: str
    transport: str
    rank: str
    size: str
    local_rank: str
    local_size: str | None = None
    marker: str | None = None
    address: tuple[str, ...] = ()

    def matches(self, env: Mapping[str, str]) -> bool:
        """Returns whether this launcher started the process with this environment."""
        return self.marker in env if self.marker is not None else self.rank in env and self.size in env


# The innermost launcher comes first. torchrun precedes the MPI launchers because it may run under mpirun or srun.
LAUNCHERS = (
    Launcher("torchrun", "gloo", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", marker="TORCHELASTIC_RUN_ID"),
    Launcher(
        "mpirun (Open MPI)",
        "mpi",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        "mpirun or srun (MPICH or Intel MPI)", "mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"
    ),
    Launcher("srun", "mpi", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    Launcher("environment", "gloo", "RANK", "WORLD_SIZE", "LOCAL_RANK", address=("MASTER_ADDR", "MASTER_PORT")),
)

# Together they tell the jobs of a machine apart.
_JOB_VARIABLES = (
    "PMIX_NAMESPACE",
    "PMI_JOBID",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "TORCHELASTIC_RUN_ID",
    "MASTER_ADDR",
    "MASTER_PORT",
)

# Prefixes of the variables by which a launcher tells a process its rank. A child that is no rank must not see them.
_RANK_VARIABLES = (
    "OMPI_COMM_",
    "OMPI_UNIVERSE",
    "OMPI_APP_",
    "PMIX_",
    "PRTE_",
    "PMI_",
    "PMI2_",
    "HYDI_",
    "HYDRA_BSTRAP_",
    "MPI_LOCAL",
)


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        launcher: "torchrun", "mpirun (Open MPI)", "mpirun or srun (MPICH or Intel MPI)", "srun", "environment" (RANK
            and WORLD_SIZE set by hand) or "python".
        rank: Rank of this process.
        size: Number of processes.
        local_rank: Rank on this node; None if the launcher does not say.
        transport: Name of the transport by which the processes find each other: "mpi" or "gloo"; "solo" for a world of
            one without a launcher.
        local_size: Number of processes on this node; None if the launcher does not say.
        job: Name of the job, the same for all its processes on a node.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int | None
    transport: str
    local_size: int | None = field(default=None, compare=False)
    job: str = field(default="", compare=False)

    @property
    def mpi(self) -> bool:
        """Whether the processes find each other through MPI."""
        return self.transport == "mpi"


def detect(environ: Mapping[str, str] | None = None) -> Launch:
    """Reads the launcher's environment variables.

    The first match in `LAUNCHERS` wins; a match without its address is passed over if the world size is 1. Without one
    this is plain python, a world of one, unless half of a launcher's variables tell of more ranks.

    Args:
        environ: The environment; None for that of this process.

    Raises:
        LaunchError: if a variable is not a number or contradicts another, if a rank is set without a world size or the
            other way round, or if an address is missing and the world size is not 1.
    """
    env = os.environ if environ is None else environ
    for launcher in LAUNCHERS:
        if not launcher.matches(env):
            continue
        launch = _read(launcher, env)
        missing = [name for name in launcher.address if name not in env]
        if missing and launch.size > 1:
            raise LaunchError(
                f"{launcher.rank} = {launch.rank} and {launcher.size} = {launch.size} are set, "
                f"but not {' and '.join(missing)}: "
                "set them to rank 0's address and a free port there, or launch with mpirun or torchrun"
            )
        if not missing:
            return launch
    for launcher in LAUNCHERS:
        _check_whole(launcher, env)
    return Launch("python", 0, 1, 0, "solo")


def _check_whole(launcher: Launcher, env: Mapping[str, str]) -> None:
    """Checks that no half of a launcher's variables tells of more than one rank: each process would train alone.

    Raises:
        LaunchError: if one does.
    """
    for present, absent, alone in ((launcher.size, launcher.rank, 1), (launcher.rank, launcher.size, 0)):
        if present in env and absent not in env and _number(env, present) != alone:
            raise LaunchError(
                f"{present} = {env[present]} is set, but not {absent}: each process would be a world of its own. "
                f"Set both, unset {present}, or launch with mpirun or torchrun"
            )


def _read(launcher: Launcher, env: Mapping[str, str]) -> Launch:
    rank, size = _number(env, launcher.rank), _number(env, launcher.size)
    local_rank = _number(env, launcher.local_rank) if launcher.local_rank in env else None
    if not 0 <= rank < size:
        raise LaunchError(f"{launcher.name} says rank {rank} of {size}: not a rank of that world")
    count = launcher.local_size
    local_size = _number(env, count) if count is not None and count in env else None
    job = "/".join(env[name] for name in _JOB_VARIABLES if name in env)
    return Launch(launcher.name, rank, size, local_rank, launcher.transport, local_size, job)


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name)
    try:
        return int(text or "")
    except ValueError:
        raise LaunchError(f"environment variable {name} = {text!r} is not a whole number") from None


def without_launcher() -> dict[str, str]:
    """Returns the environment without the variables that make a process a rank of the job."""
    return {k: v for k, v in os.environ.items() if not k.startswith(_RANK_VARIABLES)}
