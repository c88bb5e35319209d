"""`init`: one call that joins the world of a job, whatever launched its processes."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from sparsecomm.errors import ConfigError, LaunchError
from sparsecomm.launch.detect import Launch, detect
from sparsecomm.launch.join import JOINS, JoinRequest
from sparsecomm.runtime.trace import close_timeline, open_timeline
from sparsecomm.transport import Engine, Transport

__all__ = ["World", "default_timeout", "init", "is_initialized", "shutdown", "world"]

_DEFAULT_TIMEOUT = 300.0  # seconds


@dataclass(frozen=True)
class World:
    """All ranks of this job, as seen from this one.

    Attributes:
        rank: This rank.
        size: Number of ranks.
        local_rank: Rank among the ranks of this node.
        local_size: Number of ranks on this node.
        launcher: Name of the launcher that started the job.
        nodes: Node of every rank. Ranks of one node have the same number.
        engine: The engine, whose thread communicates.
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
        """Waits until all ranks have called this. Collective."""
        dist.barrier()


@dataclass
class _Owned:
    """State of this process that `init` changes and `shutdown` restores.

    Attributes:
        world: The world; None before `init` and after `shutdown`.
        teardown: Callbacks that take down the libraries that `init` brought up, in reverse order.
        store: Store of torch.distributed, kept alive until the process ends.
        old_hook: `sys.excepthook` before `init`.
        old_exit: `sys.exit` before `init`.
        exit_code: Code with which the script called `sys.exit`, or 0.
        pid: Process that called `init`.
    """

    world: World | None = None
    teardown: ExitStack = field(default_factory=ExitStack)
    store: Any = None
    old_hook: Any = None
    old_exit: Any = None
    exit_code: int = 0
    pid: int = 0


_owned = _Owned()
_FIRST_WORD = 1.0  # seconds that other ranks leave rank 0 to report an error of an option


def default_timeout() -> float:
    """Returns the timeout of collectives in seconds: SPARSECOMM_TIMEOUT, or 300 if that is not set.

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
    """Returns the node of every rank, from the argument or else from SPARSECOMM_NODES. None if neither is given.

    Raises:
        ConfigError: if the nodes are not one whole number for every rank.
    """
    text = os.environ.get("SPARSECOMM_NODES")
    given = f"nodes = {nodes!r}"
    if nodes is None and text is not None:
        given = f"SPARSECOMM_NODES = {text!r}"
        nodes = [int(n) if n.strip().isdecimal() else -1 for n in text.split(",")]
    if nodes is None:
        return None
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in nodes)
    if len(nodes) != size or not whole:
        raise ConfigError(f"{given} is not the node of each of {size} ranks, whole numbers >= 0 such as 0,0,1,1")
    return tuple(nodes)


def init(*, timeout: float | None = None, nodes: Sequence[int] | None = None) -> World:
    """Joins the world of this job and brings up torch.distributed if it is not up. Collective.

    Works under mpirun, srun and torchrun, with RANK / WORLD_SIZE / MASTER_ADDR / MASTER_PORT set by hand, after
    `torch.distributed.init_process_group`, whose ranks it takes over, and in plain python, where it makes a world of
    one. A second call returns the same world. From now on an exception that no code catches ends the job on all ranks.

    Args:
        timeout: Seconds that a collective may take. None takes SPARSECOMM_TIMEOUT, or 300 if that is not set.
        nodes: Node of every rank, the same on all ranks, for `collective="two_level"`. None takes SPARSECOMM_NODES,
            e.g. "0,0,1,1". If that is not set, ranks that share memory are on one node.

    Raises:
        LaunchError: if the processes cannot find each other. The message says how to fix that.
        ConfigError: if the timeout is not a positive number, or if `nodes` does not give the node of every rank.
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
    launch = _launch()
    joining = JoinRequest(launch, limit, _given_nodes(nodes, launch.size), _owned.teardown)
    joined = JOINS[launch.transport](joining)
    transport = joined.transport
    if joined.store is not None:
        _owned.store = joined.store
    _check_torch(transport)
    _owned.world = World(
        rank=transport.rank,
        size=transport.size,
        local_rank=joined.local_rank,
        local_size=joined.local_size,
        launcher=launch.launcher,
        nodes=transport.nodes,
        engine=Engine(transport, timeout=limit),
    )
    _owned.pid = os.getpid()
    _install_excepthook(transport)
    atexit.register(shutdown)
    open_timeline(transport.rank)
    return _owned.world


def _launch() -> Launch:
    """Returns how this process was started. A process group of several ranks knows it where the environment does not.

    Raises:
        LaunchError: if there is no such group, and the environment is not acceptable.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return detect()
    group = Launch("process group", dist.get_rank(), dist.get_world_size(), None, "gloo")
    try:
        found = detect()
    except LaunchError:
        return group
    return group if found.size == 1 else found  # `_check_torch` compares two worlds of several ranks


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
    """Finishes the collectives in flight and takes down the libraries that `init` brought up. Idempotent.

    Runs by itself when the process exits.
    """
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
        # A collective still waits for a rank, and MPI_Finalize would wait for it, too.
        made.engine.transport.abort(1)
    _owned.teardown.close()


def _check_torch(transport: Transport) -> None:
    if (dist.get_rank(), dist.get_world_size()) != (transport.rank, transport.size):
        raise LaunchError(
            f"torch.distributed was initialized as rank {dist.get_rank()} of {dist.get_world_size()}, "
            f"the launcher says rank {transport.rank} of {transport.size}; give init_process_group the launcher's rank "
            "and size, or leave it out: sparsecomm.init() calls it"
        )


class _Exit(SystemExit):
    """The exception of sys.exit. If the script catches it and continues, its code must not end the job later."""

    def __del__(self) -> None:
        # If the exception was caught, it is deleted while a frame of the script runs. At the end there is no such
        # frame.
        if sys._getframe().f_back is not None:
            _owned.exit_code = 0


def _install_excepthook(transport: Transport) -> None:
    """Makes an uncaught exception, or sys.exit with an error code, end the job.

    Otherwise MPI_Finalize would wait for the other ranks for ever. sys.exit is replaced because SystemExit does not
    pass the excepthook.
    """
    if transport.size == 1:
        return
    old = _owned.old_hook = sys.excepthook
    owner = os.getpid()

    def end_the_job(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, ConfigError) and transport.rank and os.getpid() == owner:
            # Rank 0 probably has the same error and ends the job before P ranks have printed the same message.
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
