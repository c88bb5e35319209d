"""A sample without replacement that every rank draws alike, from a key: integers only, on any machine the same."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["sample"]


def sample(marks: torch.Tensor, k: int, *key: int) -> torch.Tensor:
    """Draws k of n positions, every subset equally likely.

    Positions are drawn until k different ones are marked; or, if k is more than half, until n - k are, and the others
    are taken. Cost: about 2 k random numbers, and passes over a byte an element.

    Args:
        marks: uint8, shape (n,), n at most 2**32: work space. Mutated.
        k: at most n.
        key: numbers that the sample depends on, each in [0, 2**64).

    Returns:
        int64, shape (k,), ascending.
    """
    text = b"".join(number.to_bytes(8, "little") for number in key)
    digest = hashlib.blake2b(text, digest_size=16, person=b"sparsecomm").digest()
    # Of numpy's generators it is the raw bits that are the same in all versions, not what is made of them.
    bits = np.random.Philox(key=int.from_bytes(digest, "little"))
    numel = marks.numel()
    few, marked = min(k, numel - k), marks.numpy().view(np.bool_)
    marked[:] = False
    drawn = 0
    while drawn < few:
        # Never more than are missing: if too many were marked, which of them to drop would have to be drawn, too.
        marked[_uniform(bits, numel, few - drawn)] = True
        drawn = int(np.count_nonzero(marked))
    if few < k:
        np.logical_not(marked, out=marked)
    return torch.from_numpy(np.flatnonzero(marked))


def _uniform(bits: np.random.Philox, numel: int, count: int) -> npt.NDArray[np.uint32]:
    """Draws integers below numel: as many bits as it has, again where they are too large."""
    mask = np.uint32((1 << (numel - 1).bit_length()) - 1)
    parts: list[npt.NDArray[np.uint32]] = []
    missing = count
    while missing:
        words = bits.random_raw((missing * (int(mask) + 1) // numel + 17) // 2)
        block = words.view(np.uint32) & mask
        parts.append(block[block < numel][:missing])
        missing -= parts[-1].size
    return np.concatenate(parts)
