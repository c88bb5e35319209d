"""`run`, with which every rank of an mpirun becomes a worker or a server, and `join`, which adds a worker later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsecomm.compress import Compressor
from sparsecomm.ps.joining import JoinListener, Rendezvous, connect
from sparsecomm.ps.launching import open_mailbox, open_window
from sparsecomm.ps.loops import serve, work
from sparsecomm.ps.modes import Mode
from sparsecomm.ps.options import JobOptions, PullOptions, seconds_of
from sparsecomm.ps.server.checkpoint import Checkpoints
from sparsecomm.ps.server.rules import OptimizerFactory
from sparsecomm.ps.server.server import Server
from sparsecomm.ps.worker.link import Link

__all__ = ["Outcome", "join", "run"]


@dataclass(frozen=True)
class Outcome:
    """The end of a job on one rank.

    Attributes:
        role: "worker" or "server".
        rank: Rank of the process.
        result: Result of the training function; None on servers.
        server: On servers, the server in its last state; its shards hold the parameters.
        events: On servers, the events of the job in words: deaths, take-overs, refused messages.
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
    """Trains with a parameter server. Collective: every rank calls it with the same arguments.

    The last ranks serve; the others call `train(rank, size)` with their number among the workers and make a `Worker`.

    Args:
        train: Training function of a worker.
        optimizer: Makes the optimizer of a shard from 1-D parameters with the attributes `ps_name` and `ps_shape` of
            the parameter that each is a piece of. It must work element by element, since a shard may cut tensors.
        servers: Number of ranks that serve.
        mode: `Synchronous()` (default), `StaleSynchronous(bound)` or `Asynchronous()`. In the last two every push is an
            update with 1 / workers of its gradient.
        pull: Compressor of the changes that a pull brings; changes that it leaves out come later. None sends whole
            shards in float32.
        pull_codec: Codec of the values of sparse pulls: "fp16", "fp32", "bf16" or "int8".
        pull_by: "asked": servers answer pulls, sparse or whole. "one_sided": workers read whole shards from windows by
            MPI Get, which is not possible under ULFM. "auto": each worker takes the way with the least predicted time,
            by bytes and by measurements when it begins (`Worker.explain`).
        rate: Learning rate by number of updates done, in place of the optimizer's `lr`. Parameter groups with another
            one keep their ratio to it. None leaves the optimizer's.
        fault_tolerant: Whether the job goes on when a rank dies, which needs ULFM (`mpirun --with-ft ulfm --mca pml
            ob1`). True insists on ULFM, None uses it if it is there. Without ULFM a death ends the job.
        replicate: Whether the next server stores each update before it is acknowledged. None does so if the job is
            fault tolerant and has more than one server.
        checkpoints: Where servers save their shards, and whether they resume.
        rendezvous: Where workers that `join` later find the servers; None admits no such workers.
        timeout: Seconds to wait for anybody; None takes SPARSECOMM_TIMEOUT, or 300. It must be longer than the longest
            time in which all workers only compute.

    Returns:
        The end of the job on this rank.

    Raises:
        ConfigError: If an option is wrong, or there are no workers or servers.
        LaunchError: If the job was not started by an mpirun, or without ULFM if that is demanded.
        SparseCommError: On a worker, if its training failed. Without ULFM that ends the job on all ranks.
        SystemExit: On a worker, if `train` ends by sys.exit. With the status 0 the worker has ended its training.
    """
    pulls = PullOptions(pull, pull_codec, pull_by)
    return _run(
        train,
        JobOptions(optimizer, servers, mode, pulls, rate, fault_tolerant, replicate, checkpoints, rendezvous, timeout),
    )


def _run(train: Callable[[int, int], Any], options: JobOptions) -> Outcome:
    world = options.check()
    timeout = seconds_of(options.timeout)
    mailbox = open_mailbox(options.fault_tolerant, timeout)
    pulls, rules = options.pulls, options.rules(world)
    servers = tuple(range(len(rules.workers), world))
    window = open_window if pulls.has_windows(mailbox) else None
    if mailbox.rank in rules.workers:
        link = Link(
            mailbox,
            servers,
            rules.workers,
            world,
            rules.mode,
            sparse=pulls.compressor,
            pull_codec=pulls.codec,
            pull_by=pulls.by,
            open_window=window,
        )
        return Outcome("worker", mailbox.rank, result=work(link, train, timeout))
    listener = None
    if options.rendezvous is not None:
        facts = {"servers": servers, "workers": rules.workers, "world": world, "mode": str(rules.mode)}
        listener = JoinListener(options.rendezvous, mailbox, servers.index(mailbox.rank), facts)
    try:
        inbox = mailbox if listener is None else listener.mailbox
        server = Server(inbox, rules, options.server_options(servers, mailbox.fault_tolerant))
        serve(server, window, timeout)
    finally:
        if listener is not None:
            listener.close()
    return Outcome("server", mailbox.rank, server=server, events=server.events)


def join(train: Callable[[int, int], Any], rendezvous: str | Path, *, timeout: float | None = None) -> Outcome:
    """Becomes one more worker of a running job, in a process that the job's mpirun did not start.

    Its `Worker` begins without a residual and with the job's parameters. In the synchronous mode rounds wait for it
    from its `clock` on, so its steps are ``range(worker.clock, steps)``. When it dies the others go on, with or without
    ULFM.

    Args:
        train: Training function as for `run`; the number of this worker comes after all others.
        rendezvous: Folder of the job's `Rendezvous`.
        timeout: Seconds to wait for anybody, the job's servers included; None takes SPARSECOMM_TIMEOUT, or 300.

    Returns:
        The end of the job for this worker.

    Raises:
        LaunchError: If no server is found there by then, or none answers.
        SparseCommError: If training failed, for instance because the model differs or the job has ended.
    """
    limit = seconds_of(timeout)
    job = connect(Path(rendezvous), limit)
    mailbox = job.mailbox
    link = Link(mailbox, job.servers, (*job.workers, mailbox.rank), mailbox.size, job.mode)
    try:
        return Outcome("worker", mailbox.rank, result=work(link, train, limit))
    finally:
        mailbox.close()
