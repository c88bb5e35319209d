"""Top-k by a reused threshold: one pass over memory on most steps (Ok-Topk, Li and Hoefler 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparsecomm import kernels
from sparsecomm.compress.base import Selection, SelectionBuffers, SelectorMemory, SparsifyingCompressor
from sparsecomm.errors import ConfigError
from sparsecomm.runtime.device import side_of
from sparsecomm.types import SelectResult

__all__ = ["ThresholdTopK"]

_NUDGE = 0.03  # Ok-Topk moves the threshold by 1-3% when the count drifts
_SLACK = 64  # room for small k, where the count fluctuates by more than a third


@dataclass(frozen=True)
class ThresholdTopK(SparsifyingCompressor):
    """Top-k with an exact threshold now and then, reused in between.

    The count then varies around k: a count above 4k/3 is cut back to the k largest, a count outside
    [2k/3, 5k/4] nudges the threshold, and one below k/3 or beyond the buffers is selected again, exactly.

    Attributes:
        density: k / n, a number in (0, 1], a schedule, or a callable from step to density.
        interval: steps between exact thresholds.
    """

    interval: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ConfigError(f"ThresholdTopK.interval must be an int >= 1, got {self.interval!r}")

    def capacity(self, k: int, numel: int) -> int:
        """Returns room for twice k, so that most overshoots can be cut without another pass."""
        return min(2 * k + _SLACK, numel)

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
        """See `Compressor.select`."""
        if k >= grad.numel():
            return self._exact(grad, residual, k, memory, out, scale)
        if math.isnan(memory.threshold) or memory.age >= self.interval or memory.k != k:
            return self._exact(grad, residual, k, memory, out, scale)
        result = kernels.accumulate_select(grad, residual, memory.threshold, out.indices, out.values, scale=scale)
        memory.age += 1
        nnz = result.stored
        # Where the sum was not finite the residual is as before, and must not be selected; the step is undone anyway.
        if (result.total > result.stored or nnz < k / 3) and not result.nonfinite:
            nnz = self._reselect(residual, k, memory, out, result)
        elif nnz > 4 * k / 3 + _SLACK / 2:
            nnz = kernels.cut_topk(out.indices, out.values, nnz, k, residual)
            memory.threshold = side_of(residual.device).read(out.values[:nnz].abs().min())
        elif nnz > 5 * k / 4:
            memory.threshold *= 1 + _NUDGE
        elif nnz < 2 * k / 3:
            memory.threshold *= 1 - _NUDGE
        return Selection(nnz=nnz, nonfinite=result.nonfinite)

    @staticmethod
    def _exact(
        grad: torch.Tensor,
        residual: torch.Tensor,
        k: int,
        memory: SelectorMemory,
        out: SelectionBuffers,
        scale: float,
    ) -> Selection:
        """Selects exactly and keeps the threshold for the steps to come."""
        result = kernels.exact_topk(grad, residual, k, out.indices, out.values, scale=scale)
        # A threshold of 0 (nothing nonzero yet) would select every zero on the next step.
        memory.threshold = result.threshold if result.threshold > 0.0 else math.nan
        memory.age = 0
        memory.k = k
        return Selection(nnz=result.stored, nonfinite=result.nonfinite)

    @staticmethod
    def _reselect(
        residual: torch.Tensor, k: int, memory: SelectorMemory, out: SelectionBuffers, first: SelectResult
    ) -> int:
        """The threshold was far off: puts everything back and selects exactly from the residual."""
        kernels.scatter_add(residual, out.indices[: first.stored], out.values[: first.stored])
        result = kernels.exact_topk(None, residual, k, out.indices, out.values)
        memory.threshold = result.threshold if result.threshold > 0.0 else math.nan
        memory.age = 0
        return result.stored
