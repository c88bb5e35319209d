"""Memory that other ranks read by MPI's one-sided Get, without this rank's doing."""

from __future__ import annotations

from typing import Any

import torch

from sparsecomm.errors import TransportError
from sparsecomm.transport.mpi import import_mpi

__all__ = ["MPIWindow"]


class MPIWindow:
    """See `Window`. Collective over COMM_WORLD: every rank makes one, and closes it.

    Args:
        nbytes: of this rank's own memory; 0 if others have nothing to read here.

    Raises:
        TransportError: if MPI cannot; or its windows have a private copy that remote reads see.
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

    def get(self, rank: int, offset: int, out: torch.Tensor) -> MPIGet:
        """See `Window.get`."""
        view = self.MPI.buffer.fromaddress(out.data_ptr(), out.nbytes)
        try:
            request = self._win.Rget([view, self.MPI.BYTE], rank, offset)
        except self.MPI.Exception as error:
            raise TransportError(f"a get of {out.nbytes} bytes from rank {rank} failed: {error}") from error
        return MPIGet(request, out, rank)

    def sync(self) -> None:
        """See `Window.sync`."""
        self._win.Sync()

    def close(self) -> None:
        """Gives the memory back. Collective."""
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._win.Unlock_all()
        self._win.Free()


class MPIGet:
    """A Get in progress; keeps its destination alive."""

    def __init__(self, request: Any, out: torch.Tensor, rank: int) -> None:
        self._request = request
        self._out = out
        self._rank = rank

    def test(self) -> bool:
        """Returns whether it is complete, letting it progress."""
        try:
            return bool(self._request.Test())
        except import_mpi().Exception as error:
            raise TransportError(f"a get of {self._out.nbytes} bytes from rank {self._rank} failed: {error}") from error
