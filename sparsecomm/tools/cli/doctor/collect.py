"""Gathers the report. This process never initializes MPI or touches a device; `probe` does so in a child process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsecomm.errors import ConfigError, LaunchError
from sparsecomm.launch import default_timeout, detect
from sparsecomm.tools.cli.doctor import machine
from sparsecomm.tools.cli.doctor.child import Probe
from sparsecomm.tools.cli.doctor.mpi import describe_mpi
from sparsecomm.tools.cli.doctor.report import (
    Cpu,
    Kernels,
    LaunchFacts,
    Mpi,
    Rank,
    Report,
    Threads,
    Torch,
    Ucx,
    World,
)

__all__ = ["collect", "launch_facts", "probe_mode"]

_SETTINGS = (
    *("SPARSECOMM_", "UCX_", "GLOO_", "MPI4PY_", "OMPI_MCA_pml", "OMPI_MCA_btl", "OMPI_MCA_osc"),
    *("MPIR_CVAR_", "FI_", "I_MPI_FABRICS", "I_MPI_OFI", "I_MPI_PIN", "I_MPI_PMI"),
)


def launch_facts() -> LaunchFacts:
    """Returns how this process was started."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    allow = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    allowed = all(os.environ.get(name) == "1" for name in allow)
    try:
        found = detect()
    except LaunchError as error:
        return LaunchFacts("unknown", 0, 1, False, root, allowed, str(error))
    return LaunchFacts(found.launcher, found.rank, found.size, found.mpi, root, allowed)


def probe_mode(launch: LaunchFacts) -> str:
    """Returns the mode in which to run `probe`: "mpi", "torch" or "solo"."""
    if launch.mpi:
        return "mpi"
    return "torch" if launch.size > 1 else "solo"


def collect(launch: LaunchFacts, probe: Probe, seconds: float) -> Report:
    """Returns the report, without its problems.

    Args:
        launch: Result of `launch_facts`.
        probe: The running probe, started in `probe_mode(launch)`.
        seconds: Seconds in which MPI must start.
    """
    mode = probe_mode(launch)
    # Under torchrun the probe meets the ranks over Gloo, so a second probe examines MPI.
    alone = Probe("solo", seconds) if mode == "torch" else None
    cpu, kernels, torch_facts, threads = machine.cpu(), _kernels(), _torch(), _torch_threads()
    said = probe.finish()
    if alone is None:
        # If MPI waits for ranks that never come, the problem belongs to the world and not to MPI.
        waiting = mode == "mpi" and probe.timed_out and "library" in said
        mpi_said, mpi_problem = said, None if waiting else probe.problem
    else:
        mpi_said, mpi_problem = alone.finish(), alone.problem
        alone.close()
    mpi = describe_mpi(mpi_said, mpi_problem)
    world = _world(launch, said, probe.problem or mpi.problem)
    timeout, timeout_problem = _timeout()
    return Report(
        versions=_versions(),
        launch=launch,
        world=world,
        mpi=mpi,
        ucx=_ucx(mpi_said, mpi_problem, mpi),
        rdma=machine.rdma(),
        network=machine.network(),
        cpu=cpu,
        kernels=kernels,
        torch=torch_facts,
        threads=_threads(cpu, threads, world),
        timeout=timeout,
        timeout_problem=timeout_problem,
        environment={k: v for k, v in sorted(os.environ.items()) if k.startswith(_SETTINGS)},
    )


def _versions() -> dict[str, str]:
    import sparsecomm

    found = {"sparsecomm": sparsecomm.__version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "mpi4py"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _world(launch: LaunchFacts, said: Mapping[str, Any], problem: str | None) -> World:
    if probe_mode(launch) == "solo":
        return World()
    over = "MPI" if launch.mpi else "Gloo"
    if "world" not in said:
        return World(over, launch.size, None, problem=problem or "the ranks did not meet")
    met = said["world"]["met"]
    ranks = [Rank(**facts) for facts in said["world"]["ranks"]]
    if met != launch.size:
        return World(over, launch.size, met, ranks, f"{launch.launcher} started {launch.size}, {over} sees {met}")
    return World(over, launch.size, met, ranks)


def _ucx(said: Mapping[str, Any], problem: str | None, mpi: Mpi) -> Ucx:
    in_mpi = [name for name in ("pml", "osc") if "ucx" in mpi.components.get(name, [])]
    if "ucx" in said:
        return Ucx(**said["ucx"], in_mpi=in_mpi)
    return Ucx(in_mpi=in_mpi, problem=f"not asked: {problem or mpi.problem or 'no answer'}")


def _kernels() -> Kernels:
    import sparsecomm
    from sparsecomm import kernels

    path, problem = None, None
    try:
        path = kernels.current_path()
    except ConfigError as error:
        problem = str(error)
    return Kernels(
        path=path,
        available=list(kernels.available_paths()),
        requested=os.environ.get("SPARSECOMM_KERNELS"),
        native=kernels.native_problem() is None,
        problem=kernels.native_problem(),
        request_problem=problem,
        compiler=next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None),
        checkout=(Path(sparsecomm.__file__).parent.parent / "pyproject.toml").exists(),
    )


def _torch() -> Torch:
    import torch
    import torch.distributed as dist

    distributed = dist.is_available()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Torch(
        version=torch.__version__,
        distributed=distributed,
        gloo=distributed and dist.is_gloo_available(),
        nccl=distributed and dist.is_nccl_available(),
        cuda=torch.version.cuda,
        gpus=gpus,
        nvidia_driver=Path("/proc/driver/nvidia/version").exists(),
    )


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _threads(cpu: Cpu, torch_threads: int, world: World) -> Threads:
    """Returns the threads of all ranks on the host of rank 0."""
    here = [r for r in world.ranks if r.host == world.ranks[0].host]
    mask = 0
    for r in here:
        mask |= int(r.cpus, 16)
    return Threads(
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        torch=torch_threads,
        node_ranks=len(here) or 1,
        node_threads=sum(r.threads for r in here) or torch_threads,
        node_cores=mask.bit_count() or cpu.usable,
    )


def _timeout() -> tuple[float | None, str | None]:
    try:
        return default_timeout(), None
    except ConfigError as error:
        return None, str(error)
