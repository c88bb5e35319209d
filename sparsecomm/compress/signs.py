"""Options of the sign method: one bit per element, and one scale for the whole bucket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from sparsecomm import kernels
from sparsecomm.compress.base import Compressor, Selection, SelectionBuffers, SelectorMemory

__all__ = ["Sign", "WholeBucket"]


class WholeBucket(Compressor):
    """Base class of compressors that select nothing: the collective compresses the whole accumulated gradient."""

    @override
    def density_at(self, step: int) -> float:
        return 1.0

    @override
    def capacity(self, k: int, numel: int) -> int:
        return 0

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
        """Adds the gradient to the residual and selects nothing."""
        return Selection(nnz=0, nonfinite=kernels.accumulate_dense(grad, residual, scale=scale))


@dataclass(frozen=True)
class Sign(WholeBucket):
    """1-bit signs with error feedback (EF-signSGD, Karimireddy et al. 2019).

    Each rank sends the sign of every accumulated element, and the mean magnitude of all. The result is the average over
    ranks of sign times mean magnitude. It always takes 32 times fewer bytes than float32.
    """

    collectives: ClassVar[tuple[str, ...]] = ("sign",)
