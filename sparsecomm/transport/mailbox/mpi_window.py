"""Windows over MPI. Other ranks read them by one-sided Get, without this rank's help."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import override

from sparsecomm.errors import TransportError
from sparsecomm.transport.mailbox.window import Get, Window
from sparsecomm.transport.mpi import import_mpi

__all__ = ["MPIWindow"]


class MPIWindow(Window):
    """A `Window` over COMM_WORLD. Construction and `close` are collective.

    Args:
        nbytes: Bytes of this rank's memory; 0 if other ranks read nothing here.

    Raises:
        TransportError: if MPI cannot make the window, or if remote reads would see a private copy of the memory.
    """

    def __init__(self, nbytes: int) -> None:
        MPI = import_mpi()
        self.MPI = MPI
        try:
            self._win = MPI.Win.Allocate(nbytes, 1, comm=MPI.COMM_WORLD)
        except MPI.Exception as error:
            raise TransportError(f"a window of {nbytes} bytes cannot be made: {error}") from error
        if self._win.Get_attr(MPI.WIN_MODEL) != MPI.WIN_UNIFIED:
            raise TransportError("this MPI's windows are not in the unified memory model")
        self._win.Set_errhandler(MPI.ERRORS_RETURN)
        self._win.Lock_all(MPI.MODE_NOCHECK)
        memory: Any = self._win.tomemory()
        self.memory = torch.frombuffer(memory, dtype=torch.uint8) if nbytes else torch.empty(0, dtype=torch.uint8)

    @override
    def get(self, rank: int, offset: int, out: torch.Tensor) -> MPIGet:
        view = self.MPI.buffer.fromaddress(out.data_ptr(), out.nbytes)
        try:
            request = self._win.Rget([view, self.MPI.BYTE], rank, offset)
        except self.MPI.Exception as error:
            raise TransportError(f"a get of {out.nbytes} bytes from rank {rank} failed: {error}") from error
        return MPIGet(request, out, rank)

    @override
    def sync(self) -> None:
        self._win.Sync()

    def close(self) -> None:
        """Releases the memory. Collective."""
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._win.Unlock_all()
        self._win.Free()


class MPIGet(Get):
    """A Get in progress. It keeps its destination alive."""

    def __init__(self, request: Any, out: torch.Tensor, rank: int) -> None:
        self._request = request
        self._out = out
        self._rank = rank

    @override
    def test(self) -> bool:
        try:
            return bool(self._request.Test())
        except import_mpi().Exception as error:
            raise TransportError(f"a get of {self._out.nbytes} bytes from rank {self._rank} failed: {error}") from error
