"""Bytes of real text with no download: the Python standard library's own sources, or any file."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

VAL_PERCENT = 5  # of the files (standard library) or of the bytes (a text file)
VAL_BATCHES, VAL_BATCH = 8, 16  # fixed: independent of --batch and --seed, so that all runs are comparable
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class DataError(ValueError):
    """The text cannot be used; the message says which text and why."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and validation text.

    Attributes:
        name: Where it came from.
        train: uint8 ``(n,)``.
        val: uint8 ``(m,)``, disjoint from ``train``.
        digest: Names the bytes and their split; a resumed run must see the same.
    """

    name: str
    train: Tensor
    val: Tensor
    digest: str


def load_corpus(text: str | None, block: int) -> Corpus:
    """Read the text.

    Args:
        text: A file's path, or None for the standard library.
        block: Sequence length in bytes; both parts must hold at least one sequence.

    Raises:
        DataError: The file cannot be read, or is too short.
    """
    name, train, val = _text_file(Path(text)) if text else _standard_library()
    shortest = min(len(train), len(val))
    if shortest < block + 1:
        raise DataError(
            f"{name} is too short: {len(train)} training and {len(val)} validation bytes, "
            f"but one sequence of --block {block} needs {block + 1} of each"
        )
    return Corpus(
        name=name,
        train=torch.frombuffer(bytearray(train), dtype=torch.uint8),
        val=torch.frombuffer(bytearray(val), dtype=torch.uint8),
        digest=hashlib.sha256(b"%d:" % len(train) + train + val).hexdigest()[:16],
    )


def _text_file(path: Path) -> tuple[str, bytes, bytes]:
    """A file's head to train on, its tail to validate."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read --text {path}: {error.strerror or error}") from error
    cut = len(content) - len(content) * VAL_PERCENT // 100
    return str(path), content[:cut], content[cut:]


def _standard_library() -> tuple[str, bytes, bytes]:
    """The interpreter's own ``*.py``, tests left out, split by a hash of each file's name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) and path.is_file():
            bucket = int.from_bytes(hashlib.sha256(relative.as_posix().encode()).digest()[:4], "little") % 100
            parts[bucket < VAL_PERCENT].append(path.read_bytes())
    if not all(parts):
        raise DataError(f"no Python sources under {root}; name a text with --text FILE")
    return f"Python standard library ({root})", b"\n".join(parts[0]), b"\n".join(parts[1])


def training_batch(corpus: Corpus, *, seed: int, rank: int, step: int, batch: int, block: int) -> tuple[Tensor, Tensor]:
    """One rank's batch of one step, a pure function of its arguments: resuming needs no generator state.

    Returns:
        Inputs and targets, int64 ``(batch, block)`` each.
    """
    random = np.random.default_rng([seed, rank, step])
    return _gather(corpus.train, random.integers(0, len(corpus.train) - block, size=batch), block)


def validation_batches(corpus: Corpus, block: int) -> list[tuple[Tensor, Tensor]]:
    """The fixed batches every run of this text and block is judged on, evenly spaced."""
    starts = np.linspace(0, len(corpus.val) - block - 1, VAL_BATCHES * VAL_BATCH).astype(np.int64)
    return [_gather(corpus.val, part, block) for part in starts.reshape(VAL_BATCHES, VAL_BATCH)]


def _gather(data: Tensor, starts: npt.NDArray[np.int64], block: int) -> tuple[Tensor, Tensor]:
    windows = data[torch.from_numpy(starts)[:, None] + torch.arange(block + 1)].long()
    return windows[:, :-1], windows[:, 1:]
