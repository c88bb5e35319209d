"""A transport over torch.distributed's Gloo, for jobs that torchrun launched without MPI."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import zlib
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import override

from sparsecomm.errors import CommTimeout, TransportError
from sparsecomm.transport.base import Request, Transport
from sparsecomm.transport.notes import Note

__all__ = ["GlooTransport"]

_NOTE, _ENDED = "sparsecomm/note/{}", "sparsecomm/ended"  # keys of the store
_COMMON_END = 2.0  # seconds in which a rank may end after the others and still find their notes


class _GlooRequest(Request):
    """A message over Gloo. `test` waits, because a work of Gloo cannot be polled.

    All ranks test the oldest task first, so no task starves.
    """

    __slots__ = ("_description", "_keep", "_timeout", "_work", "peer")

    def __init__(self, work: Any, keep: torch.Tensor, description: str, peer: int, timeout: float) -> None:
        self.peer = peer
        self._work = work
        self._keep = keep
        self._description = description
        self._timeout = timeout

    @override
    def test(self) -> bool:
        if self._work is not None:
            try:
                self._work.wait(timedelta(seconds=self._timeout))
            except RuntimeError as error:
                kind = CommTimeout if "timed out" in str(error).lower() else TransportError
                raise kind(f"{self._description} failed: {error}") from error
            self._work = None
        return True

    @override
    def describe(self) -> str:
        return self._description

    @override
    def cancel(self) -> None:
        pass


def _machine() -> str:
    """Returns a string that identifies this machine. The host name alone does not, since two hosts may share one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (boot.read_text() if boot.exists() else "")


class GlooTransport(Transport):
    """Sends and receives bytes over a Gloo process group that nothing else uses. Construction is collective.

    Args:
        timeout: Seconds that a message may take.
        nodes: Node of every rank. None derives the nodes from the machines' boot ids.
    """

    blocking = True
    name = "gloo"
    max_tag = 2**31 - 1
    one_host = False  # even within a host the bytes travel over TCP

    def __init__(self, timeout: float, nodes: Sequence[int] | None = None) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._timeout = timeout
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.nodes = self._find_nodes() if nodes is None else tuple(nodes)

    def _find_nodes(self) -> tuple[int, ...]:
        """Returns a number for the machine of every rank. Collective."""
        mine = torch.tensor([zlib.crc32(_machine().encode())], dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self._group)
        return tuple(int(node) for node in everyone)

    @override
    def isend(self, data: torch.Tensor, dest: int, tag: int) -> Request:
        description = f"send of {data.numel()} bytes to rank {dest}"
        try:
            work = dist.isend(data, dest, group=self._group, tag=tag)
        except RuntimeError as error:
            raise TransportError(f"{description} failed: {error}") from error
        return _GlooRequest(work, data, description, dest, self._timeout)

    @override
    def irecv(self, buffer: torch.Tensor, source: int, tag: int) -> Request:
        description = f"receive of {buffer.numel()} bytes from rank {source}"
        try:
            work = dist.irecv(buffer, source, group=self._group, tag=tag)
        except RuntimeError as error:
            raise TransportError(f"{description} failed: {error}") from error
        return _GlooRequest(work, buffer, description, source, self._timeout)

    @override
    def world_rank(self, rank: int) -> int:
        return rank

    @override
    def tell(self, note: Note) -> None:
        """Leaves the note in torch.distributed's store. Any thread may call this."""
        with contextlib.suppress(RuntimeError):  # the rank that holds the store has left
            self._store.set(_NOTE.format(note.rank), note.encode())

    @override
    def notes(self) -> Iterable[Note]:
        with contextlib.suppress(RuntimeError):
            keys = [_NOTE.format(rank) for rank in range(self.size) if rank != self.rank]
            return [Note.decode(self._store.get(key)) for key in keys if self._store.check([key])]
        return ()

    @override
    def depart(self, note: Note) -> None:
        """Rank 0 waits for the others for two seconds at most: it may hold the store in which they look for notes."""
        self.tell(note)
        until = time.monotonic() + _COMMON_END
        with contextlib.suppress(RuntimeError):
            ended = self._store.add(_ENDED, 1)
            while self.rank == 0 and ended < self.size and time.monotonic() < until:
                time.sleep(0.02)
                ended = self._store.add(_ENDED, 0)

    @override
    def close(self) -> None:
        """Closes the connections. That wakes ranks that wait for this one."""
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):  # torch.distributed was taken down before
            dist.destroy_process_group(self._group)
        self._group = None

    @override
    def abort(self, code: int) -> None:
        """Ends this process. torchrun then ends the others."""
        os._exit(code)
