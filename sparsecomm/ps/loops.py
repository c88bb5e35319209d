"""The loops in which a server serves and a worker trains until training has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from sparsecomm.errors import CommTimeout, ConfigError, SparseCommError
from sparsecomm.ps.report import deserted, waits_for
from sparsecomm.ps.server.server import Server
from sparsecomm.ps.worker.link import Link, Steps
from sparsecomm.ps.worker.worker import Worker, set_current_link
from sparsecomm.transport import Backoff
from sparsecomm.transport.mailbox import Mailbox
from sparsecomm.transport.mailbox.window import Window

__all__ = ["serve", "work"]

T = TypeVar("T")

_SHOWN = 20  # events in an error
_BLAME = 10.0  # seconds to find out who is late


def serve(server: Server, open_window: Callable[[int], Window] | None, timeout: float) -> None:
    """Serves until all workers have left and all other servers have ended.

    Args:
        server: The server.
        open_window: Makes the window that shows the server's shard; None if there are no windows.
        timeout: Seconds without any message after which the server fails.

    Raises:
        SparseCommError: If no worker has ended its training.
    """
    mailbox = server.mailbox
    try:
        _turns(server, open_window, timeout)
    except BaseException as error:
        _fail(mailbox, error)
        # ULFM notices nothing less than the end of the process, after which the backup takes over.
        os.kill(os.getpid(), signal.SIGKILL)
    if deserted(server):
        raise SparseCommError(
            f"server rank {mailbox.rank}: no worker has ended its training: {'; '.join(server.events[-_SHOWN:])}"
        )


def _turns(server: Server, open_window: Callable[[int], Window] | None, timeout: float) -> None:
    """Gives a server turns until it has finished, and prints its events."""
    rank = server.mailbox.rank
    backoff, printed = Backoff(), 0
    while not server.finished:
        moved = server.turn()
        if open_window is not None and server.may_open_window():
            server.open_window(open_window)
            open_window = None
        if moved:
            backoff.news()
        elif backoff.quiet > timeout:
            raise CommTimeout(
                f"server rank {rank} has heard nothing new for {timeout:g} s; it waits for {waits_for(server)} "
                "(SPARSECOMM_TIMEOUT sets the limit in seconds)"
            )
        else:
            backoff.sleep()
        for event in server.events.since(printed):
            print(f"sparsecomm.ps: server rank {rank}: {event}", file=sys.stderr, flush=True)
        printed = server.events.total


def work(link: Link, train: Callable[[int, int], Any], timeout: float) -> Any:
    """Calls the training function of a worker and leaves the job when it returns.

    Args:
        link: Connection to the servers.
        train: Called with the worker's number and the number of workers. Must make exactly one `Worker`.
        timeout: Seconds after which a wait for one thing fails.

    Returns:
        The result of `train`.

    Raises:
        SystemExit: If `train` ends by sys.exit. With the status 0 the worker leaves as if `train` had returned.
    """
    made: list[Worker] = []
    drive = _Driver(link.mailbox, timeout, made)
    set_current_link(replace(link, drive=drive, made=made.append))
    leaves: SystemExit | None = None
    result = None
    try:
        try:
            result = train(*link.place)
        except SystemExit as end:
            if _status(end):
                raise
            leaves = end
        if len(made) != 1:
            raise ConfigError(f"the training function made {len(made)} workers, it must make exactly one")
        drive(made[0].leaving())
    except BaseException as error:
        _fail(link.mailbox, error)
        if made:
            with contextlib.suppress(SparseCommError):
                drive(made[0].leaving(_described(error)))
        raise
    finally:
        set_current_link(None)
    if leaves is not None:
        raise leaves
    return result


class _Driver:
    """Runs the steps of a worker.

    Args:
        mailbox: Mailbox of the worker.
        timeout: Seconds after which a wait for one thing, without any message, fails.
        made: The worker, once it is made.
    """

    def __init__(self, mailbox: Mailbox, timeout: float, made: list[Worker]) -> None:
        self._mailbox = mailbox
        self._timeout = timeout
        self._made = made

    def __call__(self, steps: Steps[T], /) -> T:
        """Returns the result of the steps."""
        mailbox, backoff, awaited_before = self._mailbox, Backoff(), ""
        while True:
            received = mailbox.traffic.messages_received
            try:
                awaited = next(steps)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if awaited != awaited_before or mailbox.traffic.messages_received > received:
                awaited_before = awaited
                backoff.news()
            if backoff.quiet > self._timeout:
                raise CommTimeout(
                    f"worker rank {mailbox.rank} has waited {self._timeout:g} s for {awaited}{self._blame()} "
                    "(SPARSECOMM_TIMEOUT sets the limit in seconds)"
                )
            backoff.sleep()

    def _blame(self) -> str:
        """Asks the servers whom they wait for, for a short time, and returns that in words."""
        worker = next(iter(self._made), None)
        if worker is None:
            return ""
        backoff, limit = Backoff(), min(_BLAME, self._timeout)
        with contextlib.suppress(SparseCommError):
            for _ in worker.blaming():
                if backoff.quiet > limit:
                    break
                time.sleep(backoff.pause())
        return f"; {worker.blamed}"


def _fail(mailbox: Mailbox, error: BaseException) -> None:
    """Prints the failure of this rank, and ends the whole job unless it survives the death of a rank."""
    text = f"sparsecomm.ps: rank {mailbox.rank} of {mailbox.size} failed with {_described(error)}"
    if mailbox.fault_tolerant:
        print(f"{text}; the others go on", file=sys.stderr, flush=True)
        return
    traceback.print_exc()
    print(f"{text}; ending the job on all ranks", file=sys.stderr, flush=True)
    sys.stdout.flush()
    from sparsecomm.transport.mpi import import_mpi

    import_mpi().COMM_WORLD.Abort(_status(error))


def _status(error: BaseException) -> int:
    """Returns the status with which a process ends by this exception; never 0 but for the status 0 of sys.exit."""
    if not isinstance(error, SystemExit):
        return 1
    code = 0 if error.code is None else error.code
    if not isinstance(code, int):
        return 1  # a text
    return (code & 255 or 1) if code else 0  # the system keeps 8 bits


def _described(error: BaseException) -> str:
    """Returns an exception in words."""
    if isinstance(error, SystemExit):
        return f"status {_status(error)}, by sys.exit({error.code!r})"
    return f"{type(error).__name__}: {error}"
