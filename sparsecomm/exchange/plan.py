"""The plan for one bucket in one step, made before its exchange starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from sparsecomm.compress import Compressor
from sparsecomm.feedback import Clipping, ErrorFeedback, Feedback
from sparsecomm.types import Codecs, IndexCodec, Span, ValueCodec

__all__ = ["Plan", "codec_for_sums"]

_ERROR_FEEDBACK = ErrorFeedback()


@dataclass(frozen=True, slots=True)
class Plan:
    """Method and options of the exchange of one bucket in one step.

    Attributes:
        step: training step.
        collective: name of the exchange method; must be the same on all ranks.
        compressor: selects the elements to send.
        k: number of elements to select.
        value_codec: codec of the values.
        index_codec: codec of the positions; None for the smallest.
        feedback: treatment of elements that are not sent; None drops them.
        grad_scale: factor that gradients arrive multiplied by (a GradScaler's); residuals are unscaled.
        unused: spans of parameters that this rank did not use in this step. Their memory does not change.
        clipping: how momentum or Adam correction clips this bucket's gradient; None to not clip.
        final: whether the step is final once this bucket is exchanged. Otherwise the caller calls
            `BucketMemory.finish_step` when it knows whether the optimizer takes the step, or the next exchange does.
        inner_group: torch process group of this rank's node for sums inside the node; None to send messages.
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
    clipping: Clipping | None = None
    final: bool = True
    inner_group: dist.ProcessGroup | None = None

    @property
    def masking(self) -> bool:
        """Whether momentum is zeroed where something was sent."""
        return bool(getattr(self.feedback, "masking", False))

    @property
    def codecs(self) -> Codecs:
        """Codecs of values and positions."""
        return Codecs(self.value_codec, self.index_codec)


def codec_for_sums(codec: ValueCodec) -> ValueCodec:
    """Returns the codec for values that ranks add on the way: fp16 in place of int8, whose blocks differ in scale."""
    return ValueCodec.FP16 if codec == ValueCodec.INT8 else codec
