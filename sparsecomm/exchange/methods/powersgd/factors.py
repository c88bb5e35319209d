"""Low-rank factors of the matrices in a bucket: which there are, and vectors made orthonormal alike on all ranks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sparsecomm.feedback.layout import BucketLayout

__all__ = ["Matrix", "matrices_of", "orthonormal", "random_factor"]

_DEPENDENT = 1e-6  # of a column's norm: what is left of it beside the columns before is rounding
_SEED = 0x5EED


@dataclass(frozen=True, slots=True)
class Matrix:
    """A parameter that is sent as two factors.

    Attributes:
        name: the parameter's.
        start: its first element in the bucket.
        rows: length of the dimension that is slowest in memory.
        cols: of all others together.
    """

    name: str
    start: int
    rows: int
    cols: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Returns the matrix in a flat bucket, as a view of shape (rows, cols)."""
        return flat[self.start : self.start + self.rows * self.cols].view(self.rows, self.cols)


def matrices_of(layout: BucketLayout, rank: int) -> tuple[list[Matrix], list[tuple[int, int]]]:
    """Returns the parameters of which a low rank saves something, and the spans of all else, joined."""
    matrices: list[Matrix] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for i, name in enumerate(layout.names):
        numel = torch.Size(layout.shapes[i]).numel()
        rows = layout.slowest(i)
        cols = numel // rows if rows else 0
        if rank * (rows + cols) < rows * cols:
            matrices.append(Matrix(name, start, rows, cols))
        elif spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], start + numel)
        else:
            spans.append((start, start + numel))
        start += numel
    return matrices, [s for s in spans if s[0] < s[1]]


def random_factor(name: str, rank: int, length: int) -> torch.Tensor:
    """Returns normal numbers that depend on the arguments alone, float32, shape (rank, length)."""
    seed = zlib.crc32(name.encode(), _SEED)
    return torch.randn(rank, length, generator=torch.Generator().manual_seed(seed))


def orthonormal(vectors: torch.Tensor, spare: Callable[[], torch.Tensor] | None = None) -> None:
    """Makes vectors orthonormal, by modified Gram-Schmidt in float64, done twice.

    Sums are made in numpy's order, which depends on neither threads nor the width of vector instructions, so that ranks
    on different machines get the same bits from the same bits.

    Args:
        vectors: float32, shape (r, n), contiguous. Mutated. What depends on those before becomes its spare, or zero.
        spare: gives the spares: float32, shape (r, n).
    """
    made = vectors.numpy().astype(np.float64)
    for i in range(len(made)):
        if not _normalize(made, i):
            made[i] = 0.0 if spare is None else spare()[i].numpy()
            if not _normalize(made, i):
                made[i] = 0.0
    vectors.copy_(torch.from_numpy(made))


def _normalize(made: np.ndarray, i: int) -> bool:
    """Makes the i-th vector orthogonal to those before, of norm 1; returns whether anything is left of it."""
    before = _norm(made[i])
    for _ in range(2):
        for other in made[:i]:
            made[i] -= float(np.add.reduce(other * made[i])) * other
    after = _norm(made[i])
    if not after > _DEPENDENT * before:
        return False
    made[i] /= after
    return True


def _norm(vector: np.ndarray) -> float:
    return math.sqrt(float(np.add.reduce(vector * vector)))
