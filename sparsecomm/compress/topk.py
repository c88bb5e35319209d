"""Exact top-k: the k largest magnitudes, ties to the lowest index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from sparsecomm import kernels
from sparsecomm.compress.base import Selection, SelectionBuffers, SelectorMemory, SparsifyingCompressor

__all__ = ["TopK"]


@dataclass(frozen=True)
class TopK(SparsifyingCompressor):
    """Exact top-k sparsification (Stich et al. 2018, Aji and Heafield 2017).

    Attributes:
        density: k / n: a number in (0, 1], a schedule, or a callable from step to density.
    """

    @override
    def select(
        self,
        grad: torch.Tensor,
        residual: torch.Tensor,
        k: int,
        memory: SelectorMemory,
        out: SelectionBuffers,
        *,
        scale: float = 1.0,
    ) -> Selection:
        """Selects exactly min(k, number of nonzeros) elements; among equal magnitudes the lowest index wins."""
        result = kernels.exact_topk(grad, residual, k, out.indices, out.values, scale=scale)
        return Selection(nnz=result.stored, nonfinite=result.nonfinite)
