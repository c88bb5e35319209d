"""Joins a running job: a process that MPI did not start finds the servers through files and connects to them by TCP.

MPI would not do. Under ULFM a process made by MPI_Comm_spawn can talk to its parent, but when it dies mpirun ends with
an error although all others go on (Open MPI 5.0.11: status 137). The child would also have to be connected to the other
servers by a collective call, in which ranks may die. MPI_Comm_connect from another mpirun blocks, and needs a runtime
that both share.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecomm.errors import ConfigError, LaunchError, TransportError
from sparsecomm.launch.detect import detect
from sparsecomm.ps.addresses import Address, claim, read_addresses, remove, write
from sparsecomm.transport.mailbox import Mailbox
from sparsecomm.transport.mailbox.tcp import TOKEN_BYTES, ListeningMailbox, TCPMailbox

__all__ = ["JoinListener", "Rendezvous", "RunningJob", "connect"]

_PATIENCE = 10.0  # seconds to wait for more servers of a job once one of them has answered
_LOOK = 0.05  # seconds between two looks into the folder
_AGAIN = 1.0  # seconds before an address at which nobody listened is tried again
_REACH = 5.0  # seconds to wait for a connection


@dataclass(frozen=True)
class Rendezvous:
    """Where servers leave their addresses for workers that join later.

    Attributes:
        folder: Folder that servers and joiners can write to. Everybody who can read it can join the job.
        host: Name or address at which a server listens. If None, the address of the machine's name, or localhost.
    """

    folder: str | Path
    host: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.folder, (str, Path)) or not str(self.folder):
            raise ConfigError(f"Rendezvous.folder must be a path, got {self.folder!r}")


class JoinListener:
    """Lets workers join through a server, whose address is in the folder until `close`.

    Args:
        rendezvous: Where to listen, and where to leave the address.
        mailbox: Mailbox of the server.
        index: Index of the server.
        facts: Facts of the job for joiners: ranks of `servers` and `workers`, `world`, `mode`.

    Raises:
        LaunchError: If the server cannot listen there, or cannot write to the folder.

    Attributes:
        mailbox: Mailbox of the server that also serves the workers that have joined.
    """

    def __init__(self, rendezvous: Rendezvous, mailbox: Mailbox, index: int, facts: dict[str, Any]) -> None:
        token = secrets.token_bytes(TOKEN_BYTES)
        try:
            host = _own_host() if rendezvous.host is None else rendezvous.host
            self.mailbox = ListeningMailbox(mailbox, host, token)
            try:
                ranks = {name: tuple(facts[name]) for name in ("servers", "workers")}
                port = self.mailbox.address[1]
                self._address = Address(host, port, token, _job_name(), index, **(facts | ranks))
                self._path = write(Path(rendezvous.folder), self._address)
            except BaseException:
                self.mailbox.close()
                raise
        except OSError as error:
            raise LaunchError(
                f"server rank {mailbox.rank} cannot listen for joiners at {rendezvous.folder} ({rendezvous.host}): "
                f"{error}"
            ) from error

    def close(self) -> None:
        """Removes the address and closes all connections."""
        remove(self._path, self._address)
        self.mailbox.close()


def _own_host() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _job_name() -> str:
    """Returns a name that the servers of a job share. With it a job ignores the files of an earlier one."""
    return detect().job or str(os.getppid())


@dataclass(frozen=True)
class RunningJob:
    """A running job, as a joiner sees it.

    Attributes:
        mailbox: Mailbox of the joiner, connected to the servers.
        servers: Ranks of the servers, by index.
        workers: Ranks of the workers at the start.
        mode: Text of the servers' mode.
    """

    mailbox: TCPMailbox
    servers: tuple[int, ...]
    workers: tuple[int, ...]
    mode: str


def connect(folder: Path, timeout: float) -> RunningJob:
    """Connects to the servers of the newest job in a folder that answers. Waits for one if there is none yet.

    Args:
        folder: Folder of the job's `Rendezvous`.
        timeout: Seconds to wait for a server. Once one has answered, the others of its job have 10 seconds.

    Raises:
        LaunchError: If no server has answered by then.
    """
    end = time.monotonic() + timeout
    search = _Search(folder, min(timeout, _PATIENCE))
    try:
        while True:
            began = time.monotonic()
            found = search.look(last=began > end)
            if found is not None:
                return found
            if began > end:
                raise LaunchError(search.failure())
            time.sleep(max(_LOOK, time.monotonic() - began))  # a folder may be large
    finally:
        search.close()


@dataclass
class _Attempt:
    """An attempt to join a job.

    Attributes:
        listed: The addresses that it tries, by index of the server.
        since: Time of the first look that found these addresses.
        mailbox: Mailbox that is connected to at least one of them; None before.
        failure: Why the last attempt failed.
        again: Time from which on it may be tried again.
    """

    listed: dict[int, Address]
    since: float
    mailbox: TCPMailbox | None = None
    failure: str = ""
    again: float = 0.0


class _Search:
    """A search for a job to join.

    Args:
        folder: Folder of the job's `Rendezvous`.
        patience: Seconds to wait for more servers of a job.
    """

    def __init__(self, folder: Path, patience: float) -> None:
        self._folder = folder
        self._patience = patience
        self._attempts: dict[str, _Attempt] = {}
        self._skipped: dict[Path, str] = {}

    def look(self, *, last: bool) -> RunningJob | None:
        """Looks into the folder once; returns a job if enough of its servers have answered.

        Args:
            last: Whether this is the last look. Then a job is good enough if one of its servers is there at all.
        """
        found, skipped = read_addresses(self._folder)
        for path in sorted(skipped.keys() - self._skipped.keys()):
            warnings.warn(f"{str(path)!r} is no address of a server: {skipped[path]}", stacklevel=4)
        self._skipped |= skipped
        jobs: dict[str, dict[int, Address]] = {}
        for address, _ in found:  # the newest is last
            listed = jobs.pop(address.job, {})
            jobs[address.job] = listed | {address.index: address}
        for job in self._attempts.keys() - jobs.keys():
            self._drop(job)
        for job, listed in reversed(jobs.items()):
            attempt = self._attempt(job, listed)
            if self._complete(attempt) or (last and attempt.mailbox is not None):
                return self._joined(job, attempt)
        return None

    def failure(self) -> str:
        """Describes why no job was found."""
        why = [f"{str(path)!r} is no address of a server: {reason}" for path, reason in self._skipped.items()]
        tried = [attempt.failure for attempt in self._attempts.values() if attempt.failure]
        if tried:
            return f"cannot join the job of {self._folder}: {'; '.join(tried)}"
        return (
            f"no server has left its address in {self._folder}: has the job begun, with "
            f"rendezvous=Rendezvous({str(self._folder)!r}), or has it ended?{' ' * bool(why)}{'; '.join(why[:3])}"
        )

    def close(self) -> None:
        """Closes the connections of all attempts that were not successful."""
        for job in list(self._attempts):
            self._drop(job)

    def _drop(self, job: str) -> None:
        mailbox = self._attempts.pop(job).mailbox
        if mailbox is not None:
            mailbox.close()

    def _attempt(self, job: str, listed: dict[int, Address]) -> _Attempt:
        """Returns the attempt at a job, with a mailbox if one of its servers is there."""
        known = self._attempts.get(job)
        if known is None or known.listed != listed:
            if known is not None:
                self._drop(job)
            known = self._attempts[job] = _Attempt(listed, time.monotonic())
        if known.mailbox is not None:
            known.mailbox.answered()
            if known.mailbox.lost() >= set(_servers(listed)):
                known.mailbox, known.again = None, float("inf")
                known.failure = f"no server answers; has the job ended? Others answer at the addresses of job {job!r}"
        if known.mailbox is None and time.monotonic() >= known.again:
            self._try(known)
        return known

    def _try(self, attempt: _Attempt) -> None:
        """Connects to the servers of a job if at least one of them listens."""
        address = next(iter(attempt.listed.values()))
        places = {rank: (a.host, a.port, a.token) for rank, a in _servers(attempt.listed).items()}
        began = time.monotonic()
        try:
            failures = [_listens(rank, *place[:2]) for rank, place in places.items()]
            if all(failures):
                raise TransportError(f"no server answers; has the job ended? {'; '.join(map(str, failures))}")
            attempt.mailbox = TCPMailbox(claim(self._folder, address), address.world, places, _REACH)
        except TransportError as error:
            attempt.failure = str(error)
            attempt.again = time.monotonic() + max(_AGAIN, 2 * (time.monotonic() - began))

    def _complete(self, attempt: _Attempt) -> bool:
        """Returns whether all servers of a job have answered, or one has and the others have had their time."""
        if attempt.mailbox is None:
            return False
        answered = attempt.mailbox.answered()
        wanted = len(next(iter(attempt.listed.values())).servers)
        return answered == wanted or (answered > 0 and time.monotonic() - attempt.since > self._patience)

    def _joined(self, job: str, attempt: _Attempt) -> RunningJob:
        address, mailbox = next(iter(attempt.listed.values())), attempt.mailbox
        assert mailbox is not None
        del self._attempts[job]
        return RunningJob(mailbox, address.servers, address.workers, address.mode)


def _servers(listed: dict[int, Address]) -> dict[int, Address]:
    """Returns the addresses of a job by the servers' ranks."""
    return {address.servers[index]: address for index, address in listed.items()}


def _listens(rank: int, host: str, port: int) -> str | None:
    """Returns why nobody listens at an address; None if somebody does."""
    try:
        socket.create_connection((host, port), _REACH).close()
    except (OSError, UnicodeError) as error:
        return f"rank {rank} at {host}:{port}: {error}"
    return None
