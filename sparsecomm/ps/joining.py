"""Joins a running job: a process that MPI did not start finds the servers through files and connects to them by TCP.

MPI would not do. Under ULFM a process made by MPI_Comm_spawn can talk to its parent, but when it dies mpirun ends with
an error although all others go on (Open MPI 5.0.11: status 137). The child would also have to be connected to the other
servers by a collective call, in which ranks may die. MPI_Comm_connect from another mpirun blocks, and needs a runtime
that both share.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecomm.errors import ConfigError, LaunchError, TransportError
from sparsecomm.transport.mailbox import Mailbox
from sparsecomm.transport.mailbox.tcp import TOKEN_BYTES, ListeningMailbox, TCPMailbox

__all__ = ["JoinListener", "Rendezvous", "RunningJob", "connect"]

_PATIENCE = 10.0  # seconds to look for servers
_FIELDS = {
    "host": str,
    "port": int,
    "token": str,
    "job": str,
    "servers": list,
    "workers": list,
    "world": int,
    "mode": str,
}


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
        folder = Path(rendezvous.folder)
        token = secrets.token_bytes(TOKEN_BYTES)
        host = _own_host() if rendezvous.host is None else rendezvous.host
        try:
            self.mailbox = ListeningMailbox(mailbox, host, token)
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / f"server-{index}.json"
            written = folder / f".server-{index}.{os.getpid()}"
            with os.fdopen(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                said = {
                    "host": host,
                    "port": self.mailbox.address[1],
                    "token": token.hex(),
                    "job": _job_name(),
                    **facts,
                }
                json.dump(said, file)
            os.replace(written, self._path)
        except OSError as error:
            raise LaunchError(
                f"server rank {mailbox.rank} cannot listen for joiners at {rendezvous.folder} ({host}): {error}"
            ) from error

    def close(self) -> None:
        """Removes the address and closes all connections."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        self.mailbox.close()


def _own_host() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _job_name() -> str:
    """Returns a name that the servers of a job share. With it a job ignores the files of an earlier one."""
    return os.environ.get("PMIX_NAMESPACE") or os.environ.get("PMI_JOBID") or str(os.getppid())


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
    """Connects to the servers whose addresses are in a folder.

    Args:
        folder: Folder of the job's `Rendezvous`.
        timeout: Seconds to wait for each server's address and answer, 10 at most.

    Raises:
        LaunchError: If there is no address, or none of the servers answers.
    """
    patience = min(timeout, _PATIENCE)
    job, listed = _addresses(folder, patience)
    servers = tuple(job["servers"])
    rank = _claim(folder, job["job"], job["world"])
    addresses = {servers[i]: (d["host"], d["port"], bytes.fromhex(d["token"])) for i, d in listed.items()}
    try:
        mailbox = TCPMailbox(rank, job["world"], addresses, patience)
    except TransportError as error:
        raise LaunchError(f"cannot join the job of {folder}: {error}") from error
    return RunningJob(mailbox, servers, tuple(job["workers"]), job["mode"])


def _addresses(folder: Path, patience: float) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Returns the content of the newest address file, and those of all servers of its job, by index."""
    end = time.monotonic() + patience
    while True:
        found = {path: _read(path) for path in folder.glob("server-*.json")}
        if found:
            newest = found[max(found, key=lambda path: path.stat().st_mtime)]
            listed = {int(p.stem.split("-")[1]): d for p, d in found.items() if d["job"] == newest["job"]}
            if len(listed) == len(newest["servers"]) or time.monotonic() > end:
                return newest, listed
        elif time.monotonic() > end:
            raise LaunchError(
                f"no server has left its address in {folder}: has the job begun, with "
                f"rendezvous=Rendezvous({str(folder)!r}), or has it ended?"
            )
        time.sleep(0.05)


def _claim(folder: Path, job: str, world: int) -> int:
    """Takes the first rank after the job's ranks that no other joiner has had. Ranks are never used twice."""
    rank = world
    name = "".join(c if c.isalnum() else "-" for c in job)
    while True:
        try:
            os.close(os.open(folder / f"joiner-{name}-{rank}", os.O_CREAT | os.O_EXCL, 0o600))
            return rank
        except FileExistsError:
            rank += 1
        except OSError as error:
            raise LaunchError(f"cannot take a rank in {folder}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        good = isinstance(content, dict) and all(type(content.get(k)) is kind for k, kind in _FIELDS.items())
        good = good and len(bytes.fromhex(content["token"])) == TOKEN_BYTES and bool(content["servers"])
    except (OSError, ValueError) as error:
        raise LaunchError(f"{path} is no address of a server: {error}") from error
    if not good:
        raise LaunchError(f"{path} is no address of a server: it has {str(content)[:80]}")
    result: dict[str, Any] = content
    return result
