"""Notes: what a rank says of itself outside of any collective, to ranks that may wait for it.

A rank that leaves says so, and so does one whose collective takes too long. A rank that waits reads the notes of the
others, so that its error names the rank that is really missing, and why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum

from sparsecomm.errors import WireError

__all__ = ["NOTE_BYTES", "Note", "NoteKind", "late_ranks", "listed"]

NOTE_BYTES = 4096
"""Most bytes of an encoded note."""
_TEXT = 600  # most characters of a text; fewer if they take more than 6 bytes each
_AWAITED = 16  # most ranks that a note names
_MALFORMED = "is no note"


class NoteKind(str, Enum):
    """What a note means."""

    ENDED = "ended"
    """The rank has ended without an error. What it has sent before still counts."""
    FAILED = "failed"
    """The rank has failed, and the job cannot go on."""
    OVERDUE = "overdue"
    """The rank waits in a collective that takes longer than the timeout."""


@dataclass(frozen=True, slots=True)
class Note:
    """What one rank says of itself.

    Attributes:
        rank: World rank that says it.
        kind: What it means.
        text: How the rank left, or the label of the collective that is overdue.
        awaits: World ranks that it waits for, in an overdue collective.
    """

    rank: int
    kind: NoteKind
    text: str
    awaits: tuple[int, ...] = ()

    @property
    def left(self) -> bool:
        """Whether the rank takes part no more."""
        return self.kind is not NoteKind.OVERDUE

    def encode(self) -> bytes:
        """Returns the note as at most `NOTE_BYTES` bytes of JSON. Cuts a text that is too long."""
        text, fields = self.text[:_TEXT], asdict(self) | {"awaits": self.awaits[:_AWAITED]}
        data = json.dumps(fields | {"text": text}).encode()
        while len(data) > NOTE_BYTES:
            text = text[: len(text) * 3 // 4]
            data = json.dumps(fields | {"text": text}).encode()
        return data

    @classmethod
    def decode(cls, data: bytes) -> Note:
        """Returns the note that `encode` wrote.

        Raises:
            WireError: if the bytes are no note.
        """
        try:
            fields = json.loads(data)
            rank, text, awaits = fields["rank"], fields["text"], tuple(fields["awaits"])
            kind = NoteKind(fields["kind"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise WireError("note", data[:40], _MALFORMED) from error
        if not isinstance(text, str) or not all(type(number) is int for number in (rank, *awaits)):
            raise WireError("note", data[:40], _MALFORMED)
        return cls(rank, kind, text, awaits)


def late_ranks(mine: Note, notes: Mapping[int, Note]) -> set[int]:
    """Returns the ranks that really keep an overdue collective waiting.

    A rank that waits in the same collective is not to blame. The ranks that it waits for may be.

    Args:
        mine: This rank's own note on the collective.
        notes: The newest note of every other rank that has said anything.

    Returns:
        World ranks; empty if all ranks that are waited for wait for each other.
    """
    late: set[int] = set()
    seen = {mine.rank}
    ahead = list(mine.awaits)
    while ahead:
        rank = ahead.pop()
        if rank in seen:
            continue
        seen.add(rank)
        note = notes.get(rank)
        if note is not None and note.kind is NoteKind.OVERDUE and note.text == mine.text:
            ahead += note.awaits
        else:
            late.add(rank)
    return late


def listed(ranks: Iterable[int]) -> str:
    """Returns "rank 1" or "ranks 1, 2, 3"; of many ranks, the first ones and their number."""
    ordered = sorted(ranks)
    text = ", ".join(map(str, ordered[:_AWAITED]))
    if len(ordered) > _AWAITED:
        text += f" and {len(ordered) - _AWAITED} more"
    return f"rank{'s' if len(ordered) != 1 else ''} {text}"
