"""`init`: one call that makes a world from however the processes were launched."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from sparsecomm.errors import ConfigError, LaunchError
from sparsecomm.launch import torch_dist
from sparsecomm.launch.detect import Launch, detect
from sparsecomm.runtime.trace import close_timeline, open_timeline
from sparsecomm.transport import Engine, SoloTransport, Transport

__all__ = ["World", "default_timeout", "init", "is_initialized", "shutdown", "world"]

_DEFAULT_TIMEOUT = 300.0  # seconds


@dataclass(frozen=True)
class World:
    """All ranks of this job, as seen from this one.

    Attributes:
        rank: this rank.
        size: number of ranks.
        local_rank: rank among those on this node.
        local_size: number of ranks on this node.
        launcher: what started the job.
        nodes: the node of every rank: ranks of one node have the same number.
        engine: the thread that communicates.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str
    nodes: tuple[int, ...]
    engine: Engine = field(repr=False)

    @property
    def transport(self) -> str:
        """Name of the transport: "mpi", "gloo" or "solo"."""
        return self.engine.transport.name

    def barrier(self) -> None:
        """Waits until all ranks are here. Collective."""
        dist.barrier()


@dataclass
class _Owned:
    """What `init` brought up and `shutdown` must take down."""

    world: World | None = None
    torch_distributed: bool = False
    mpi: bool = False
    store: Any = None
    old_hook: Any = None
    old_exit: Any = None
    exit_code: int = 0
    pid: int = 0


_owned = _Owned()
_FIRST_WORD = 1.0  # seconds that the others leave rank 0 to say what an option's error is


def default_timeout() -> float:
    """Returns the timeout of collectives in seconds: SPARSECOMM_TIMEOUT, or 300.

    Raises:
        ConfigError: if the variable is not a positive number.
    """
    text = os.environ.get("SPARSECOMM_TIMEOUT")
    if text is None:
        return _DEFAULT_TIMEOUT
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e7:
        raise ConfigError(f"SPARSECOMM_TIMEOUT = {text!r} is not a positive number of seconds")
    return value


def _given_nodes(nodes: Sequence[int] | None, size: int) -> tuple[int, ...] | None:
    """Returns the node of every rank as the argument or else SPARSECOMM_NODES gives it; None to find it out.

    Raises:
        ConfigError: if it is not one whole number for every rank.
    """
    text = os.environ.get("SPARSECOMM_NODES")
    what = f"nodes = {nodes!r}"
    if nodes is None and text is not None:
        what = f"SPARSECOMM_NODES = {text!r}"
        nodes = [int(n) if n.strip().isdecimal() else -1 for n in text.split(",")]
    if nodes is None:
        return None
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in nodes)
    if len(nodes) != size or not whole:
        raise ConfigError(f"{what} is not the node of each of {size} ranks, whole numbers >= 0 such as 0,0,1,1")
    return tuple(nodes)


def init(*, timeout: float | None = None, nodes: Sequence[int] | None = None) -> World:
    """Joins the world of this job and brings up torch.distributed if it is not up. Collective.

    Works under mpirun, srun, torchrun, with RANK / WORLD_SIZE / MASTER_ADDR / MASTER_PORT set by hand, and in plain
    python, where it makes a world of one. A second call returns the same world. From here on an exception that
    reaches the top of any rank ends the job on all ranks.

    Args:
        timeout: seconds a collective may take; SPARSECOMM_TIMEOUT, or 300, if None.
        nodes: the node of every rank, the same on all ranks, for `collective="two_level"`; SPARSECOMM_NODES, as in
            "0,0,1,1", if None, else found out: ranks of one node share memory.

    Raises:
        LaunchError: if the processes cannot find each other; the message has the fix.
        ConfigError: if the timeout is not a positive number, or nodes are not those of all ranks.
    """
    if _owned.world is not None:
        if _owned.pid != os.getpid():
            raise LaunchError(
                f"process {os.getpid()} was forked from rank {_owned.world.rank} (process {_owned.pid}) after "
                "sparsecomm.init(); a forked child cannot join the world"
            )
        return _owned.world
    limit = default_timeout() if timeout is None else timeout
    if isinstance(limit, bool) or not (isinstance(limit, (int, float)) and limit > 0):
        raise ConfigError(f"timeout must be a positive number of seconds, got {timeout!r}")
    launch = detect()
    given = _given_nodes(nodes, launch.size)
    transport: Transport
    if launch.mpi:
        transport, local_rank, local_size = _join_mpi(launch, limit, given)
    elif launch.size > 1:
        transport, local_rank, local_size = _join_torch(launch, limit, given)
    else:
        if not dist.is_initialized():
            torch_dist.init_solo()
            _owned.torch_distributed = True
        transport, local_rank, local_size = SoloTransport(), 0, 1
    _check_torch(transport)
    engine = Engine(transport, timeout=limit)
    _owned.world = World(
        transport.rank, transport.size, local_rank, local_size, launch.launcher, transport.nodes, engine
    )
    _owned.pid = os.getpid()
    _install_excepthook(transport)
    atexit.register(shutdown)
    open_timeline(transport.rank)
    return _owned.world


def world() -> World:
    """Returns the world that `init` made.

    Raises:
        LaunchError: if there is none.
    """
    if _owned.world is None:
        raise LaunchError("call sparsecomm.init() at the start of the script, before building the model")
    return _owned.world


def is_initialized() -> bool:
    """Returns whether `init` was called and `shutdown` was not."""
    return _owned.world is not None


def shutdown() -> None:
    """Finishes what is in flight and takes down what `init` brought up. Runs at exit by itself; idempotent."""
    made = _owned.world
    if made is None or _owned.pid != os.getpid():
        return
    _owned.world = None
    failed = _owned.exit_code != 0 and made.size > 1
    finished = failed or made.engine.close()
    close_timeline()
    if _owned.old_hook is not None:
        sys.excepthook = _owned.old_hook
        sys.exit = _owned.old_exit
    if failed:
        print(f"sparsecomm: rank {made.rank} called sys.exit({_owned.exit_code}); ending the job", file=sys.stderr)
        made.engine.transport.abort(_owned.exit_code)
    if not finished:
        # Something of ours is still waiting for a rank; MPI_Finalize would wait with it.
        made.engine.transport.abort(1)
    if _owned.torch_distributed and dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
    if _owned.mpi:
        from sparsecomm.transport.mpi import import_mpi, mpi_initialized_here

        if mpi_initialized_here():
            import_mpi().Finalize()


def _join_mpi(launch: Launch, timeout: float, nodes: Sequence[int] | None) -> tuple[Transport, int, int]:
    """Initializes MPI, checks that it is the launcher's, and makes our communicator. Collective."""
    from sparsecomm.transport.mpi import MPITransport, import_mpi

    MPI = import_mpi()
    if MPI.Is_finalized():
        raise LaunchError(
            "MPI was finalized (sparsecomm.shutdown() was called) and cannot be initialized again in this process; "
            "call sparsecomm.init() once"
        )
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        _owned.mpi = True
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
    transport = MPITransport(comm, nodes)
    if not dist.is_initialized():
        _owned.store = torch_dist.init_over_mpi(comm, local_size, timeout)
        _owned.torch_distributed = True
    return transport, local_rank, local_size


def _join_torch(launch: Launch, timeout: float, nodes: Sequence[int] | None) -> tuple[Transport, int, int]:
    """Uses torch.distributed's own rendezvous and Gloo for our messages. Collective."""
    from sparsecomm.transport.gloo import GlooTransport

    if not dist.is_initialized():
        torch_dist.init_from_environment(timeout)
        _owned.torch_distributed = True
    local_rank = launch.rank if launch.local_rank is None else launch.local_rank
    return GlooTransport(timeout, nodes), local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", launch.size))


def _check_torch(transport: Transport) -> None:
    if (dist.get_rank(), dist.get_world_size()) != (transport.rank, transport.size):
        raise LaunchError(
            f"torch.distributed was initialized as rank {dist.get_rank()} of {dist.get_world_size()}, "
            f"the launcher says rank {transport.rank} of {transport.size}; let sparsecomm.init() initialize it"
        )


class _Exit(SystemExit):
    """What sys.exit raises: if somebody catches it, the script goes on, and its code must not end the job later."""

    def __del__(self) -> None:
        # Caught, it dies while a script's frame is running; at the end of the script there is none left.
        if sys._getframe().f_back is not None:
            _owned.exit_code = 0


def _install_excepthook(transport: Transport) -> None:
    """Makes an exception that reaches the top, or sys.exit with an error, end the job.

    MPI_Finalize would wait for the other ranks for ever. SystemExit does not pass the excepthook, hence sys.exit.
    """
    if transport.size == 1:
        return
    old = _owned.old_hook = sys.excepthook
    owner = os.getpid()

    def end_the_job(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, ConfigError) and transport.rank and os.getpid() == owner:
            # Most likely rank 0 has it, too; it then ends the job before the same words are printed P times.
            time.sleep(_FIRST_WORD)
        old(kind, error, trace)
        if os.getpid() != owner:  # a forked child may fail without ending the job
            return
        print(
            f"sparsecomm: rank {transport.rank} of {transport.size} failed with {kind.__name__}: {error}; "
            "ending the job on all ranks",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        transport.abort(1)

    def remember_code(status: Any = None) -> NoReturn:
        if status not in (None, 0) and threading.current_thread() is threading.main_thread() and os.getpid() == owner:
            _owned.exit_code = status if isinstance(status, int) else 1
        raise _Exit(status)

    sys.excepthook = end_the_job
    _owned.old_exit, sys.exit = sys.exit, remember_code
