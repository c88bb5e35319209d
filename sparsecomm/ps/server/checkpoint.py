"""Checkpoints of the servers: one file a shard and version, whole or not there, for any number of servers."""

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
    """Where servers keep their shards, and how often.

    A version is complete when all its shards' files are there; each of them holds the parameters after exactly so many
    updates, and what the optimizer knew then. Residuals stay with the workers.

    Attributes:
        folder: that all servers can write to.
        every: updates between two checkpoints; 0 saves none.
        keep: complete versions that are kept.
        resume: whether to begin with the newest complete version, if there is one.
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
        """Saves a shard if its version is due."""
        if self.every and shard.version % self.every == 0:
            _write(Path(self.folder) / f"version-{shard.version:09d}", shard)
            self._prune(shard)

    def restore(self, shard: Shard) -> None:
        """Gives a new shard the newest complete version, if it is to resume and there is one.

        Raises:
            StateError: for a checkpoint of another model, or a damaged one.
        """
        found = newest_complete(Path(self.folder)) if self.resume else None
        if found is not None:
            _read(found, shard)

    def _prune(self, shard: Shard) -> None:
        """Removes this shard's files of versions older than those kept."""
        versions = _versions(Path(self.folder))
        complete = [v for v in versions if _complete(v)]
        for folder in versions[: versions.index(complete[-self.keep])] if len(complete) >= self.keep else ():
            (folder / _name(shard)).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another shard's server has a file there, or was faster
                folder.rmdir()


def newest_complete(folder: Path) -> Path | None:
    """Returns the folder of the newest version of which every shard is there, or None."""
    return next((v for v in reversed(_versions(folder)) if _complete(v)), None)


def _versions(folder: Path) -> list[Path]:
    found = [p for p in folder.iterdir() if _FOLDER.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def _files(folder: Path) -> dict[int, tuple[int, Path]]:
    """Returns each shard's number of shards and file, by index."""
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
    """Puts a shard together from those parts of a version that overlap it."""
    spec = shard.spec
    values = torch.empty(spec.numel)
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
    """Puts the optimizer's state of a piece together; what is not elementwise (a step count) is the same everywhere."""
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
