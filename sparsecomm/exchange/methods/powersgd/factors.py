"""The matrices in a bucket, and orthonormal vectors that have the same bits on all ranks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sparsecomm.feedback.layout import BucketLayout

__all__ = ["Matrix", "matrices_of", "orthonormal", "random_factor"]

_DEPENDENT = 1e-6  # relative norm below which the remainder of a projected vector is only rounding
_SEED = 0x5EED


@dataclass(frozen=True, slots=True)
class Matrix:
    """A parameter that is sent as two factors.

    Attributes:
        name: name of the parameter.
        start: first element of the parameter in the bucket.
        rows: length of the dimension that is slowest in memory.
        cols: product of the lengths of all other dimensions.
    """

    name: str
    start: int
    rows: int
    cols: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Returns the matrix in a flat bucket, as a view of shape (rows, cols)."""
        return flat[self.start : self.start + self.rows * self.cols].view(self.rows, self.cols)


def matrices_of(layout: BucketLayout, rank: int) -> tuple[list[Matrix], list[tuple[int, int]]]:
    """Returns the parameters for which a low rank saves bytes, and the merged spans of all other parameters."""
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
    """Returns normally distributed numbers, float32, shape (rank, length), that depend only on the arguments."""
    seed = zlib.crc32(name.encode(), _SEED)
    return torch.randn(rank, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def orthonormal(vectors: torch.Tensor, spare: Callable[[], torch.Tensor] | None = None) -> None:
    """Makes vectors orthonormal by modified Gram-Schmidt in float64, with each projection done twice.

    Sums use numpy's order, which depends neither on threads nor on the width of vector instructions. So ranks on
    different machines compute the same bits from the same input.

    Args:
        vectors: float32, shape (r, n), contiguous. Mutated. A vector that depends on earlier ones is replaced by its
            spare, or by zero if there is none or the spare depends on them, too.
        spare: returns one spare per vector, float32, shape (r, n).
    """
    made = vectors.numpy().astype(np.float64)
    for i in range(len(made)):
        if not _normalize(made, i):
            made[i] = 0.0 if spare is None else spare()[i].numpy()
            if not _normalize(made, i):
                made[i] = 0.0
    vectors.copy_(torch.from_numpy(made))


def _normalize(made: np.ndarray, i: int) -> bool:
    """Makes vector i orthogonal to the earlier ones and of norm 1. Returns False if it is zero or depends on them."""
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
