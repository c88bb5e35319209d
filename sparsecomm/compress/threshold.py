"""Top-k by a reused threshold: one pass over memory in most steps (Ok-Topk, Li and Hoefler 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from typing_extensions import override

from sparsecomm import kernels
from sparsecomm.compress.base import Selection, SelectionBuffers, SelectorMemory, SparsifyingCompressor
from sparsecomm.errors import ConfigError
from sparsecomm.runtime.device import side_of
from sparsecomm.types import SelectResult

__all__ = ["ThresholdTopK"]

_NUDGE = 0.03  # Ok-Topk moves the threshold by 1-3% if the count drifts
_SLACK = 64  # room for small k, whose counts vary by more than a third


@dataclass(frozen=True)
class ThresholdTopK(SparsifyingCompressor):
    """Top-k by an exact threshold that is reused for some steps.

    The number of selected elements therefore varies around k. A number above 4k/3 is cut to the k largest elements. A
    number outside [2k/3, 5k/4] moves the threshold a little. If the number is below k/3 or exceeds the buffers, the
    selection is repeated exactly.

    Attributes:
        density: k / n: a number in (0, 1], a schedule, or a callable from step to density.
        interval: steps between exact thresholds.
    """

    interval: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ConfigError(f"ThresholdTopK.interval must be an int >= 1, got {self.interval!r}")

    @override
    def capacity(self, k: int, numel: int) -> int:
        """Returns a little more than 2 k, so that most counts above k are cut without a second pass."""
        return min(2 * k + _SLACK, numel)

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
        if k >= grad.numel():
            return self._exact(grad, residual, k, memory, out, scale)
        if math.isnan(memory.threshold) or memory.age >= self.interval or memory.k != k:
            return self._exact(grad, residual, k, memory, out, scale)
        result = kernels.accumulate_select(grad, residual, memory.threshold, out.indices, out.values, scale=scale)
        memory.age += 1
        nnz = result.stored
        # At sums that are not finite the residual holds an older value, which must not be selected: no second selection
        # then. The step is undone anyway.
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
        """Selects exactly and remembers the threshold."""
        result = kernels.exact_topk(grad, residual, k, out.indices, out.values, scale=scale)
        # A threshold of 0 (no nonzero yet) would select every zero in the next step.
        memory.threshold = result.threshold if result.threshold > 0.0 else math.nan
        memory.age = 0
        memory.k = k
        return Selection(nnz=result.stored, nonfinite=result.nonfinite)

    @staticmethod
    def _reselect(
        residual: torch.Tensor, k: int, memory: SelectorMemory, out: SelectionBuffers, first: SelectResult
    ) -> int:
        """Puts the first selection back into the residual and selects exactly from it. Returns nnz."""
        kernels.scatter_add(residual, out.indices[: first.stored], out.values[: first.stored])
        result = kernels.exact_topk(None, residual, k, out.indices, out.values)
        memory.threshold = result.threshold if result.threshold > 0.0 else math.nan
        memory.age = 0
        return result.stored
