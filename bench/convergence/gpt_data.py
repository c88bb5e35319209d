"""Bytes of real text without a download: the sources of Python's standard library, or any file."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import study_data
import torch
from torch import Tensor

HELD_OUT_PERCENT = 5  # of the files (standard library) or of the bytes (a text file), validation and test together
# Independent of --batch and --seed, so that all runs are comparable.
HELD_OUT_BATCH = 16
HELD_OUT_BATCHES = {"validation": 8, "test": 16}
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class DataError(ValueError):
    """The text cannot be used; the message names it and the reason."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training, validation and test text.

    Attributes:
        name: Source of the text.
        train: uint8 ``(n,)``.
        val: uint8 ``(m,)``, to tune on; from other files than ``train``.
        test: uint8 ``(m',)``, to report on; from other files than both.
        digest: Hash of the bytes and their split; a resumed run must have the same.
    """

    name: str
    train: Tensor
    val: Tensor
    test: Tensor
    digest: str


def load_corpus(text: str | None, block: int) -> Corpus:
    """Reads the text.

    Args:
        text: Path of a file, or None for the standard library.
        block: Sequence length in bytes; each part must hold at least one sequence.

    Raises:
        DataError: The file cannot be read, or is too short.
    """
    name, parts = _text_file(Path(text)) if text else _standard_library()
    train, val, test = parts
    if min(len(part) for part in parts) < block + 1:
        raise DataError(
            f"{name} is too short: {len(train)} training, {len(val)} validation and {len(test)} test bytes, "
            f"but one sequence of --block {block} needs {block + 1} of each"
        )
    sizes = b"%d:%d:" % (len(train), len(val))
    train_data, val_data, test_data = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return Corpus(
        name=name,
        train=train_data,
        val=val_data,
        test=test_data,
        digest=hashlib.sha256(sizes + b"".join(parts)).hexdigest()[:16],
    )


Parts = tuple[bytes, bytes, bytes]  # training, validation, test


def _text_file(path: Path) -> tuple[str, Parts]:
    """Returns the name of a file and its parts: the head to train on, the tail to validate and to test."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read --text {path}: {error.strerror or error}{study_data.hint(path)}") from error
    held_out = len(content) * HELD_OUT_PERCENT // 100
    cut, end = len(content) - held_out, len(content) - held_out // 2
    return str(path), (content[:cut], content[cut:end], content[end:])


def _standard_library() -> tuple[str, Parts]:
    """Returns the interpreter's ``*.py`` files without its tests, split by a hash of each file's name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes], list[bytes]] = ([], [], [])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) and path.is_file():
            digest = hashlib.sha256(relative.as_posix().encode()).digest()
            held_out = int.from_bytes(digest[:4], "little") % 100 < HELD_OUT_PERCENT
            parts[1 + digest[4] % 2 if held_out else 0].append(path.read_bytes())
    if not all(parts):
        raise DataError(f"no Python sources under {root}; name a text with --text FILE")
    train, val, test = (b"\n".join(part) for part in parts)
    return f"Python standard library ({root})", (train, val, test)


def held_out_batches(corpus: Corpus, judge: str, block: int, count: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Returns the fixed, evenly spaced batches on which every run of this text and block is judged.

    Args:
        corpus: The text.
        judge: "validation" or "test".
        block: Sequence length in bytes.
        count: Number of batches; None for that of ``HELD_OUT_BATCHES``.
    """
    data = corpus.val if judge == "validation" else corpus.test
    count = HELD_OUT_BATCHES[judge] if count is None else count
    starts = np.linspace(0, len(data) - block - 1, count * HELD_OUT_BATCH).astype(np.int64)
    return [sequences(data, part, block) for part in starts.reshape(count, HELD_OUT_BATCH)]


def sequences(data: Tensor, starts: npt.NDArray[np.int64], block: int) -> tuple[Tensor, Tensor]:
    """Returns the sequences that begin at ``starts``: inputs and targets, int64 ``(len(starts), block)`` each."""
    windows = data[torch.from_numpy(starts)[:, None] + torch.arange(block + 1)].long()
    return windows[:, :-1], windows[:, 1:]
