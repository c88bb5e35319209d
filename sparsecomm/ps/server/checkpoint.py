"""The options of checkpoints, and the beginning of a job: which run it trains, and which version it resumes."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparsecomm.errors import ConfigError, StateError
from sparsecomm.ps.server.saved import Attempt, SavedVersion
from sparsecomm.ps.server.versions import Listing, overwrite, sweep

__all__ = ["Beginning", "Checkpoints"]

_EXISTING = ("refuse", "overwrite")


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """How a job begins, alike on all of its servers.

    Attributes:
        attempt: The job as an attempt at its run.
        source: The version that it resumes; None for a new run.
    """

    attempt: Attempt
    source: SavedVersion | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where and how often servers save their shards, and how a job begins.

    A version is complete when the files of all shards are there. Each file holds a shard's parameters after exactly
    that many updates, and the state of its optimizer; it names the run and the job that has written it, and has
    checksums of all its bytes. The workers' residuals are not saved. A checkpoint that cannot be written, for instance
    on a full disk, is an event of the server (printed on stderr), and training goes on.

    A new run does not begin in a folder that holds checkpoints: StateError, unless `existing` is "overwrite". With
    `resume`, a job goes on from the newest version that is complete and undamaged, and tells of every newer one why it
    is not. If the folder holds checkpoints but no such version, that is a StateError. If it holds none, a new run
    begins, so that a script that may be started again at any time can always set `resume`.

    Attributes:
        folder: Folder that all servers can write to, for one run.
        every: Updates between two checkpoints; 0 saves none.
        keep: Number of complete versions of this run to keep.
        resume: Whether to resume the run in the folder.
        existing: What a new run does with checkpoints in the folder, all of which are of other runs: "refuse" them, or
            "overwrite": remove them when it begins.
    """

    folder: str | Path
    every: int = 0
    keep: int = 2
    resume: bool = False
    existing: str = "refuse"

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("keep", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"Checkpoints.{name} must be a whole number >= {least}, got {value!r}")
        if not isinstance(self.folder, (str, Path)) or not str(self.folder):
            raise ConfigError(f"Checkpoints.folder must be a path, got {self.folder!r}")
        if not isinstance(self.resume, bool):
            raise ConfigError(f"Checkpoints.resume must be True or False, got {self.resume!r}")
        if self.existing not in _EXISTING:
            raise ConfigError(f"Checkpoints.existing must be one of {', '.join(_EXISTING)}, got {self.existing!r}")
        if self.resume and self.existing == "overwrite":
            raise ConfigError('Checkpoints: resume=True goes on from the checkpoints that existing="overwrite" removes')

    def begin(self, tell: Callable[[str], None]) -> Beginning:
        """Decides how a job begins, for all its servers. Reads whole files, and may remove some.

        Args:
            tell: Called with each event.

        Raises:
            StateError: If the folder's checkpoints forbid a new run, or none of them can be resumed.
        """
        folder = Path(self.folder)
        begins = Beginning(attempt=Attempt(_new_id(), 0, _new_id()))
        if not self.resume and not self.every:
            return begins
        try:
            listing = Listing.of(folder)
            if self.resume:
                begins = self._resumed(listing, tell)
            elif listing.saved or listing.bad:
                self._make_room(listing, tell)
            sweep(folder)
        except OSError as error:
            if self.resume or self.existing == "overwrite":
                raise StateError(f"the checkpoints in {folder} cannot be read or removed: {error}") from error
            tell(f"cannot look for checkpoints of other runs in {folder}: {error}")
        return begins

    def _resumed(self, listing: Listing, tell: Callable[[str], None]) -> Beginning:
        if not listing.saved and not listing.bad:
            tell(f"resume=True: {listing.folder} holds no checkpoint; a new run begins")
            return Beginning(attempt=Attempt(_new_id(), 0, _new_id()))
        source, reasons = listing.newest_whole()
        for reason in reasons:
            tell(f"cannot resume from it: {reason}")
        run = source.attempt.run
        tell(f"resuming version {source.version} of run {run} from {listing.folder}")
        last = max(s.attempt.number for s in listing.saved if s.attempt.run == run)
        return Beginning(attempt=Attempt(run, last + 1, _new_id()), source=source)

    def _make_room(self, listing: Listing, tell: Callable[[str], None]) -> None:
        found = ", ".join(sorted({f"run {s.attempt.run} up to version {_last(listing, s)}" for s in listing.saved}))
        found = found or next(iter(listing.bad.values()))
        if self.existing == "refuse":
            raise StateError(
                f"{listing.folder} holds checkpoints of another run ({found}): resume=True goes on with it, "
                'existing="overwrite" removes it; or take another folder'
            )
        overwrite(listing)
        tell(f"removed the checkpoints of other runs in {listing.folder}: {found}")


def _last(listing: Listing, saved: SavedVersion) -> int:
    return max(s.version for s in listing.saved if s.attempt.run == saved.attempt.run)


def _new_id() -> str:
    return secrets.token_hex(8)
