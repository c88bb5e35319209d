"""Checkpoints of the servers: one file per shard and version.

A file is written under another name and renamed, so it is either whole or not there. Any number of servers can read
the files of a version.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsecomm.errors import ConfigError, StateError
from sparsecomm.ps.protocol.sharding import Piece
from sparsecomm.ps.server.shard import Shard

__all__ = ["Checkpoints", "newest_complete"]

_FOLDER = re.compile(r"version-(\d{9,})")
_FILE = re.compile(r"shard-(\d+)-of-(\d+)\.pt")


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where and how often servers save their shards.

    A version is complete when the files of all shards are there. Each file holds a shard's parameters after exactly
    that many updates, and the state of its optimizer. The workers' residuals are not saved.

    Attributes:
        folder: Folder that all servers can write to.
        every: Updates between two checkpoints; 0 saves none.
        keep: Number of complete versions to keep.
        resume: Whether to begin with the newest complete version, if there is one.
    """

    folder: str
    every: int = 0
    keep: int = 2
    resume: bool = False

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("keep", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"Checkpoints.{name} must be a whole number >= {least}, got {value!r}")

    def saved(self, shard: Shard) -> None:
        """Saves a shard if a checkpoint of its version is due."""
        if self.every and shard.version % self.every == 0:
            _write(Path(self.folder) / f"version-{shard.version:09d}", shard)
            self._prune(shard)

    def restore(self, shard: Shard) -> None:
        """Loads the newest complete version into a new shard, if `resume` is set and there is one.

        Args:
            shard: Mutated.

        Raises:
            StateError: If the checkpoint is damaged or of another model.
        """
        found = newest_complete(Path(self.folder)) if self.resume else None
        if found is not None:
            _read(found, shard)

    def _prune(self, shard: Shard) -> None:
        """Removes this shard's files of all versions older than the ones to keep."""
        versions = _versions(Path(self.folder))
        complete = [v for v in versions if _complete(v)]
        for folder in versions[: versions.index(complete[-self.keep])] if len(complete) >= self.keep else ():
            (folder / _name(shard)).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another server has a file there, or has removed the folder
                folder.rmdir()


def newest_complete(folder: Path) -> Path | None:
    """Returns the folder of the newest complete version, or None."""
    return next((v for v in reversed(_versions(folder)) if _complete(v)), None)


def _versions(folder: Path) -> list[Path]:
    found = [p for p in folder.iterdir() if _FOLDER.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def _files(folder: Path) -> dict[int, tuple[int, Path]]:
    """Returns, for each shard's index, the number of shards that its file's name gives, and the file."""
    try:
        matches = [(_FILE.fullmatch(p.name), p) for p in folder.iterdir()]
    except FileNotFoundError:  # another server has just removed an old version
        return {}
    return {int(m[1]): (int(m[2]), p) for m, p in matches if m}


def _complete(folder: Path) -> bool:
    files = _files(folder)
    counts = {shards for shards, _ in files.values()}
    return len(counts) == 1 and set(files) == set(range(counts.pop()))


def _name(shard: Shard) -> str:
    return f"shard-{shard.spec.index}-of-{shard.spec.shards}.pt"


def _write(folder: Path, shard: Shard) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    spec = shard.spec
    content = {
        "format": 1,
        "version": shard.version,
        "model": str(spec.model_hash),
        "span": [spec.start, spec.end],
        "pieces": [[p.name, p.start, p.end, p.offset] for p in spec.pieces],
        "values": shard.values,
        "states": shard.piece_states(),
    }
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False) as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, folder / _name(shard))


def _load(path: Path, shard: Shard) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
        version, model, (start, end) = content["version"], content["model"], content["span"]
        whole = content["values"].numel() == end - start and len(content["states"]) == len(content["pieces"])
    except Exception as error:
        raise StateError(f"{path} is no checkpoint of a shard, or damaged: {error}") from error
    if model != str(shard.spec.model_hash):
        raise StateError(f"{path} is a checkpoint of another model: its names and shapes differ from this job's")
    if not whole or f"version-{version:09d}" != path.parent.name:
        raise StateError(f"{path} is damaged: version {version}, {content['values'].numel()} elements of {end - start}")
    return content


def _read(folder: Path, shard: Shard) -> None:
    """Fills a shard from the files of a version that overlap it."""
    spec = shard.spec
    values = torch.empty(spec.numel, dtype=torch.float32)
    olds: list[tuple[list[Any], dict[str, Any]]] = []
    version = 0
    for _, path in _files(folder).values():
        content = _load(path, shard)
        start, end = content["span"]
        low, high = max(start, spec.start), min(end, spec.end)
        if low < high:
            values[low - spec.start : high - spec.start] = content["values"][low - start : high - start]
            olds += zip(content["pieces"], content["states"], strict=True)
            version = content["version"]
    shard.restore(values, version, [_state_of(piece, olds) for piece in spec.pieces])


def _state_of(piece: Piece, olds: list[tuple[list[Any], dict[str, Any]]]) -> dict[str, Any]:
    """Returns the optimizer's state of a piece, joined from the old pieces that overlap it.

    State that is not elementwise, such as a step count, is the same in all of them.
    """
    state: dict[str, Any] = {}
    for (name, start, end, _), old in olds:
        low, high = max(start, piece.start), min(end, piece.end)
        if name != piece.name or low >= high:
            continue
        for key, value in old.items():
            if not isinstance(value, torch.Tensor) or value.shape != (end - start,):
                state[key] = value
                continue
            whole = state.setdefault(key, torch.empty(piece.end - piece.start, dtype=value.dtype))
            whole[low - piece.start : high - piece.start] = value[low - start : high - start]
    return state
