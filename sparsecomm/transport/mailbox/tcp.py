"""A mailbox over TCP, for ranks that come after the launch: MPI knows only those that it has started.

A joiner connects to each server; whoever hangs up is dead. Frames are a length (8 bytes, little-endian) and a message.
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

from sparsecomm.errors import TransportError
from sparsecomm.transport.base import Traffic
from sparsecomm.transport.mailbox.base import Mailbox

__all__ = ["TOKEN_BYTES", "OpenMailbox", "TCPMailbox"]

TOKEN_BYTES = 16
_GREETING = struct.Struct(f"<{TOKEN_BYTES}sII")  # token, rank of the joiner, ranks at the start
_LENGTH = struct.Struct("<Q")
_MOST = 1 << 30  # as over MPI


class _Connection:
    """Frames on one socket, which never blocks.

    Attributes:
        closed: whether the other side is gone, or sent what is no frame.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.closed = False
        self._sock = sock
        self._out: deque[memoryview] = deque()
        self._frame = self._memory(_LENGTH.size)
        self._filled = 0
        self._in_body = False

    @staticmethod
    def _memory(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def send(self, message: torch.Tensor) -> None:
        """Queues a message and sends what the socket takes."""
        self._out += [memoryview(_LENGTH.pack(message.numel())), memoryview(_bytes(message))]
        self.flush()

    def flush(self) -> bool:
        """Sends what the socket takes; returns whether all has left."""
        try:
            while self._out and not self.closed:
                left = self._out.popleft()
                sent = 0
                try:
                    sent = self._sock.send(left) if left else 0
                finally:
                    if sent < len(left):
                        self._out.appendleft(left[sent:])
        except BlockingIOError:
            return False
        except OSError:
            self.close()
        return True

    def receive(self, expected: int | None = None) -> torch.Tensor | None:
        """Returns the next message if all of it is here; with `expected`, so many bytes without a length."""
        if expected is not None and not self._in_body:
            self._frame, self._in_body = self._memory(expected), True
        while not self.closed and self._fill():
            whole, self._filled = self._frame, 0
            if self._in_body:
                self._frame, self._in_body = self._memory(_LENGTH.size), False
                return whole
            (length,) = _LENGTH.unpack(_bytes(whole))
            if length > _MOST:
                self.close()
            else:
                self._frame, self._in_body = self._memory(length), True
        return None

    def _fill(self) -> bool:
        """Reads on; returns whether the frame is full."""
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
        """Hangs up."""
        self.closed = True
        self._out.clear()
        self._sock.close()


def _bytes(message: torch.Tensor) -> Any:
    return message.numpy()


class _Connections:
    """Open connections by rank, and who has hung up."""

    def __init__(self, traffic: Traffic) -> None:
        self.by_rank: dict[int, _Connection] = {}
        self.lost: frozenset[int] = frozenset()
        self._traffic = traffic
        self._turn: Iterator[int] = iter(())

    def send(self, dest: int, message: torch.Tensor) -> None:
        """Sends to a living rank; does nothing else."""
        if message.numel() > _MOST:
            raise TransportError(f"a message of {message.numel()} bytes to rank {dest}: at most {_MOST}")
        if dest in self.by_rank:
            self.by_rank[dest].send(message)
            self._traffic.messages_sent += 1
            self._traffic.bytes_sent += message.numel()

    def receive(self) -> tuple[int, torch.Tensor] | None:
        """Returns the next message of anyone, each in turn."""
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

    def bury(self) -> frozenset[int]:
        """Returns who has hung up, ever."""
        gone = [rank for rank, connection in self.by_rank.items() if connection.closed]
        for rank in gone:
            del self.by_rank[rank]
        self.lost |= frozenset(gone)
        return self.lost

    def flushed(self) -> bool:
        """Returns whether everything has left."""
        left = [connection.flush() for connection in self.by_rank.values()]
        return all(left)

    def close(self) -> None:
        """Hangs up on all."""
        for connection in self.by_rank.values():
            connection.close()


class TCPMailbox:
    """A joiner's mailbox, which reaches servers only. See `Mailbox`.

    Args:
        rank: the joiner's.
        size: ranks at the start.
        servers: host, port and token of each server's rank; one that does not answer is dead.
        timeout: seconds to wait for a connection.

    Raises:
        TransportError: if no server answers; says why.
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

    def send(self, dest: int, message: torch.Tensor) -> None:
        """See `Mailbox.send`."""
        self._servers.send(dest, message)

    def receive(self) -> tuple[int, torch.Tensor] | None:
        """See `Mailbox.receive`."""
        self._servers.flushed()
        return self._servers.receive()

    def lost(self) -> frozenset[int]:
        """See `Mailbox.lost`."""
        return self._servers.bury()

    def flushed(self) -> bool:
        """See `Mailbox.flushed`."""
        return self._servers.flushed()

    def close(self) -> None:
        """Hangs up."""
        self._servers.close()


class OpenMailbox:
    """A server's mailbox: another one's, and joiners who know the token. See `Mailbox`.

    Args:
        inner: mailbox of the ranks that were there at the start.
        host: address to listen at.
        token: that joiners must know.

    Attributes:
        address: host and port.
    """

    def __init__(self, inner: Mailbox, host: str, token: bytes) -> None:
        self.rank = inner.rank
        self.size = inner.size
        self.fault_tolerant = inner.fault_tolerant
        self.traffic = inner.traffic
        self._inner = inner
        self._token = token
        self._joiners = _Connections(inner.traffic)
        self._strangers: list[_Connection] = []
        self._door = socket.create_server((host, 0))
        self._door.setblocking(False)
        self.address: tuple[str, int] = self._door.getsockname()[:2]

    def send(self, dest: int, message: torch.Tensor) -> None:
        """See `Mailbox.send`."""
        if dest < self.size:
            self._inner.send(dest, message)
        else:
            self._joiners.send(dest, message)

    def receive(self) -> tuple[int, torch.Tensor] | None:
        """See `Mailbox.receive`."""
        arrived = self._inner.receive()
        if arrived is None:
            self._admit()
            self._joiners.flushed()
            arrived = self._joiners.receive()
        return arrived

    def lost(self) -> frozenset[int]:
        """See `Mailbox.lost`."""
        return self._inner.lost() | self._joiners.bury()

    def flushed(self) -> bool:
        """See `Mailbox.flushed`."""
        joiners = self._joiners.flushed()
        return self._inner.flushed() and joiners

    def close(self) -> None:
        """Lets nobody in any more and hangs up on those who are."""
        self._door.close()
        for stranger in self._strangers:
            stranger.close()
        self._joiners.close()

    def _admit(self) -> None:
        with contextlib.suppress(OSError):
            self._strangers.append(_Connection(self._door.accept()[0]))
        waiting, self._strangers = self._strangers, []
        for stranger in waiting:
            said = stranger.receive(_GREETING.size)
            if said is not None:
                self._greet(stranger, *_GREETING.unpack(_bytes(said)))
            elif not stranger.closed:
                self._strangers.append(stranger)

    def _greet(self, stranger: _Connection, token: bytes, rank: int, size: int) -> None:
        """Takes a joiner in, or hangs up on one that is of another job, or has a rank that was there before."""
        known = rank < self.size or rank in self._joiners.by_rank or rank in self._joiners.lost
        if known or size != self.size or not hmac.compare_digest(token, self._token):
            stranger.close()
        else:
            self._joiners.by_rank[rank] = stranger
