"""The data of the examples: the sources of Python's standard library as bytes. Nothing is downloaded."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def load_text() -> tuple[Tensor, Tensor]:
    """Returns the text to train on and the text to evaluate on, uint8 each (some megabytes, the same on all ranks)."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    content = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    text = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    cut = len(text) * 95 // 100
    return text[:cut], text[cut:]


def random_batch(text: Tensor, *seed: int, batch: int = 8, length: int = 64) -> tuple[Tensor, Tensor]:
    """Returns random sequences and, for each byte, the byte that follows; int64 ``(batch, length)`` each.

    Args:
        text: uint8, of `load_text`.
        seed: Equal numbers give equal batches. Ranks must differ, or all of them learn from the same data.
        batch: Number of sequences.
        length: Bytes in a sequence.
    """
    starts = np.random.default_rng(seed).integers(0, len(text) - length, size=batch)
    windows = text[torch.from_numpy(starts)[:, None] + torch.arange(length + 1)].long()
    return windows[:, :-1], windows[:, 1:]
