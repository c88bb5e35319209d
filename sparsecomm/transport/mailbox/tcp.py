"""Mailboxes over TCP, for ranks that join after the launch. MPI reaches only the ranks that it has started.

A joiner connects to each server and sends a greeting: the server's token, its own rank and the number of ranks at the
start (24 bytes). The server answers with 32 bytes that prove that it knows the token, or closes the connection; so a
joiner is sure that it has not reached another job at an old address. Frames follow, both ways. A rank that closes its
connection counts as dead.
"""

from __future__ import annotations

import contextlib
import hmac
import resource
import socket
import struct
from collections.abc import Mapping
from time import monotonic
from typing import Any

import torch
from typing_extensions import override

from sparsecomm.errors import TransportError
from sparsecomm.transport.base import Traffic
from sparsecomm.transport.mailbox.base import Mailbox
from sparsecomm.transport.mailbox.connection import Connection, Connections

__all__ = ["MOST_JOINERS", "TOKEN_BYTES", "ListeningMailbox", "TCPMailbox"]

TOKEN_BYTES = 16
MOST_JOINERS = 1 << 14
"""Most ranks that can ever join a job. No rank is used twice, so every one costs a server some memory."""

_GREETING = struct.Struct(f"<{TOKEN_BYTES}sII")  # token, rank of the joiner, number of ranks at the start
_MOST_GREETING = 64  # connections that have not greeted yet
_GREETING_SECONDS = 10.0  # within which a connection must greet
_STALLED = 60.0  # seconds in which a joiner may take nothing; it reads whenever it waits for an answer


def _proof(token: bytes, rank: int) -> bytes:
    """Returns a server's answer to a greeting, which nobody can give without the token."""
    return hmac.digest(token, b"sparsecomm server" + struct.pack("<I", rank), "sha256")


class TCPMailbox(Mailbox):
    """The mailbox of a joiner, connected to the `ListeningMailbox` of each server. It reaches servers only.

    Args:
        rank: The joiner's rank.
        size: Number of ranks at the start of the job.
        servers: Host, port and token of each server, by rank. A server that cannot be reached counts as dead.
        timeout: Seconds to wait for a connection.

    Raises:
        TransportError: if no server can be reached. The message says why.
    """

    fault_tolerant = True

    def __init__(self, rank: int, size: int, servers: Mapping[int, tuple[str, int, bytes]], timeout: float) -> None:
        self.rank = rank
        self.size = size
        self.traffic = Traffic()
        self._servers = Connections(self.traffic)
        failures = []
        for server, (host, port, token) in servers.items():
            try:
                sock = socket.create_connection((host, port), timeout)
                sock.sendall(_GREETING.pack(token, rank, size))
                self._servers.by_rank[server] = Connection(sock, _proof(token, rank))
            except OSError as error:
                failures.append(f"rank {server} at {host}:{port}: {error}")
                self._servers.lost |= {server}
        if not self._servers.by_rank:
            raise TransportError(f"no server answers; has the job ended? {'; '.join(failures)}")

    def answered(self) -> int:
        """Returns the number of servers that have proven that they belong to the job. Makes progress."""
        return sum(connection.prove() for connection in self._servers.by_rank.values())

    @override
    def send(self, dest: int, message: torch.Tensor) -> None:
        self._servers.send(dest, message)

    @override
    def receive(self) -> tuple[int, torch.Tensor] | None:
        self._servers.flushed()
        return self._servers.receive()

    @override
    def lost(self) -> frozenset[int]:
        return self._servers.drop_closed()

    @override
    def flushed(self) -> bool:
        return self._servers.flushed()

    def close(self) -> None:
        """Closes the connections to all servers."""
        self._servers.close()


class ListeningMailbox(Mailbox):
    """The mailbox of a server that listens for joiners. It reaches the launched ranks and the joiners.

    Args:
        inner: Mailbox that reaches the launched ranks.
        host: Address to listen at.
        token: Secret that a joiner must present.

    Attributes:
        address: Host and port at which the mailbox listens.
    """

    def __init__(self, inner: Mailbox, host: str, token: bytes) -> None:
        self.rank = inner.rank
        self.size = inner.size
        self.fault_tolerant = inner.fault_tolerant
        self.traffic = inner.traffic
        self._inner = inner
        self._token = token
        self._joiners = Connections(inner.traffic)
        self._greeting: list[tuple[float, Connection]] = []
        self._most_open = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)  # leaves files for checkpoints
        self._listener = socket.create_server((host, 0))
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]

    @override
    def send(self, dest: int, message: torch.Tensor) -> None:
        if dest < self.size:
            self._inner.send(dest, message)
        else:
            self._joiners.send(dest, message)

    @override
    def receive(self) -> tuple[int, torch.Tensor] | None:
        arrived = self._inner.receive()
        if arrived is None:
            self._accept()
            self._joiners.flushed()
            arrived = self._joiners.receive()
        return arrived

    @override
    def lost(self) -> frozenset[int]:
        return self._inner.lost() | self._joiners.drop_closed()

    @override
    def flushed(self) -> bool:
        joiners = self._joiners.flushed()
        return self._inner.flushed() and joiners

    def close(self) -> None:
        """Stops listening and closes the connections to all joiners."""
        self._listener.close()
        for _, connection in self._greeting:
            connection.close()
        self._joiners.close()

    def _accept(self) -> None:
        """Accepts a new connection, and admits the joiners whose greeting has arrived."""
        now = monotonic()
        with contextlib.suppress(OSError):
            self._greeting.append((now, Connection(self._listener.accept()[0], patience=_STALLED)))
        waiting, self._greeting = self._greeting, []
        surplus = len(waiting) - _MOST_GREETING
        for number, (since, connection) in enumerate(waiting):
            greeting = connection.receive_bytes(_GREETING.size)
            if greeting is not None:
                self._admit(connection, *_GREETING.unpack(_view(greeting)))
            elif number < surplus or now - since > _GREETING_SECONDS:
                connection.close()
            elif not connection.closed:
                self._greeting.append((since, connection))

    def _admit(self, connection: Connection, token: bytes, rank: int, size: int) -> None:
        """Admits a joiner. Closes the connection if it belongs to another job or its rank was in use before."""
        fresh = self.size <= rank < self.size + MOST_JOINERS
        fresh = fresh and rank not in self._joiners.by_rank and rank not in self._joiners.lost
        right = size == self.size and hmac.compare_digest(token, self._token)
        if fresh and right and len(self._joiners.by_rank) < self._most_open:
            connection.send_bytes(_proof(self._token, rank))
            self._joiners.by_rank[rank] = connection
        else:
            connection.close()


def _view(data: torch.Tensor) -> Any:
    return data.numpy()
