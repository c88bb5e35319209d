"""Brings up MPI, with the mailbox and the windows of this rank."""

from __future__ import annotations

import atexit
import os
import signal
from typing import NoReturn

from sparsecomm.errors import LaunchError
from sparsecomm.launch.detect import detect
from sparsecomm.launch.starting import deadline
from sparsecomm.transport.mailbox import Mailbox
from sparsecomm.transport.mailbox.window import Window

__all__ = ["open_mailbox", "open_window"]


def open_mailbox(fault_tolerant: bool | None, timeout: float) -> Mailbox:
    """Brings up MPI and returns this rank's mailbox. Collective.

    Args:
        fault_tolerant: Whether to insist on ULFM.
        timeout: Seconds after which the process ends with an error if other ranks have not come.

    Raises:
        LaunchError: If ULFM is demanded and absent, or the launcher belongs to another MPI than mpi4py uses.
    """
    from sparsecomm.transport.mailbox.mpi import MPIMailbox
    from sparsecomm.transport.mpi import import_mpi, init_mpi, leave_mpi, ulfm_problem

    problem, launch = ulfm_problem(), detect()
    if fault_tolerant and problem is not None:
        raise LaunchError(f"fault_tolerant=True: {problem}")
    MPI = import_mpi()
    if not MPI.Is_initialized():
        with deadline(timeout, launch, "sparsecomm.ps.run()"):
            init_mpi()
        atexit.register(leave_mpi)
    world = MPI.COMM_WORLD.Get_size()
    if world != launch.size:
        raise LaunchError(
            f"the launcher started {launch.size} processes, MPI sees {world}: it belongs to another MPI than "
            "mpi4py uses"
        )
    if problem is None:
        _die_visibly()
    return MPIMailbox()


def _die_visibly() -> None:
    """Makes `os._exit` kill this process if the status is not 0, because ULFM notices no end with such a status."""
    pid, plain_exit = os.getpid(), os._exit

    def exit_at_once(status: int) -> NoReturn:
        if status and os.getpid() == pid:
            os.kill(pid, signal.SIGKILL)
        plain_exit(status)

    os._exit = exit_at_once


def open_window(nbytes: int) -> Window:
    """Makes a window that lasts until MPI ends. Collective."""
    from sparsecomm.transport.mailbox.mpi_window import MPIWindow

    window = MPIWindow(nbytes)
    atexit.register(window.close)  # runs before MPI_Finalize, which was registered before
    return window
