"""Who has saved what: the facts by which files of checkpoints belong together or do not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sparsecomm.errors import StateError

__all__ = ["Attempt", "Facts", "SavedVersion", "is_count"]

_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Attempt:
    """One job that trains a run. The first one has begun the run, each later one resumes it.

    Attributes:
        run: Id of the run, 16 hexadecimal digits.
        number: 0 for the job that began the run.
        key: Id of the job, 16 hexadecimal digits. Two jobs that resume the same version differ in it.

    Raises:
        StateError: If a value is not possible.
    """

    run: str
    number: int
    key: str

    def __post_init__(self) -> None:
        good = all(isinstance(text, str) and _ID.fullmatch(text) for text in (self.run, self.key))
        if not good or not is_count(self.number):
            raise StateError(f"{[self.run, self.number, self.key]!r} is no attempt at a run")


@dataclass(frozen=True)
class SavedVersion:
    """A version as one job has saved it. Its files, one a shard, belong together; all others are strangers to them.

    Attributes:
        attempt: The job.
        version: Number of updates in it.
        shards: Number of shards.
        model: Hash of the model's layout.

    Raises:
        StateError: If a value is not possible.
    """

    attempt: Attempt
    version: int
    shards: int
    model: str

    def __post_init__(self) -> None:
        if not (is_count(self.version) and is_count(self.shards) and self.shards and isinstance(self.model, str)):
            raise StateError(f"{[self.version, self.shards, self.model]!r} is no version of a model in shards")

    @classmethod
    def of(cls, content: Any) -> SavedVersion:
        """Reads the values of a `SavedVersion` in nested dicts.

        Raises:
            StateError: If they are anything else.
        """
        try:
            return cls(**{**content, "attempt": Attempt(**content["attempt"])})
        except (TypeError, KeyError) as error:
            raise StateError(f"{str(content)[:80]} is no version of a model: {error}") from error


@dataclass(frozen=True)
class Facts:
    """The facts in a file that say which shard of which version it holds.

    Attributes:
        saved: The version.
        index: Index of the shard.
        start: First element of the shard in the model's flat vector.
        end: One past its last element.

    Raises:
        StateError: If a value is not possible.
    """

    saved: SavedVersion
    index: int
    start: int
    end: int

    def __post_init__(self) -> None:
        counts = all(is_count(n) for n in (self.index, self.start, self.end))
        if not counts or self.index >= self.saved.shards or self.start >= self.end:
            raise StateError(f"shard {self.index!r} of {self.saved.shards} cannot be {self.start!r} to {self.end!r}")


def is_count(value: object) -> bool:
    """Returns whether a value is a whole number from 0 to 2**63 - 1."""
    return type(value) is int and 0 <= value < 1 << 63
