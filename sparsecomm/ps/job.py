"""`run`: one call, made by every rank of an mpirun, that makes it a worker or a server until training has ended."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sparsecomm.compress import Compressor
from sparsecomm.errors import CommTimeout, ConfigError, LaunchError, SparseCommError
from sparsecomm.launch import default_timeout, detect, is_initialized
from sparsecomm.ps.joining import Door, Rendezvous, enter
from sparsecomm.ps.modes import Asynchronous, Mode, StaleSynchronous, Synchronous
from sparsecomm.ps.report import deserted, waits_for
from sparsecomm.ps.server.checkpoint import Checkpoints
from sparsecomm.ps.server.rules import OptimizerFactory, Rules, ServerOptions
from sparsecomm.ps.server.server import Server
from sparsecomm.ps.worker.client import Link, Steps
from sparsecomm.ps.worker.worker import Worker, set_current_link
from sparsecomm.transport import Backoff
from sparsecomm.transport.mailbox import Mailbox
from sparsecomm.transport.mailbox.window import Window
from sparsecomm.types import ValueCodec

__all__ = ["Outcome", "join", "run"]

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """How the job ended for this rank.

    Attributes:
        role: "worker" or "server".
        rank: of the process in the world.
        result: what the training function returned; None on servers.
        server: on servers, the server as it ended; its shards hold the parameters.
        events: on servers, what happened: deaths, take-overs, refused messages.
    """

    role: str
    rank: int
    result: Any = None
    server: Server | None = None
    events: list[str] = field(default_factory=list)


def run(
    train: Callable[[int, int], Any],
    *,
    optimizer: OptimizerFactory,
    servers: int = 1,
    mode: Mode | None = None,
    pull: Compressor | None = None,
    pull_codec: str = "fp16",
    pull_by: str = "asked",
    rate: Callable[[int], float] | None = None,
    fault_tolerant: bool | None = None,
    replicate: bool | None = None,
    checkpoints: Checkpoints | None = None,
    rendezvous: Rendezvous | None = None,
    timeout: float | None = None,
) -> Outcome:
    """Trains with a parameter server. Collective: every rank of the job calls it with the same arguments.

    The last `servers` ranks serve, the others call `train(rank, size)` with their number among the workers, in which
    they make a `Worker`. Servers run a torch optimizer on their shard; it must work element by element (SGD, Adam and
    their like), since a shard may cut through tensors.

    Args:
        train: what a worker does.
        optimizer: makes the optimizer of a shard from a list of 1-D parameters; each has the attributes `ps_name` and
            `ps_shape` of the parameter that it is a piece of.
        servers: how many ranks serve.
        mode: `Synchronous()` (default), `StaleSynchronous(bound)` or `Asynchronous()`. In the last two every push is an
            update with 1 / workers of its gradient.
        pull: compressor of what workers are sent of the changes since their last pull, with what is left out kept for
            later; None sends whole shards in float32.
        pull_codec: "fp16", "fp32", "bf16" or "int8": how sparse pulls write values.
        pull_by: "asked": servers answer pulls, as `pull` says. "one_sided": workers read whole shards from windows by
            MPI Get, without the servers' doing; not under ULFM, which windows do not survive. "auto": each worker takes
            the way that is predicted to be the fastest, by bytes and by what it measures when it begins
            (`Worker.explain`).
        rate: learning rate by number of updates done; None leaves the optimizer's.
        fault_tolerant: True needs ULFM (`mpirun --with-ft ulfm --mca pml ob1`): the others go on when a rank dies. None
            goes on where ULFM is there. Without it a death ends the job.
        replicate: whether each update is on the next server before it is acknowledged; None does so where the job is
            fault tolerant and has more than one server.
        checkpoints: where servers save their shards, and whether they resume.
        rendezvous: lets workers `join` later, who find the servers there; None lets in nobody.
        timeout: seconds to wait for anybody; SPARSECOMM_TIMEOUT, or 300, if None. Must be longer than the longest time
            in which all workers only compute.

    Returns:
        What became of this rank.

    Raises:
        ConfigError: for zero workers or servers, or a bad option.
        LaunchError: if the job was not started by an mpirun, or without ULFM where that is asked for.
        SparseCommError: on a worker, what made its training fail. Without ULFM that ends the job on all ranks.
    """
    size, limit = _check(servers, mode, pull, pull_codec, pull_by, timeout)
    mailbox = _launched(fault_tolerant)
    workers = tuple(range(size - servers))
    serving = tuple(range(size - servers, size))
    rules = Rules(
        optimizer=optimizer,
        workers=workers,
        world=size,
        mode=Synchronous() if mode is None else mode,
        pull=pull,
        pull_codec=_PULL_CODECS[pull_codec],
        rate=rate,
    )
    backed = (mailbox.fault_tolerant if replicate is None else replicate) and servers > 1
    if mailbox.fault_tolerant and pull_by == "one_sided":
        raise ConfigError(
            'pull_by="one_sided": no kind of window of this MPI goes on after the death of a rank; start the job '
            'without ULFM, or use "auto"'
        )
    open_window = _open_window if pull_by != "asked" and not mailbox.fault_tolerant else None
    if mailbox.rank not in serving:
        link = Link(mailbox, serving, workers, size, rules.mode, pull, rules.pull_codec, pull_by, open_window)
        return _work(link, train, limit)
    door = None
    if rendezvous is not None:
        facts = {"servers": serving, "workers": workers, "world": size, "mode": str(rules.mode)}
        door = Door(rendezvous, mailbox, serving.index(mailbox.rank), facts)
    try:
        return _serve(
            mailbox if door is None else door.mailbox, rules, serving, backed, checkpoints, open_window, limit
        )
    finally:
        if door is not None:
            door.close()


def join(train: Callable[[int, int], Any], rendezvous: str | Path, *, timeout: float | None = None) -> Outcome:
    """Becomes one more worker of a job that is running, in a process that is started by itself (not by its mpirun).

    Its `Worker` has no residual and pulls the parameters as they are. In the synchronous mode rounds wait for it from
    its `clock` on, which begins with the number of rounds done by the others: loop over ``range(worker.clock, steps)``.
    When it dies, the others go on, with or without ULFM.

    Args:
        train: as for `run`; called with this worker's number, behind all others.
        rendezvous: folder of the job's `Rendezvous`.
        timeout: seconds to wait for anybody; SPARSECOMM_TIMEOUT, or 300, if None.

    Returns:
        What became of this worker.

    Raises:
        LaunchError: if no server is found there, or none answers.
        SparseCommError: what made training fail: another model, or a job that has ended.
    """
    limit = _limit(timeout)
    entrance = enter(Path(rendezvous), limit)
    mailbox = entrance.mailbox
    link = Link(mailbox, entrance.servers, (*entrance.workers, mailbox.rank), mailbox.size, entrance.mode)
    try:
        return _work(link, train, limit)
    finally:
        mailbox.close()


_PULL_BY = ("asked", "one_sided", "auto")
_PULL_CODECS = {c.name.lower(): c for c in ValueCodec}


def _check(
    servers: int, mode: Mode | None, pull: Compressor | None, pull_codec: str, pull_by: str, timeout: float | None
) -> tuple[int, float]:
    """Checks the options, alike on all ranks before they talk; returns the world's size and the timeout."""
    launch = detect()
    if not launch.mpi:
        raise LaunchError(
            f"a parameter server needs MPI, this process was started by {launch.launcher}; start it with "
            f"mpirun -n {max(1, servers) + 1} or more ranks ({servers} of them serve)"
        )
    if isinstance(servers, bool) or not isinstance(servers, int) or servers < 1:
        raise ConfigError(f"servers must be a whole number >= 1, got {servers!r}")
    if launch.size <= servers:
        raise ConfigError(f"servers = {servers} of {launch.size} ranks leave zero workers; start more ranks")
    if not (mode is None or isinstance(mode, (Synchronous, StaleSynchronous, Asynchronous))):
        raise ConfigError(f"mode must be Synchronous(), StaleSynchronous(bound) or Asynchronous(), got {mode!r}")
    if not (pull is None or isinstance(pull, Compressor)) or (pull is not None and pull.collectives):
        raise ConfigError(f"pull must be None or a compressor such as TopK(density=0.01), got {pull!r}")
    if pull_codec not in _PULL_CODECS:
        raise ConfigError(f"pull_codec must be one of {', '.join(_PULL_CODECS)}, got {pull_codec!r}")
    if pull_by not in _PULL_BY:
        raise ConfigError(f"pull_by must be one of {', '.join(_PULL_BY)}, got {pull_by!r}")
    limit = _limit(timeout)
    if is_initialized():
        raise LaunchError("sparsecomm.ps.run brings up MPI by itself; leave out sparsecomm.init()")
    return launch.size, limit


def _limit(timeout: float | None) -> float:
    limit = default_timeout() if timeout is None else timeout
    if isinstance(limit, bool) or not (isinstance(limit, (int, float)) and limit > 0):
        raise ConfigError(f"timeout must be a positive number of seconds, got {timeout!r}")
    return limit


def _launched(fault_tolerant: bool | None) -> Mailbox:
    """Brings up MPI and a mailbox. Collective."""
    from sparsecomm.transport.mailbox.mpi import MPIMailbox, ulfm_problem
    from sparsecomm.transport.mpi import import_mpi, mpi_initialized_here

    problem = ulfm_problem()
    if fault_tolerant and problem is not None:
        raise LaunchError(f"fault_tolerant=True: {problem}")
    MPI = import_mpi()
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        # With a rank dead, MPI_Finalize hangs now and then; one may die in it, too. ULFM does not mind its absence.
        if ulfm_problem() is not None:
            atexit.register(lambda: MPI.Finalize() if mpi_initialized_here() else None)
    world = MPI.COMM_WORLD.Get_size()
    if world != detect().size:
        raise LaunchError(
            f"the launcher started {detect().size} processes, MPI sees {world}: it belongs to another MPI than "
            "mpi4py uses"
        )
    return MPIMailbox()


def _open_window(nbytes: int) -> Window:
    """Makes a window that lasts until MPI ends. Collective."""
    from sparsecomm.transport.mailbox.mpi_window import MPIWindow

    window = MPIWindow(nbytes)
    atexit.register(window.close)  # before MPI_Finalize, which was registered before
    return window


def _serve(
    mailbox: Mailbox,
    rules: Rules,
    serving: tuple[int, ...],
    replicate: bool,
    checkpoints: Checkpoints | None,
    open_window: Callable[[int], Window] | None,
    timeout: float,
) -> Outcome:
    server = Server(
        mailbox,
        rules,
        ServerOptions(
            servers=serving,
            replicate=replicate,
            restore=None if checkpoints is None else checkpoints.restore,
            saved=None if checkpoints is None else checkpoints.saved,
        ),
    )
    try:
        _loop(mailbox, server, open_window, timeout)
    except BaseException as error:
        _fail(mailbox, error)
        os.kill(os.getpid(), signal.SIGKILL)  # ULFM takes notice of nothing less: now the backup takes over
    if deserted(server):
        raise SparseCommError(
            f"server rank {mailbox.rank}: no worker has ended its training: {'; '.join(server.events)}"
        )
    return Outcome("server", mailbox.rank, server=server, events=server.events)


def _loop(mailbox: Mailbox, server: Server, open_window: Callable[[int], Window] | None, timeout: float) -> None:
    """Serves until all workers are gone and all servers know it."""
    backoff, told = Backoff(), 0
    while not server.finished:
        moved = server.turn()
        if open_window is not None and server.opens():
            server.open(open_window)
            open_window = None
        if moved:
            backoff.news()
        elif backoff.quiet > timeout:
            raise CommTimeout(
                f"server rank {mailbox.rank} has heard nothing for {timeout:g} s; it waits for {waits_for(server)} "
                "(SPARSECOMM_TIMEOUT sets the limit in seconds)"
            )
        else:
            backoff.sleep()
        for event in server.events[told:]:
            print(f"sparsecomm.ps: server rank {mailbox.rank}: {event}", file=sys.stderr, flush=True)
        told = len(server.events)


def _work(link: Link, train: Callable[[int, int], Any], timeout: float) -> Outcome:
    mailbox = link.mailbox
    made: list[Worker] = []

    def drive(steps: Steps[T]) -> T:
        backoff, waited = Backoff(), ""
        while True:
            before = mailbox.traffic.messages_received
            try:
                what = next(steps)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if what != waited or mailbox.traffic.messages_received > before:
                waited = what
                backoff.news()
            if backoff.quiet > timeout:
                raise CommTimeout(
                    f"worker rank {mailbox.rank} has waited {timeout:g} s for {what}. Is it alive, and are the "
                    "workers that it may wait for? (SPARSECOMM_TIMEOUT sets the limit in seconds)"
                )
            backoff.sleep()

    set_current_link(replace(link, drive=drive, made=made.append))
    try:
        result = train(*link.place)
        if len(made) != 1:
            raise ConfigError(f"the training function made {len(made)} workers, it must make exactly one")
        drive(made[0].leaving())
    except BaseException as error:
        _fail(mailbox, error)
        if made:
            with contextlib.suppress(SparseCommError):
                drive(made[0].leaving(f"{type(error).__name__}: {error}"))
        raise
    finally:
        set_current_link(None)
    return Outcome("worker", mailbox.rank, result=result)


def _fail(mailbox: Mailbox, error: BaseException) -> None:
    """Says what went wrong; without ULFM it ends the whole job, too."""
    text = f"sparsecomm.ps: rank {mailbox.rank} of {mailbox.size} failed with {type(error).__name__}: {error}"
    if mailbox.fault_tolerant:
        print(f"{text}; the others go on", file=sys.stderr, flush=True)
        return
    traceback.print_exc()
    print(f"{text}; ending the job on all ranks", file=sys.stderr, flush=True)
    sys.stdout.flush()
    from sparsecomm.transport.mpi import import_mpi

    import_mpi().COMM_WORLD.Abort(1)
