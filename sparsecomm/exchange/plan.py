"""How one bucket is exchanged in one step. Decided before the exchange starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from sparsecomm.compress import Compressor
from sparsecomm.feedback import ErrorFeedback, Feedback
from sparsecomm.types import Codecs, IndexCodec, Span, ValueCodec

__all__ = ["Plan", "summable"]

_ERROR_FEEDBACK = ErrorFeedback()


@dataclass(frozen=True, slots=True)
class Plan:
    """How one bucket is exchanged in one step.

    Attributes:
        step: training step.
        collective: name of the exchange method; must be the same on all ranks.
        compressor: selects.
        k: nonzeros to select.
        value_codec: codec of the values.
        index_codec: codec of the positions; None for the smallest.
        feedback: what happens to elements that are not sent; None forgets them.
        grad_scale: factor that gradients arrive with (a GradScaler's scale); residuals are in unscaled units.
        unused: spans of parameters that this rank did not use in this step; their memory stays as it is.
        clip_norm: norm that this bucket's gradient is clipped to by momentum or Adam correction; None for none.
        final: whether the step is final once this bucket is exchanged. Else the caller calls
            `BucketMemory.finish_step` when it knows whether the optimizer takes the whole step.
        inner_group: torch process group of this rank's node, for a sum inside the node; None for messages.
    """

    step: int
    collective: str
    compressor: Compressor
    k: int
    value_codec: ValueCodec = ValueCodec.FP32
    index_codec: IndexCodec | None = None
    feedback: Feedback | None = _ERROR_FEEDBACK
    grad_scale: float = 1.0
    unused: tuple[Span, ...] = ()
    clip_norm: float | None = None
    final: bool = True
    inner_group: dist.ProcessGroup | None = None

    @property
    def masking(self) -> bool:
        """Whether momentum is zeroed where something was sent."""
        return bool(getattr(self.feedback, "masking", False))

    @property
    def codecs(self) -> Codecs:
        """Both codecs."""
        return Codecs(self.value_codec, self.index_codec)


def summable(codec: ValueCodec) -> ValueCodec:
    """Returns the codec for values that are added on their way: fp16 in place of int8, which has a scale a block."""
    return ValueCodec.FP16 if codec == ValueCodec.INT8 else codec
