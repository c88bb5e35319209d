"""A mailbox over MPI, by matched probes of any source. It tolerates faults where the launcher offers ULFM."""

from __future__ import annotations

from time import monotonic
from typing import Any

import torch
from typing_extensions import override

from sparsecomm.errors import TransportError
from sparsecomm.transport.base import Traffic
from sparsecomm.transport.mailbox.base import Mailbox
from sparsecomm.transport.mpi import failed_ranks, import_mpi, ulfm_problem

__all__ = ["MPIMailbox"]

_TAKE = 1 << 30  # MPI counts are C ints in most libraries
_LOOK_SECONDS = 0.005  # between two queries for dead ranks; a query costs about as much as a probe


class MPIMailbox(Mailbox):
    """A `Mailbox` over COMM_WORLD. Every rank must create the same number of mailboxes.

    The n-th mailboxes of all ranks exchange messages, told apart from the others by their tag. They share COMM_WORLD
    because making a communicator is collective: a rank that dies during the call would end the other ranks as well.
    """

    _made = 0

    def __init__(self) -> None:
        MPI = import_mpi()
        self.MPI = MPI
        self._comm = MPI.COMM_WORLD
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        MPIMailbox._made += 1
        self._tag = MPIMailbox._made
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self.fault_tolerant = ulfm_problem() is None
        self.traffic = Traffic()
        self._status = MPI.Status()
        self._sending: list[tuple[Any, torch.Tensor, int]] = []
        self._receiving: tuple[Any, torch.Tensor, int] | None = None
        self._lost: frozenset[int] = frozenset()
        self._looked = monotonic()
        self._deaths = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING) if self.fault_tolerant else ()

    @override
    def send(self, dest: int, message: torch.Tensor) -> None:
        if message.numel() > _TAKE:
            raise TransportError(
                f"a message of {message.numel()} bytes to rank {dest}: at most {_TAKE}; use more servers"
            )
        if dest in self._lost:
            return
        try:
            request = self._comm.Isend((self._view(message), self.MPI.BYTE), dest, self._tag)
        except self.MPI.Exception as error:
            self._failed(error, f"send of {message.numel()} bytes to rank {dest}")
            return
        self._sending.append((request, message, dest))
        self.traffic.messages_sent += 1
        self.traffic.bytes_sent += message.numel()

    @override
    def receive(self) -> tuple[int, torch.Tensor] | None:
        self.flushed()
        if self._receiving is None and not self._probe():
            return None
        assert self._receiving is not None
        request, message, source = self._receiving
        try:
            if not request.Test():
                return None
        except self.MPI.Exception as error:
            self._receiving = None
            self._failed(error, f"receive of {message.numel()} bytes from rank {source}")
            return None
        self._receiving = None
        self.traffic.messages_received += 1
        self.traffic.bytes_received += message.numel()
        return source, message

    def _probe(self) -> bool:
        """Starts to receive the next message, if there is one. Returns whether it did."""
        try:
            found = self._comm.Improbe(self.MPI.ANY_SOURCE, self._tag, self._status)
        except self.MPI.Exception as error:
            self._failed(error, "probe")
            return self._probe()  # the death is acknowledged now, and messages may have arrived before it
        if found is None:
            return False
        message = torch.empty(self._status.Get_count(self.MPI.BYTE), dtype=torch.uint8)
        source = self._status.Get_source()
        try:
            self._receiving = (found.Irecv((self._view(message), self.MPI.BYTE)), message, source)
        except self.MPI.Exception as error:
            self._failed(error, f"receive of {message.numel()} bytes from rank {source}")
            return False
        return True

    @override
    def lost(self) -> frozenset[int]:
        if self.fault_tolerant and monotonic() - self._looked > _LOOK_SECONDS:
            self._look()
        return self._lost

    @override
    def flushed(self) -> bool:
        left = []
        for entry in self._sending:
            request, message, dest = entry
            try:
                if not request.Test() and dest not in self._lost:
                    left.append(entry)
            except self.MPI.Exception as error:
                self._failed(error, f"send of {message.numel()} bytes to rank {dest}")
        self._sending = left
        return not left

    def _look(self) -> None:
        """Updates the set of dead ranks. Acknowledges the deaths, so that probes of any source work again."""
        self._looked = monotonic()
        dead = failed_ranks(self._comm)
        if dead - self._lost:
            self._comm.Ack_failed()
            self._lost |= dead

    def _failed(self, error: Any, action: str) -> None:
        """Records the death of a rank. Raises TransportError for any other failure."""
        if error.Get_error_class() not in self._deaths:
            raise TransportError(f"rank {self.rank}: {action} failed: {error}") from error
        self._comm.Ack_failed()
        self._look()

    def _view(self, message: torch.Tensor) -> Any:
        return self.MPI.buffer.fromaddress(message.data_ptr(), message.numel())
