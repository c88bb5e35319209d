"""Joins the world of a job over the transport of its launcher. `JOINS` is the table of transports.

A join function also brings up torch.distributed, unless it is up already or about to come up over this transport.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from sparsecomm.errors import LaunchError
from sparsecomm.launch import torch_dist
from sparsecomm.launch.detect import Launch
from sparsecomm.transport import SoloTransport, Transport

__all__ = ["JOINS", "JoinRequest", "JoinResult"]


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """Everything that a join function needs to know.

    Attributes:
        launch: How this process was started.
        timeout: Seconds that a collective may take.
        nodes: Node of every rank; None to find it out.
        teardown: Receives the callbacks that take down again what the function brings up beside torch.distributed.
        torch: Whether to bring up torch.distributed, too.
    """

    launch: Launch
    timeout: float
    nodes: Sequence[int] | None
    teardown: ExitStack
    torch: bool = True


@dataclass(frozen=True, slots=True)
class JoinResult:
    """A world that this process has joined.

    Attributes:
        transport: The transport.
        local_rank: Rank on this node.
        local_size: Number of ranks on this node.
        store: Store of torch.distributed that must stay alive, if there is one.
        made_torch: Whether the join function brought up torch.distributed.
    """

    transport: Transport
    local_rank: int
    local_size: int
    store: Any = None
    made_torch: bool = False


def _join_solo(joining: JoinRequest) -> JoinResult:
    """Makes a world of one."""
    if joining.torch and not dist.is_initialized():
        torch_dist.init_solo()
        return JoinResult(SoloTransport(), 0, 1, made_torch=True)
    return JoinResult(SoloTransport(), 0, 1)


def _join_mpi(joining: JoinRequest) -> JoinResult:
    """Initializes MPI, checks that it belongs to the launcher, and duplicates the communicator. Collective."""
    from sparsecomm.transport.mpi import MPITransport, import_mpi, init_mpi, leave_mpi

    launch, MPI = joining.launch, import_mpi()
    if MPI.Is_finalized():
        raise LaunchError(
            "MPI was finalized (sparsecomm.shutdown() was called) and cannot be initialized again in this process; "
            "call sparsecomm.init() once"
        )
    if not MPI.Is_initialized():
        init_mpi()
        joining.teardown.callback(leave_mpi)
    level = MPI.Query_thread()
    if level < MPI.THREAD_SERIALIZED:
        raise LaunchError(
            f"MPI was initialized with thread level {level}, sparsecomm needs MPI_THREAD_SERIALIZED "
            f"({MPI.THREAD_SERIALIZED}) or more; call sparsecomm.init() before anything else initializes MPI"
        )
    comm = MPI.COMM_WORLD
    if comm.Get_size() != launch.size:
        library = MPI.Get_library_version().split("\n")[0].strip("\0 ")
        raise LaunchError(
            f"{launch.launcher} started {launch.size} processes, but MPI ({library}) sees a world of "
            f"{comm.Get_size()}: the launcher belongs to another MPI than mpi4py uses. Use the mpirun of that library "
            "(for pip's wheels: the one in the environment's bin folder; under Slurm: srun --mpi=pmix for Open MPI, "
            "srun --mpi=pmi2 for MPICH and Intel MPI)"
        )
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, launch.rank)
    local_rank, local_size = node.Get_rank(), node.Get_size()
    node.Free()
    transport = MPITransport(comm, joining.nodes)
    if dist.is_initialized() or not joining.torch:
        return JoinResult(transport, local_rank, local_size)
    store = torch_dist.init_over_mpi(comm, local_size, joining.timeout)
    return JoinResult(transport, local_rank, local_size, store, made_torch=True)


def _join_gloo(joining: JoinRequest) -> JoinResult:
    """Uses torch.distributed's rendezvous, or its process group if there is one, and Gloo for messages. Collective."""
    from sparsecomm.transport.gloo import GlooTransport

    launch = joining.launch
    if launch.size == 1:
        return _join_solo(joining)
    made_torch = not dist.is_initialized()
    if made_torch:
        torch_dist.init_from_environment(joining.timeout)
    transport = GlooTransport(joining.timeout, joining.nodes)
    here = [rank for rank, node in enumerate(transport.nodes) if node == transport.nodes[transport.rank]]
    local_rank = here.index(transport.rank) if launch.local_rank is None else launch.local_rank
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", len(here)))
    return JoinResult(transport, local_rank, local_size, made_torch=made_torch)


JOINS: Mapping[str, Callable[[JoinRequest], JoinResult]] = {"mpi": _join_mpi, "gloo": _join_gloo, "solo": _join_solo}
"""For each transport, the function that joins the world over it."""
