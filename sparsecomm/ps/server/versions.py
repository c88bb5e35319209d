"""A folder of checkpoints: one folder a version, in it one file a shard. Any number of jobs may have written there.

A file is written under another name and renamed, so it is either whole or not there.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from sparsecomm.errors import SparseCommError, StateError
from sparsecomm.ps.protocol.sharding import shard_spans
from sparsecomm.ps.server.saved import Attempt, Facts, SavedVersion
from sparsecomm.ps.server.shard_file import Content, load, read_facts, write

__all__ = ["Listing", "overwrite", "path_of", "prune", "put", "sweep"]

_FOLDER = re.compile(r"version-(\d{9,})")
_FILE = re.compile(r"shard-(\d+)-of-(\d+)\.pt")
_FEW = 4  # reasons in an error
_UNFINISHED = re.compile(r"\.shard-\d+-of-\d+\.pt\.[0-9a-f]{16}")


def path_of(folder: Path, saved: SavedVersion, index: int) -> Path:
    """Returns the path of a shard of a version."""
    return folder / f"version-{saved.version:09d}" / f"shard-{index}-of-{saved.shards}.pt"


@dataclass
class Listing:
    """The content of a folder, by the heads of its files alone.

    Attributes:
        folder: The folder.
        saved: The files of each version, by index of the shard.
        bad: Reason why a file in a version's folder is none of a version, by path; also of such folders themselves.
    """

    folder: Path
    saved: dict[SavedVersion, dict[int, Path]] = field(default_factory=dict)
    bad: dict[Path, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Listing:
        """Lists a folder; one that does not exist is empty.

        Raises:
            OSError: If the folder cannot be listed.
        """
        listing = cls(folder)
        try:
            inside = sorted(p for p in folder.iterdir() if _FOLDER.fullmatch(p.name))
        except FileNotFoundError:
            inside = []
        for each in inside:
            try:
                paths = sorted(p for p in each.iterdir() if _FILE.fullmatch(p.name))
            except FileNotFoundError:
                continue  # another server has just removed this old version
            except OSError as error:
                listing.bad[each] = f"{each} cannot be listed: {error.strerror}"
                continue
            for path in paths:
                listing._add(path)
        return listing

    def _add(self, path: Path) -> None:
        try:
            facts = read_facts(path)
            if path_of(self.folder, facts.saved, facts.index) != path:
                says = f"shard {facts.index} of {facts.saved.shards} at version {facts.saved.version}"
                raise StateError(f"{path} holds {says}: it was copied or renamed")
        except StateError as error:
            self.bad[path] = str(error)
        else:
            self.saved.setdefault(facts.saved, {})[facts.index] = path

    def newest_first(self) -> list[SavedVersion]:
        """Returns the versions, those of later attempts before those of earlier ones."""
        return sorted(self.saved, key=lambda s: (s.attempt.number, s.version, s.attempt.key, s.shards), reverse=True)

    def is_complete(self, saved: SavedVersion) -> bool:
        """Returns whether the files of all shards of a version are there."""
        return len(self.saved[saved]) == saved.shards

    def newest_whole(self) -> tuple[SavedVersion, list[str]]:
        """Returns the newest complete version whose files are undamaged, and the reasons against each newer one.

        Raises:
            StateError: If there is none, or complete versions of two runs, or of two jobs that resumed the same.
        """
        self._check_one_run()
        reasons: list[str] = []
        for saved in self.newest_first():
            problem = self._problem(saved)
            if problem is None:
                return saved, [*self._bad_since(saved.version), *reasons]
            reasons.append(problem)
        reasons = [*reasons, *self.bad.values()]
        more = f"; and {len(reasons) - _FEW} more" if len(reasons) > _FEW else ""
        raise StateError(
            f"{self.folder} has no version that is complete and undamaged; to begin anew take another folder, or "
            f'existing="overwrite". {"; ".join(reasons[:_FEW])}{more}'
        )

    def _problem(self, saved: SavedVersion) -> str | None:
        files = self.saved[saved]
        if not self.is_complete(saved):
            missing = next(i for i in count() if i not in files)
            where = files[min(files)].parent
            return f"{where} is incomplete: job {saved.attempt.key} has saved no shard {missing} of {saved.shards}"
        try:
            found = [load(files[index]).facts for index in range(saved.shards)]
            if [(facts.start, facts.end) for facts in found] != list(shard_spans(found[-1].end, saved.shards)):
                raise StateError(f"{files[0].parent}: its shards are not the parts of one model")
        except SparseCommError as error:
            return str(error)
        return None

    def _bad_since(self, version: int) -> Iterator[str]:
        for path, reason in self.bad.items():
            match = _FOLDER.fullmatch(path.name) or _FOLDER.fullmatch(path.parent.name)
            if match is not None and int(match[1]) >= version:
                yield reason

    def _check_one_run(self) -> None:
        complete = [s for s in self.newest_first() if self.is_complete(s)]
        runs = {s.attempt.run: s.version for s in reversed(complete)}
        if len(runs) > 1:
            found = ", ".join(f"{run} up to version {version}" for run, version in runs.items())
            raise StateError(f"{self.folder} holds checkpoints of several runs: {found}. Move all but one run away")
        jobs = {(s.attempt.number, s.attempt.key) for s in complete}
        if len({number for number, _ in jobs}) < len(jobs):
            found = ", ".join(sorted(key for _, key in jobs))
            raise StateError(
                f"{self.folder}: several jobs have resumed the same version: {found}. Move all but one away"
            )


def put(folder: Path, content: Content) -> None:
    """Writes the file of a shard.

    Args:
        folder: The folder of all versions; made if it is not there.
        content: The content of the file.

    Raises:
        StateError: If the file is there and another run or a later job has written it, or it cannot hold the content.
        OSError: If it cannot be written. Nothing is left of it.
    """
    facts = content.facts
    target = path_of(folder, facts.saved, facts.index)
    _check_may_replace(target, facts.saved.attempt)
    unfinished = folder / f".{target.name}.{facts.saved.attempt.key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            write(file, content)
            file.flush()
            os.fsync(file.fileno())
        target.parent.mkdir(exist_ok=True)
        os.replace(unfinished, target)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other servers have files there
            target.parent.rmdir()
        raise
    for changed in (target.parent, folder):
        _sync(changed)


def _check_may_replace(target: Path, mine: Attempt) -> None:
    if not target.exists():
        return
    try:
        theirs = read_facts(target).saved.attempt
    except StateError:
        return  # a damaged file, of which a job that resumes has told
    if theirs.run != mine.run or theirs.number > mine.number or (theirs.number == mine.number and theirs != mine):
        raise StateError(f"{target} is there, and job {theirs.key} of run {theirs.run} has written it, not this one")


def _sync(folder: Path) -> None:
    """Makes the names in a folder survive a power failure, on file systems that can."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def prune(folder: Path, newest: Facts, keep: int) -> None:
    """Removes a run's files of versions older than its `keep` newest complete ones.

    Args:
        folder: The folder of all versions.
        newest: A file that was just written. Of the files of all shards this removes its share: those of its own
            index, and those of earlier jobs with more shards whose index leaves its own as the remainder.
        keep: Number of complete versions to keep.

    Raises:
        OSError: If a file cannot be removed.
    """
    listing = Listing.of(folder)
    mine = [s for s in listing.newest_first() if s.attempt.run == newest.saved.attempt.run]
    complete = [s for s in mine if listing.is_complete(s)]
    if len(complete) < keep:
        return
    for saved in mine[mine.index(complete[keep - 1]) + 1 :]:
        for index, path in listing.saved[saved].items():
            if index % newest.saved.shards == newest.index:
                _remove(path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another server has a file there, or has removed the folder
        path.parent.rmdir()


def overwrite(listing: Listing) -> None:
    """Removes all checkpoints in a folder, whoever has written them.

    Raises:
        OSError: If one cannot be removed.
    """
    for path in [*listing.bad, *(p for files in listing.saved.values() for p in files.values())]:
        _remove(path)


def sweep(folder: Path) -> None:
    """Removes files that killed jobs have left unfinished. No other job may be writing there.

    Raises:
        OSError: If one cannot be removed.
    """
    if folder.is_dir():
        for path in folder.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)
