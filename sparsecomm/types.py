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
    "TopKResult",
    "ValueCodec",
]

GRAD_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
"""Gradient dtypes that kernels accept. Residuals and selected values are always float32."""

MAX_NUMEL = 2**32
"""Most elements a bucket may have: indices travel as uint32."""


class IndexCodec(IntEnum):
    """How the positions of the nonzeros are written in a payload."""

    DENSE = 0
    """No indices: nnz == numel and values are in order."""
    RAW = 1
    """uint32 little-endian, ascending (COO32)."""
    BITPACK = 2
    """Gaps minus one, blocks of 128, one bit width a block."""
    RICE = 3
    """Gaps minus one, blocks of 128, Rice-coded with one parameter a block."""
    BITMAP = 4
    """One bit an element."""


class ValueCodec(IntEnum):
    """How the values of the nonzeros are written in a payload."""

    FP32 = 0
    FP16 = 1
    """IEEE half, the payload scaled by a power of two so that neither end of the range is lost."""
    BF16 = 2
    INT8 = 3
    """Blocks of 128 values, each with one float32 scale = max|v| / 127."""


@dataclass(frozen=True, slots=True)
class SelectResult:
    """What a threshold selection did.

    Attributes:
        stored: number of (index, value) pairs written to the output buffers.
        total: number of elements that met the threshold; larger than stored if the buffers were full
            (what was not stored stayed in the residual).
        nonfinite: number of elements whose accumulated value was NaN or infinite; their residual
            was left as it was.
    """

    stored: int
    total: int
    nonfinite: int


@dataclass(frozen=True, slots=True)
class TopKResult:
    """What an exact top-k selection did.

    Attributes:
        stored: number of (index, value) pairs written: min(k, number of nonzero finite elements).
        threshold: the smallest selected magnitude; 0.0 if nothing was selected.
        nonfinite: number of elements whose accumulated value was NaN or infinite.
    """

    stored: int
    threshold: float
    nonfinite: int


Pairs = tuple[torch.Tensor, torch.Tensor]
"""Indices (uint32, ascending) and values (float32), equally long."""


@dataclass(frozen=True, slots=True)
class Codecs:
    """How parts are written.

    Attributes:
        values: value codec.
        indices: index codec; None for the smallest.
    """

    values: ValueCodec
    indices: IndexCodec | None
