"""Frames on TCP sockets that never block. A frame is a length (8 bytes, little-endian) and a message.

The other side is not trusted: memory grows with the bytes that have come and not with the length that was announced. A
side that does not take its answers is not listened to, and in the end dropped.
"""

from __future__ import annotations

import hmac
import math
import socket
import struct
from collections import deque
from collections.abc import Iterator
from time import monotonic
from typing import Any

import torch

from sparsecomm.errors import TransportError
from sparsecomm.transport.base import Traffic

__all__ = ["Connection", "Connections"]

_LENGTH = struct.Struct("<Q")
_MAX_BYTES = 1 << 30  # of a message, as over MPI
_FIRST = 1 << 16  # bytes of memory for a frame of which nothing has come yet
_UNREAD = 1 << 20  # bytes that wait to leave, beyond which nothing is read


class Connection:
    """Frames on one socket.

    Args:
        sock: The socket. It belongs to the connection from now on.
        proof: Bytes that must come before the first frame; otherwise the connection is closed.
        patience: Seconds in which the other side may take nothing, before the connection is closed.

    Attributes:
        closed: Whether the connection is closed: by either side, because the proof was wrong or a frame too long, or
            because the other side took nothing for too long.
        proven: Whether the proof has come.
    """

    def __init__(self, sock: socket.socket, proof: bytes = b"", patience: float = math.inf) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.closed = False
        self.proven = not proof
        self._proof = proof
        self._patience = patience
        self._sock = sock
        self._out: deque[memoryview] = deque()
        self._unsent = 0
        self._moved = monotonic()
        self._frame, self._length = _buffer(_LENGTH.size), _LENGTH.size
        self._filled = 0
        self._in_body = False

    def send(self, message: torch.Tensor) -> None:
        """Queues a message as a frame and sends as much as the socket takes."""
        self.send_bytes(_LENGTH.pack(message.numel()))
        self.send_bytes(_bytes(message))

    def send_bytes(self, data: Any) -> None:
        """Queues bytes without a frame and sends as much as the socket takes."""
        if not self._out:
            self._moved = monotonic()
        self._out.append(memoryview(data))
        self._unsent += len(data)
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
                self._unsent -= sent
                self._moved = monotonic()
        except BlockingIOError:
            if monotonic() - self._moved > self._patience:
                self.close()
            return self.closed
        except OSError:
            self.close()
        return True

    def prove(self) -> bool:
        """Reads the proof if it has come. Returns whether it has."""
        if not self.proven and (proof := self.receive_bytes(len(self._proof))) is not None:
            self.proven = hmac.compare_digest(bytes(proof.numpy()), self._proof)
            if not self.proven:
                self.close()
        return self.proven

    def receive(self) -> torch.Tensor | None:
        """Returns the next message if all of it has arrived, else None."""
        return self._next() if self.prove() else None

    def receive_bytes(self, nbytes: int) -> torch.Tensor | None:
        """Returns the next `nbytes` bytes, which have no frame, if all of them have arrived, else None."""
        if not self._in_body:
            self._begin(nbytes, in_body=True)
        return self._next()

    def _next(self) -> torch.Tensor | None:
        if self._unsent > _UNREAD:
            return None
        while not self.closed and self._fill():
            whole = self._frame
            if self._in_body:
                self._begin(_LENGTH.size, in_body=False)
                return whole
            (length,) = _LENGTH.unpack(_bytes(whole))
            if length > _MAX_BYTES:
                self.close()
            else:
                self._begin(length, in_body=True)
        return None

    def _begin(self, length: int, *, in_body: bool) -> None:
        self._frame, self._length = _buffer(min(length, _FIRST)), length
        self._filled, self._in_body = 0, in_body

    def _fill(self) -> bool:
        """Reads into the frame. Returns whether the frame is full."""
        while self._filled < self._length:
            if self._filled == self._frame.numel():
                larger = _buffer(min(self._length, 2 * self._filled))
                larger[: self._filled] = self._frame
                self._frame = larger
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
        self._unsent = 0
        self._sock.close()


def _bytes(message: torch.Tensor) -> Any:
    return message.numpy()


def _buffer(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


class Connections:
    """Open connections, and the ranks that have closed theirs.

    Args:
        traffic: Counts messages and bytes. Mutated.

    Attributes:
        by_rank: Open connections, by rank.
        lost: Ranks whose connections are closed.
    """

    def __init__(self, traffic: Traffic) -> None:
        self.by_rank: dict[int, Connection] = {}
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
        if gone:
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
