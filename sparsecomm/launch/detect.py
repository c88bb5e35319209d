"""Which launcher started this process, by its environment alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sparsecomm.errors import LaunchError

__all__ = ["Launch", "detect", "without_launcher"]

# (launcher, rank, world size, local rank), innermost launcher first
_MPI_VARIABLES = (
    ("mpirun (Open MPI)", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpirun or srun (MPICH or Intel MPI)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)

# Variables by which a launcher tells a process which rank it is. A child that is no rank must not see them.
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
        rank: this process's rank.
        size: number of processes.
        local_rank: rank on this node; None where the launcher does not say.
        mpi: whether the processes are to find each other through MPI.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int | None
    mpi: bool


def detect(environ: Mapping[str, str] | None = None) -> Launch:
    """Reads the launcher's environment variables.

    torchrun comes first, since it may itself run under mpirun or srun, then MPI launchers, then torch's own
    variables set by hand, then plain python: a world of one.

    Args:
        environ: the environment; this process's if None.

    Raises:
        LaunchError: if a variable is not a number, or contradicts another.
    """
    env = os.environ if environ is None else environ
    if "TORCHELASTIC_RUN_ID" in env:
        return _from_torch(env, "torchrun")
    for launcher, rank, size, local in _MPI_VARIABLES:
        if rank in env and size in env:
            return _checked(
                Launch(launcher, _number(env, rank), _number(env, size), _number(env, local, None), mpi=True)
            )
    if "RANK" in env and "WORLD_SIZE" in env:
        found = _from_torch(env, "environment")
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing and found.size > 1:
            raise LaunchError(
                f"RANK = {found.rank} and WORLD_SIZE = {found.size} are set, but not {' and '.join(missing)}: "
                "set them to rank 0's address and a free port there, or launch with mpirun or torchrun"
            )
        if not missing:
            return found
    return Launch("python", 0, 1, 0, mpi=False)


def _from_torch(env: Mapping[str, str], launcher: str) -> Launch:
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    return _checked(Launch(launcher, rank, size, _number(env, "LOCAL_RANK", None), mpi=False))


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.size:
        raise LaunchError(f"{launch.launcher} says rank {launch.rank} of {launch.size}: not a rank of that world")
    return launch


def _number(env: Mapping[str, str], name: str, default: int | None = -1) -> int:
    text = env.get(name)
    if text is None and default is None:
        return None  # type: ignore[return-value]
    try:
        return int(text or "")
    except ValueError:
        raise LaunchError(f"environment variable {name} = {text!r} is not a whole number") from None


def without_launcher() -> dict[str, str]:
    """Returns the environment without what makes a process a rank of the job."""
    return {k: v for k, v in os.environ.items() if not k.startswith(_RANK_VARIABLES)}
