"""No compression: everything is sent. The baseline under the same interface."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsecomm import kernels
from sparsecomm.compress.base import Compressor, Selection, SelectionBuffers, SelectorMemory

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(Compressor):
    """Sends every element."""

    @property
    def is_dense(self) -> bool:
        """Always true."""
        return True

    def density_at(self, step: int) -> float:
        """Always 1."""
        return 1.0

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
        """See `Compressor.select`. Selects every nonzero element."""
        result = kernels.exact_topk(grad, residual, grad.numel(), out.indices, out.values, scale=scale)
        return Selection(nnz=result.stored, nonfinite=result.nonfinite)
