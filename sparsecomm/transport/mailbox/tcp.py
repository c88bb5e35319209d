"""Mailboxes over TCP, for ranks that join after the launch. MPI reaches only the ranks that it has started.

A joiner connects to each server. A rank that closes its connection counts as dead. A frame is a length (8 bytes,
little-endian) and a message.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from typing_extensions import override

from sparsecomm.errors import TransportError
from sparsecomm.transport.base import Traffic
from sparsecomm.transport.mailbox.base import Mailbox

__all__ = ["TOKEN_BYTES", "ListeningMailbox", "TCPMailbox"]

TOKEN_BYTES = 16
_GREETING = struct.Struct(f"<{TOKEN_BYTES}sII")  # token, rank of the joiner, number of ranks at the start
_LENGTH = struct.Struct("<Q")
_MAX_BYTES = 1 << 30  # of a message, as over MPI


class _Connection:
    """Frames on one socket, which never blocks.

    Attributes:
        closed: Whether the connection is closed, by either side or because a frame was too long.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.closed = False
        self._sock = sock
        self._out: deque[memoryview] = deque()
        self._frame = _buffer(_LENGTH.size)
        self._filled = 0
        self._in_body = False

    def send(self, message: torch.Tensor) -> None:
        """Queues a message and sends as much as the socket takes."""
        self._out += [memoryview(_LENGTH.pack(message.numel())), memoryview(_bytes(message))]
        self.flush()

    def flush(self) -> bool:
        """Sends as much as the socket takes. Returns whether nothing is left to send."""
        try:
            while self._out and not self.closed:
                rest = self._out.popleft()
                sent = 0
                try:
                    sent = self._sock.send(rest) if rest else 0
                finally:
                    if sent < len(rest):
                        self._out.appendleft(rest[sent:])
        except BlockingIOError:
            return False
        except OSError:
            self.close()
        return True

    def receive(self, expected: int | None = None) -> torch.Tensor | None:
        """Returns the next message if all of it has arrived, else None.

        Args:
            expected: Length of the message in bytes, if no length precedes it.
        """
        if expected is not None and not self._in_body:
            self._frame, self._in_body = _buffer(expected), True
        while not self.closed and self._fill():
            whole, self._filled = self._frame, 0
            if self._in_body:
                self._frame, self._in_body = _buffer(_LENGTH.size), False
                return whole
            (length,) = _LENGTH.unpack(_bytes(whole))
            if length > _MAX_BYTES:
                self.close()
            else:
                self._frame, self._in_body = _buffer(length), True
        return None

    def _fill(self) -> bool:
        """Reads into the frame. Returns whether the frame is full."""
        while self._filled < self._frame.numel():
            try:
                got = self._sock.recv_into(memoryview(_bytes(self._frame))[self._filled :])
            except BlockingIOError:
                return False
            except OSError:
                got = 0
            if not got:
                self.close()
                return False
            self._filled += got
        return True

    def close(self) -> None:
        """Closes the socket and drops the messages that have not left."""
        self.closed = True
        self._out.clear()
        self._sock.close()


def _bytes(message: torch.Tensor) -> Any:
    return message.numpy()


def _buffer(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


class _Connections:
    """Open connections, and the ranks that have closed theirs.

    Attributes:
        by_rank: Open connections, by rank.
        lost: Ranks whose connections are closed.
    """

    def __init__(self, traffic: Traffic) -> None:
        self.by_rank: dict[int, _Connection] = {}
        self.lost: frozenset[int] = frozenset()
        self._traffic = traffic
        self._turn: Iterator[int] = iter(())

    def send(self, dest: int, message: torch.Tensor) -> None:
        """Sends to a connected rank. Does nothing for any other rank."""
        if message.numel() > _MAX_BYTES:
            raise TransportError(f"a message of {message.numel()} bytes to rank {dest}: at most {_MAX_BYTES}")
        if dest in self.by_rank:
            self.by_rank[dest].send(message)
            self._traffic.messages_sent += 1
            self._traffic.bytes_sent += message.numel()

    def receive(self) -> tuple[int, torch.Tensor] | None:
        """Returns the next message and its sender, or None. The ranks take turns."""
        for rank in (*self._turn, *self.by_rank):
            connection = self.by_rank.get(rank)
            message = None if connection is None else connection.receive()
            if message is not None:
                later = list(self.by_rank)
                self._turn = iter(later[later.index(rank) + 1 :])
                self._traffic.messages_received += 1
                self._traffic.bytes_received += message.numel()
                return rank, message
        return None

    def drop_closed(self) -> frozenset[int]:
        """Drops connections that are closed. Returns all ranks whose connections were ever dropped."""
        gone = [rank for rank, connection in self.by_rank.items() if connection.closed]
        for rank in gone:
            del self.by_rank[rank]
        self.lost |= frozenset(gone)
        return self.lost

    def flushed(self) -> bool:
        """Sends on every connection. Returns whether nothing is left to send."""
        done = [connection.flush() for connection in self.by_rank.values()]
        return all(done)

    def close(self) -> None:
        """Closes all connections."""
        for connection in self.by_rank.values():
            connection.close()


class TCPMailbox(Mailbox):
    """The mailbox of a joiner, connected to the `ListeningMailbox` of each server. It reaches servers only.

    Args:
        rank: The joiner's rank.
        size: Number of ranks at the start of the job.
        servers: Host, port and token of each server, by rank. A server that does not answer counts as dead.
        timeout: Seconds to wait for a connection.

    Raises:
        TransportError: if no server answers. The message says why.
    """

    fault_tolerant = True

    def __init__(self, rank: int, size: int, servers: Mapping[int, tuple[str, int, bytes]], timeout: float) -> None:
        self.rank = rank
        self.size = size
        self.traffic = Traffic()
        self._servers = _Connections(self.traffic)
        failures = []
        for server, (host, port, token) in servers.items():
            try:
                sock = socket.create_connection((host, port), timeout)
                sock.sendall(_GREETING.pack(token, rank, size))
                self._servers.by_rank[server] = _Connection(sock)
            except OSError as error:
                failures.append(f"rank {server} at {host}:{port}: {error}")
                self._servers.lost |= {server}
        if not self._servers.by_rank:
            raise TransportError(f"no server answers; has the job ended? {'; '.join(failures)}")

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
        self._joiners = _Connections(inner.traffic)
        self._greeting: list[_Connection] = []
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
        for connection in self._greeting:
            connection.close()
        self._joiners.close()

    def _accept(self) -> None:
        """Accepts a new connection, and admits the joiners whose greeting has arrived."""
        with contextlib.suppress(OSError):
            self._greeting.append(_Connection(self._listener.accept()[0]))
        waiting, self._greeting = self._greeting, []
        for connection in waiting:
            greeting = connection.receive(_GREETING.size)
            if greeting is not None:
                self._admit(connection, *_GREETING.unpack(_bytes(greeting)))
            elif not connection.closed:
                self._greeting.append(connection)

    def _admit(self, connection: _Connection, token: bytes, rank: int, size: int) -> None:
        """Admits a joiner. Closes the connection if it belongs to another job or its rank was in use before."""
        known = rank < self.size or rank in self._joiners.by_rank or rank in self._joiners.lost
        if known or size != self.size or not hmac.compare_digest(token, self._token):
            connection.close()
        else:
            self._joiners.by_rank[rank] = connection
