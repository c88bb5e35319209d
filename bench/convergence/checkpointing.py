"""Checkpoints of a data-parallel run in which each rank holds a residual.

A checkpoint is a folder ``step-00000123`` with rank 0's ``model.pt`` (model, optimizer, log) and every rank's
``rank<r>.pt`` (its residual). The file ``latest`` names the newest checkpoint. It is replaced last, by one rename, so
a run that is killed while it saves leaves the checkpoint before untouched.
"""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from run_log import replace_file


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names it and the reason."""


def save(folder: Path, step: int, *, rank: int, shared: dict[str, Any], own: dict[str, Any]) -> None:
    """Writes one checkpoint and deletes the one before. Collective.

    Args:
        folder: Must be visible to all ranks: on a shared file system if they run on several machines.
        step: Number of updates done.
        rank: This rank.
        shared: State that all ranks have in common; rank 0 writes it.
        own: State of this rank alone.
    """
    target = folder / f"step-{step:08d}"
    if rank == 0:
        _write(target / "model.pt", shared)
    _write(target / f"rank{rank}.pt", own)
    dist.barrier()
    if rank == 0:
        before = _latest(folder)
        replace_file(folder / "latest", target.name.encode())
        if before is not None and before != target:
            shutil.rmtree(before, ignore_errors=True)
    dist.barrier()


def exists(folder: Path) -> bool:
    """Returns whether the folder has a checkpoint to resume from."""
    return _latest(folder) is not None


def load(folder: Path, *, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the newest checkpoint. Not collective.

    Returns:
        The shared state and this rank's state.

    Raises:
        CheckpointError: The folder has no checkpoint, or a file of it is missing or damaged.
    """
    target = _latest(folder)
    if target is None:
        raise CheckpointError(f"nothing to resume: {folder} holds no checkpoint")
    return _read(target / "model.pt"), _read(target / f"rank{rank}.pt")


def _latest(folder: Path) -> Path | None:
    pointer = folder / "latest"
    return folder / pointer.read_text().strip() if pointer.is_file() else None


def _write(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    replace_file(path, buffer.getvalue())


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        written = len(list(path.parent.glob("rank*.pt")))
        raise CheckpointError(f"{path} is missing: {written} rank(s) wrote this checkpoint") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged: {reason[:120]}") from error
    return content
