"""No compression: every element is sent. This is the baseline, behind the same interface."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from sparsecomm import kernels
from sparsecomm.compress.base import Compressor, Selection, SelectionBuffers, SelectorMemory

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(Compressor):
    """Sends every element."""

    @property
    @override
    def is_dense(self) -> bool:
        return True

    @override
    def density_at(self, step: int) -> float:
        return 1.0

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
        """Selects every nonzero element."""
        result = kernels.exact_topk(grad, residual, grad.numel(), out.indices, out.values, scale=scale)
        return Selection(nnz=result.stored, nonfinite=result.nonfinite)
