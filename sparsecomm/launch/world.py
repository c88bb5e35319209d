"""`init`: one call that joins the world of a job, whatever launched its processes."""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from sparsecomm.errors import ConfigError, LaunchError
from sparsecomm.launch.detect import Launch, detect
from sparsecomm.launch.join import JOINS, JoinRequest
from sparsecomm.launch.leaving import Leaving
from sparsecomm.launch.starting import deadline
from sparsecomm.launch.torch_dist import leave_torch
from sparsecomm.runtime.trace import close_timeline, open_timeline
from sparsecomm.transport import Engine, Link, Transport

__all__ = ["World", "call_at_end", "default_timeout", "init", "is_initialized", "join_for_torch", "shutdown", "world"]

_DEFAULT_TIMEOUT = 300.0  # seconds
_LONGEST = 1e7  # seconds; the libraries underneath count in integers


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
        teardown: Callbacks that take down what `init` brought up beside torch.distributed, in reverse order.
        store: Store of torch.distributed, kept alive until the process ends.
        made_torch: Whether `init` brought up torch.distributed.
        leaving: Watches over the ways in which this rank may leave.
        pid: Process that called `init`.
        at_end: Called with the world before it ends.
    """

    world: World | None = None
    teardown: ExitStack = field(default_factory=ExitStack)
    store: Any = None
    made_torch: bool = False
    leaving: Leaving | None = None
    pid: int = 0
    at_end: list[Callable[[World], None]] = field(default_factory=list)


_owned = _Owned()


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
    if not 0 < value < _LONGEST:
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


def _given_link() -> Link | None:
    """Returns the link between hosts from SPARSECOMM_LINK; None if that is not set.

    Raises:
        ConfigError: if the variable is not two positive numbers.
    """
    text = os.environ.get("SPARSECOMM_LINK")
    if text is None:
        return None
    try:
        alpha, beta = (float(x) for x in text.split(","))
    except ValueError:
        alpha = beta = math.nan
    if not (0 < alpha < math.inf and 0 < beta < math.inf):
        raise ConfigError(
            f"SPARSECOMM_LINK = {text!r} is not two positive numbers, seconds per round of messages and per byte, such "
            "as 1e-4,8e-9"
        )
    return Link(alpha, beta)


def init(*, timeout: float | None = None, nodes: Sequence[int] | None = None) -> World:
    """Joins the world of this job and brings up torch.distributed if it is not up. Collective.

    Works under mpirun, srun and torchrun, with RANK / WORLD_SIZE / MASTER_ADDR / MASTER_PORT set by hand, after
    `torch.distributed.init_process_group`, whose ranks it takes over, and in plain python, where it makes a world of
    one. A second call returns the same world. From now on a rank that leaves is known to the others: an exception that
    no code catches, and an exit with a status other than 0, end the job on all ranks. If other ranks do not come, the
    process ends with an error after the timeout.

    Args:
        timeout: Seconds that a collective may take. None takes SPARSECOMM_TIMEOUT, or 300 if that is not set.
        nodes: Node of every rank, the same on all ranks, for `collective="two_level"`. None takes SPARSECOMM_NODES,
            e.g. "0,0,1,1". If that is not set, ranks that share memory are on one node.

    Raises:
        LaunchError: if the processes cannot find each other. The message says how to fix that.
        ConfigError: if the timeout is not a positive number, if `nodes` does not give the node of every rank, or if
            SPARSECOMM_LINK is not two positive numbers.
    """
    return _join(timeout, nodes, _launch)


def join_for_torch() -> World:
    """Joins the world of this job, of which torch.distributed is going to have a process group. Collective.

    As `init`, but torch.distributed stays down. If `init` was called, returns its world.

    Raises:
        LaunchError: if the processes cannot find each other, or if their launcher is none of MPI's.
        ConfigError: as `init`.
    """
    return _join(None, None, _launch_for_torch, torch=False)


def _join(
    timeout: float | None, nodes: Sequence[int] | None, launched: Callable[[], Launch], *, torch: bool = True
) -> World:
    if _owned.world is not None:
        if _owned.pid != os.getpid():
            raise LaunchError(
                f"process {os.getpid()} was forked from rank {_owned.world.rank} (process {_owned.pid}) after "
                "sparsecomm.init(); a forked child cannot join the world"
            )
        return _owned.world
    limit = default_timeout() if timeout is None else timeout
    if isinstance(limit, bool) or not (isinstance(limit, (int, float)) and 0 < limit < _LONGEST):
        raise ConfigError(f"timeout must be a positive number of seconds below 1e7, got {timeout!r}")
    launch, link = launched(), _given_link()
    joining = JoinRequest(launch, limit, _given_nodes(nodes, launch.size), _owned.teardown, torch)
    with deadline(limit, launch, "sparsecomm.init()"):
        joined = JOINS[launch.transport](joining)
    transport = joined.transport
    if joined.store is not None:
        _owned.store = joined.store
    _owned.made_torch = joined.made_torch
    if torch:
        _check_torch(transport)
    _owned.world = World(
        rank=transport.rank,
        size=transport.size,
        local_rank=joined.local_rank,
        local_size=joined.local_size,
        launcher=launch.launcher,
        nodes=transport.nodes,
        engine=Engine(transport, timeout=limit, link=link),
    )
    _owned.pid = os.getpid()
    _owned.leaving = Leaving(_owned.world.engine)
    atexit.register(_shutdown, exiting=True)
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


def _launch_for_torch() -> Launch:
    """Returns how this process was started, which must be by a launcher of MPI, or alone.

    Raises:
        LaunchError: if it was started otherwise.
    """
    launch = detect()
    if launch.transport == "gloo" and launch.size > 1:
        raise LaunchError(
            f'the backend "sparsecomm" communicates over MPI, but {launch.launcher} started this process: launch with '
            'mpirun or srun, or use the backend "gloo"'
        )
    return launch


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


def call_at_end(callback: Callable[[World], None]) -> None:
    """Has a function called with the world when `shutdown` begins; `init` may come before or after this."""
    _owned.at_end.append(callback)


def shutdown() -> None:
    """Finishes the collectives in flight and takes down the libraries that `init` brought up. Collective. Idempotent.

    Waits until all other ranks end, too. Runs by itself when the process exits.
    """
    _shutdown(exiting=False)


def _shutdown(*, exiting: bool) -> None:
    made, leaving = _owned.world, _owned.leaving
    if made is None or leaving is None or _owned.pid != os.getpid():
        return
    for callback in _owned.at_end:
        callback(made)
    _owned.world = _owned.leaving = None
    leaving.close_engine(exiting=exiting)
    close_timeline()
    leaving.restore()
    if exiting or _owned.made_torch:
        leave_torch()
    leaving.depart()
    _owned.teardown.close()


def _check_torch(transport: Transport) -> None:
    if (dist.get_rank(), dist.get_world_size()) != (transport.rank, transport.size):
        raise LaunchError(
            f"torch.distributed was initialized as rank {dist.get_rank()} of {dist.get_world_size()}, "
            f"the launcher says rank {transport.rank} of {transport.size}; give init_process_group the launcher's rank "
            "and size, or leave it out: sparsecomm.init() calls it"
        )
