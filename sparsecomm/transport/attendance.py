"""Which ranks still take part: finds out why a collective does not end, and makes the error that says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from sparsecomm.errors import CommTimeout, RankLeft, TransportError
from sparsecomm.transport.base import Request, Transport, is_over
from sparsecomm.transport.notes import Note, NoteKind, late_ranks, listed
from sparsecomm.transport.task import Outside, Running

__all__ = ["LISTEN", "Attendance"]

LISTEN = 0.25
"""Most seconds between two looks for notes, while collectives are in flight."""
_GRACE = 1.0  # seconds for what a rank sent before it ended, and for others to answer when a collective is overdue
_OUTSIDE_GRACE = 5.0  # the same for a sum outside of the engine, of which is not known what it still waits for
_STALE = 30.0  # seconds after which a rank no longer waits in what it called overdue: that has failed there
_PAUSE = 0.02  # seconds between two looks of a thread that can do nothing else


InFlight = Running | Outside


class Attendance:
    """What the other ranks have said of themselves. Used by the engine's thread alone.

    Args:
        transport: The transport, which carries the notes.
        timeout: Seconds that a collective may take.

    Attributes:
        outside: Collectives outside of the engine. Any thread may add one, and remove it.
    """

    def __init__(self, transport: Transport, timeout: float) -> None:
        self._transport = transport
        self._timeout = timeout
        self.outside: dict[Outside, None] = {}
        self._notes: dict[int, Note] = {}
        self._heard: dict[int, float] = {}  # time at which each note was heard
        # The first collective that is overdue, what was said of it, and until when others may answer.
        self._overdue: tuple[InFlight, Note, float] | None = None

    def check(self, flying: Iterable[Running], now: float) -> tuple[InFlight, TransportError | CommTimeout] | None:
        """Returns a collective that cannot end, with the error that says why. None while there is hope for all.

        Args:
            flying: The engine's collectives in flight.
            now: Time, on the clock of `time.monotonic`.
        """
        running: list[InFlight] = [*flying, *list(self.outside)]
        self._listen(now)
        for one in running:
            note = self._missing(one, now)
            if note is not None:
                return one, self._has_left(one, note)
        late = next((one for one in running if now > one.deadline), None)
        if late is None:
            return None
        if self._overdue is None or self._overdue[0] is not late:
            self._overdue = (late, self._say_overdue(late), now + min(_GRACE, self._timeout))
        _, mine, until = self._overdue
        if now < until and self._unheard(mine):
            return None
        return late, self._timed_out(late, mine)

    def explain(self, running: Running, error: BaseException) -> BaseException:
        """Returns the error to report for a transport's error: that a rank has left, if one has said so.

        A connection breaks just when a rank leaves, so this waits up to a second for its note.
        """
        if not isinstance(error, (TransportError, CommTimeout)):
            return error
        if isinstance(error, CommTimeout):  # of a transport whose requests cannot be polled
            mine = self._say_overdue(running)
            self._await_notes(lambda: not self._unheard(mine))
            note = self._missing(running, float("inf"))
            return self._timed_out(running, mine) if note is None else self._has_left(running, note)
        peers = [request.peer for request in list(running.waiting)[:1] if request.peer is not None]  # of the failed one
        peers += self._peers(running)

        def gone() -> list[Note]:  # any rank, if the transport failed before it could wait for one
            return [note for rank, note in self._notes.items() if note.left and (not peers or rank in peers)]

        self._await_notes(lambda: bool(gone()))
        note = next(iter(gone()), None)
        if note is None:
            return error
        left = self._has_left(running, note)
        left.__cause__ = error
        return left

    def excuse(self, flying: Iterable[Running], away: float) -> None:
        """Moves the deadlines of all collectives by the seconds for which this process was stopped."""
        running: list[InFlight] = [*flying, *list(self.outside)]
        for one in running:
            one.deadline += away

    def _listen(self, now: float) -> None:
        """Takes the notes that have arrived, and drops what is no longer true."""
        for rank in [r for r, note in self._notes.items() if not note.left and now - self._heard[r] > _STALE]:
            del self._notes[rank]
        for note in self._transport.notes():
            known = self._notes.get(note.rank)
            if known is None or not known.left:
                self._notes[note.rank] = note
                self._heard[note.rank] = now

    def _unheard(self, mine: Note) -> set[int]:
        """Returns the ranks that keep an overdue collective waiting and have said nothing."""
        return late_ranks(mine, self._notes) - self._notes.keys()

    def _await_notes(self, enough: Callable[[], bool]) -> None:
        """Waits up to a second until there are enough notes."""
        until = time.monotonic() + _GRACE
        while not enough() and time.monotonic() < until:
            self._listen(time.monotonic())
            time.sleep(_PAUSE)

    def _missing(self, running: InFlight, now: float) -> Note | None:
        """Returns the note of a rank that has left and without which the collective cannot end.

        A rank that has ended without an error has sent all that it owed to the collectives that it took part in.
        """
        for rank, note in self._notes.items():
            failed, ranks = note.kind is NoteKind.FAILED, running.ranks
            grace = _OUTSIDE_GRACE if isinstance(running, Outside) else _GRACE
            if not note.left or now - self._heard[rank] < (LISTEN if failed else grace):
                continue
            if failed and (ranks is None or rank in ranks):
                return note
            if rank in self._peers(running):
                return note
        return None

    @staticmethod
    def _has_left(running: InFlight, note: Note) -> RankLeft:
        hint = ""
        if note.kind is NoteKind.ENDED:
            hint = ", and this rank goes on: ranks with uneven inputs need DDP's Join (docs/ddp-modes.md)"
        text = f"{running.label}: rank {note.rank} has left: {note.text}{hint}"
        return RankLeft(text, rank=note.rank, failed=note.kind is NoteKind.FAILED)

    def _say_overdue(self, running: InFlight) -> Note:
        """Tells the others that a collective takes too long and for whom this rank waits. Returns the note."""
        awaits = tuple(sorted(set(self._peers(running))))
        note = Note(self._transport.rank, NoteKind.OVERDUE, running.label, awaits)
        self._transport.tell(note)
        return note

    def _timed_out(self, running: InFlight, mine: Note) -> CommTimeout:
        waiting = [request.describe() for request in self._incomplete(running)]
        late = late_ranks(mine, self._notes)
        if late:
            blame = f"late: {listed(late)}"
            others = [self._notes[r] for r in sorted(late) if r in self._notes and not self._notes[r].left]
            blame += "".join(f"; rank {n.rank} waits in {n.text} instead" for n in others[:4])
        else:
            blame = "all ranks wait in it, so messages between them are lost (is a link down?)"
        stuck = f"; this rank still waits for: {', '.join(waiting)}" if waiting else ""
        own = running.task.timeout if isinstance(running, Running) else None
        limit = f"the timeout of {own:g} s" if own else f"{self._timeout:g} s"
        hint = "" if own else ". (SPARSECOMM_TIMEOUT sets the limit in seconds)"
        return CommTimeout(
            f"rank {self._transport.rank}: {running.label} did not finish within {limit}; {blame}{stuck}{hint}"
        )

    def _incomplete(self, running: InFlight) -> list[Request]:
        """Returns the requests that are incomplete, as far as this transport can tell without waiting."""
        if isinstance(running, Outside):
            return []
        return [r for r in running.waiting if self._transport.blocking or not is_over(r)]

    def _peers(self, running: InFlight) -> list[int]:
        """Returns the world ranks that the collective's incomplete requests wait for; outside the engine all others."""
        if isinstance(running, Outside):
            ranks = range(self._transport.size) if running.ranks is None else running.ranks
            return [rank for rank in ranks if rank != self._transport.rank]
        return [r.peer for r in self._incomplete(running) if r.peer is not None]
