"""A transport over torch.distributed's Gloo, for jobs that torchrun launched and MPI knows nothing of."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsecomm.errors import TransportError
from sparsecomm.transport.base import Request

__all__ = ["GlooTransport"]


class _GlooRequest:
    """Gloo's works cannot be polled, so `test` waits. Tasks wait oldest first on all ranks, so none starves."""

    __slots__ = ("_keep", "_timeout", "_what", "_work")

    def __init__(self, work: Any, keep: torch.Tensor, what: str, timeout: float) -> None:
        self._work = work
        self._keep = keep
        self._what = what
        self._timeout = timeout

    def test(self) -> bool:
        if self._work is not None:
            try:
                self._work.wait(timedelta(seconds=self._timeout))
            except RuntimeError as error:
                raise TransportError(f"{self._what} failed: {error}") from error
            self._work = None
        return True

    def describe(self) -> str:
        return self._what

    def cancel(self) -> None:
        pass


def _machine() -> str:
    """Returns what tells machines apart; hosts may bear the same name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (boot.read_text() if boot.exists() else "")


class GlooTransport:
    """Bytes over the send and receive of a Gloo process group of our own. Creating it is collective.

    Args:
        timeout: seconds a message may take.
        nodes: the node of every rank; found by the machines' boot ids if None.
    """

    blocking = True
    name = "gloo"
    max_tag = 2**31 - 1
    one_host = False  # even within a host the bytes travel over TCP

    def __init__(self, timeout: float, nodes: Sequence[int] | None = None) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._timeout = timeout
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.nodes = self._find_nodes() if nodes is None else tuple(nodes)

    def _find_nodes(self) -> tuple[int, ...]:
        """Returns a number of every rank's machine. Collective."""
        mine = torch.tensor([zlib.crc32(_machine().encode())])
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self._group)
        return tuple(int(node) for node in everyone)

    def isend(self, data: torch.Tensor, dest: int, tag: int) -> Request:
        """See `Transport.isend`."""
        what = f"send of {data.numel()} bytes to rank {dest}"
        try:
            work = dist.isend(data, dest, group=self._group, tag=tag)
        except RuntimeError as error:
            raise TransportError(f"{what} failed: {error}") from error
        return _GlooRequest(work, data, what, self._timeout)

    def irecv(self, buffer: torch.Tensor, source: int, tag: int) -> Request:
        """See `Transport.irecv`."""
        what = f"receive of {buffer.numel()} bytes from rank {source}"
        try:
            work = dist.irecv(buffer, source, group=self._group, tag=tag)
        except RuntimeError as error:
            raise TransportError(f"{what} failed: {error}") from error
        return _GlooRequest(work, buffer, what, self._timeout)

    def world_rank(self, rank: int) -> int:
        """See `Transport.world_rank`."""
        return rank

    def close(self) -> None:
        """Left to destroy_process_group."""

    def abort(self, code: int) -> None:
        """Ends this process; torchrun then ends the others."""
        os._exit(code)
