"""A deadline for the start of a job, whose libraries wait without limit for a rank that is gone."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sparsecomm.launch.detect import Launch
from sparsecomm.transport.notes import listed

__all__ = ["deadline", "who_is_missing"]

_present: list[socket.socket] = []
"""This process's sign of life: an abstract socket, which exists as long as the process does."""


@contextmanager
def deadline(seconds: float, launch: Launch, call: str) -> Iterator[None]:
    """Ends this process if the body takes longer. Nothing gentler ends a thread that waits inside MPI.

    The body must not hold the interpreter's lock while it waits.

    Args:
        seconds: The limit.
        launch: How this process was started.
        call: The user's call, for the message.
    """
    _show_presence(launch)
    done = threading.Event()

    def watch() -> None:
        if done.wait(seconds):
            return
        try:
            print(
                f"sparsecomm: rank {launch.rank} of {launch.size}: {call} has waited {seconds:g} s for other ranks "
                f"(SPARSECOMM_TIMEOUT sets the limit in seconds); {who_is_missing(launch)}; ending this rank",
                file=sys.stderr,
                flush=True,
            )
            sys.stdout.flush()
        finally:
            os._exit(1)

    watcher = threading.Thread(target=watch, name="sparsecomm-start", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()


def who_is_missing(launch: Launch) -> str:
    """Returns which ranks of this node have not called `sparsecomm.init` yet, in words."""
    here = {rank for rank in range(launch.size) if rank == launch.rank or _is_present(launch, rank)}
    came = f"on this node ({socket.gethostname()}) {listed(here)} came"
    expected = launch.local_size
    if expected == launch.size and len(here) < launch.size:
        missing = set(range(launch.size)) - here
        return f"{came}, {listed(missing)} did not: ended or stuck before this call"
    if expected is not None and len(here) < expected:
        return f"{came}, {expected - len(here)} of its {expected} ranks did not: ended or stuck before this call"
    if len(here) == launch.size:
        return f"{came}: all of them, so they wait for each other (is the network between them up?)"
    return f"{came}; of the ranks on other nodes this one knows nothing"


def _address(launch: Launch, rank: int) -> str:
    job = hashlib.sha256(launch.job.encode(errors="replace")).hexdigest()[:16]  # an address has 107 bytes at most
    return f"\0sparsecomm/{os.getuid()}/{job}/{rank}"


def _show_presence(launch: Launch) -> None:
    if not _present and launch.size > 1:
        with suppress(OSError):  # no such sockets here, or another process says the same
            mine = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            mine.bind(_address(launch, launch.rank))
            _present.append(mine)


def _is_present(launch: Launch, rank: int) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(_address(launch, rank)) == 0
