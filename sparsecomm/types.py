"""Small frozen types shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

__all__ = [
    "GRAD_DTYPES",
    "MAX_NUMEL",
    "Codecs",
    "IndexCodec",
    "Pairs",
    "SelectResult",
    "Sizes",
    "Span",
    "TopKResult",
    "ValueCodec",
]

GRAD_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of gradients that kernels accept. Residuals and selected values are always float32."""

MAX_NUMEL = 2**32
"""Largest number of elements of a bucket, since indices are sent as uint32."""


class IndexCodec(IntEnum):
    """Codec of the positions of nonzeros in a payload."""

    DENSE = 0
    """No indices, since nnz == numel."""
    RAW = 1
    """uint32 little-endian, ascending (COO32)."""
    BITPACK = 2
    """Gaps minus one in blocks of 128, with one bit width per block."""
    RICE = 3
    """Gaps minus one in blocks of 128, Rice-coded with one parameter per block."""
    BITMAP = 4
    """One bit per element of the bucket."""


class ValueCodec(IntEnum):
    """Codec of the values of nonzeros in a payload."""

    FP32 = 0
    FP16 = 1
    """IEEE half precision, scaled by one power of two per payload, so that its range suffices."""
    BF16 = 2
    INT8 = 3
    """Blocks of 128 values, each with a float32 scale of max|v| / 127."""


@dataclass(frozen=True, slots=True)
class SelectResult:
    """Result of a threshold selection.

    Attributes:
        stored: number of (index, value) pairs written to the output buffers.
        total: number of elements that reached the threshold; larger than `stored` if the buffers were full. The others
            stay in the residual.
        nonfinite: number of elements whose accumulated value was NaN or infinite. Their residual is unchanged.
    """

    stored: int
    total: int
    nonfinite: int


@dataclass(frozen=True, slots=True)
class TopKResult:
    """Result of an exact top-k selection.

    Attributes:
        stored: number of (index, value) pairs written: min(k, number of nonzero finite elements).
        threshold: smallest selected magnitude; 0.0 if nothing was selected.
        nonfinite: number of elements whose accumulated value was NaN or infinite.
    """

    stored: int
    threshold: float
    nonfinite: int


Pairs = tuple[torch.Tensor, torch.Tensor]
"""Indices (uint32, ascending) and values (float32) of the same length."""


Span = tuple[int, int]
"""First element of a range and one past the last."""


@dataclass(frozen=True, slots=True)
class Codecs:
    """The codecs of pairs.

    Attributes:
        values: codec of the values.
        indices: codec of the positions; None for the smallest.
    """

    values: ValueCodec
    indices: IndexCodec | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers and codecs that determine the bytes of an exchange of one bucket.

    Attributes:
        k: number of elements that each rank selects.
        numel: number of elements of the bucket.
        ranks: number of ranks.
        values: codec of the values.
        indices: codec of the positions; None for the smallest.
    """

    k: int
    numel: int
    ranks: int
    values: ValueCodec
    indices: IndexCodec | None = None
