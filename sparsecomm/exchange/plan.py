"""How one bucket is exchanged in one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from sparsecomm.compress import Compressor
from sparsecomm.feedback import ErrorFeedback, Feedback
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import CollectiveKind

__all__ = ["Plan"]

_ERROR_FEEDBACK = ErrorFeedback()


@dataclass(frozen=True, slots=True)
class Plan:
    """How one bucket is exchanged in one step; decided before it starts.

    Attributes:
        step: training step.
        collective: which collective; must be the same on all ranks.
        compressor: selects.
        k: nonzeros to select.
        value_codec: how values are written.
        index_codec: how indices are written; None for the smallest.
        feedback: what happens to what is not sent; None forgets it.
        grad_scale: what gradients arrive multiplied by (a GradScaler's scale); residuals are in unscaled units.
        held: spans of parameters that this rank did not use in this step; their memory stays as it is.
        clip_norm: norm that this bucket's gradient is clipped to by momentum correction; None for none.
        profiled: whether torch.profiler is running.
        inner_group: the torch process group of this rank's node, if two levels are to sum over that within a node.
    """

    step: int
    collective: CollectiveKind
    compressor: Compressor
    k: int
    value_codec: ValueCodec = ValueCodec.FP32
    index_codec: IndexCodec | None = None
    feedback: Feedback | None = _ERROR_FEEDBACK
    grad_scale: float = 1.0
    held: tuple[tuple[int, int], ...] = ()
    clip_norm: float | None = None
    profiled: bool = False
    inner_group: dist.ProcessGroup | None = None
