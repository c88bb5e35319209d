"""A sample without replacement that all ranks draw alike from a key, in integers: the same on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["sample"]


def sample(marks: torch.Tensor, k: int, *key: int) -> torch.Tensor:
    """Draws k of n positions; all subsets are equally likely.

    Draws positions until k different ones are marked. If k is more than half of n, it marks n - k positions and returns
    the others. The cost is about 2 k random numbers, and passes over one byte per element.

    Args:
        marks: work space, uint8, shape (n,), n at most 2**32. Mutated.
        k: number of positions, at most n.
        key: numbers that the sample depends on, each in [0, 2**64).

    Returns:
        int64, shape (k,), ascending.
    """
    text = b"".join(number.to_bytes(8, "little") for number in key)
    digest = hashlib.blake2b(text, digest_size=16, person=b"sparsecomm").digest()
    # Only the raw bits of numpy's generators are the same in all versions; distributions made from them may change.
    bits = np.random.Philox(key=int.from_bytes(digest, "little"))
    numel = marks.numel()
    few, marked = min(k, numel - k), marks.numpy().view(np.bool_)
    marked[:] = False
    drawn = 0
    while drawn < few:
        # Draw no more than are missing: if too many were marked, those to drop would have to be drawn as well.
        marked[_uniform(bits, numel, few - drawn)] = True
        drawn = int(np.count_nonzero(marked))
    if few < k:
        np.logical_not(marked, out=marked)
    return torch.from_numpy(np.flatnonzero(marked))


def _uniform(bits: np.random.Philox, numel: int, count: int) -> npt.NDArray[np.uint32]:
    """Draws `count` integers of numel's bit length, and redraws those that are not below numel."""
    mask = np.uint32((1 << (numel - 1).bit_length()) - 1)
    parts: list[npt.NDArray[np.uint32]] = []
    missing = count
    while missing:
        words = bits.random_raw((missing * (int(mask) + 1) // numel + 17) // 2)
        block = words.view(np.uint32) & mask
        parts.append(block[block < numel][:missing])
        missing -= parts[-1].size
    return np.concatenate(parts)
