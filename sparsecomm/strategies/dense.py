"""Everything, the residual included, as float32 around a ring."""

from __future__ import annotations

import math

import torch

from sparsecomm.collectives import Agreement, dense_ring_bytes, ring_allreduce
from sparsecomm.compress import Taken, take_all
from sparsecomm.strategies.base import Strategy, register
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import HEADER_BYTES, CollectiveKind

__all__ = ["DenseRing"]


@register
class DenseRing(Strategy):
    """Sums the residuals, or the gradients where nothing was ever left over."""

    name = "dense"
    kind = CollectiveKind.DENSE
    needs_residual = False

    _work: torch.Tensor | None = None

    @classmethod
    def estimate_bytes(
        cls, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> int:
        """See `Strategy.estimate_bytes`."""
        return dense_ring_bytes(numel, size) + HEADER_BYTES * (size - 1)

    def take(self) -> Taken:
        """See `Strategy.take`."""
        job, plan = self.job, self.job.plan
        return take_all(
            job.bucket,
            job.grad,
            plan.feedback,
            job.arena,
            scale=1.0 / plan.grad_scale,
            held=plan.held,
            clip_norm=plan.clip_norm,
            lasting=job.settle,
        )

    def encode(self, taken: Taken) -> None:
        """Makes the header, which is all that goes ahead."""
        self.header = self.job.header()
        self.bare_payload()

    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        """See `Strategy.communicate`."""
        job, grad, residual, key = self.job, self.job.grad, self.job.bucket.residual, self.job.bucket.index
        work = grad
        if residual is not None or grad.dtype != torch.float32:
            # The gradient itself stays intact until the sum has arrived, so that a failure can be undone.
            work = job.arena.get((key, "work"), grad.numel(), torch.float32)
            work.copy_(grad if residual is None else residual)
        self._work = work
        yield from ring_allreduce(job.channel, work, job.arena, key)
        return True

    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """See `Strategy.write_average`."""
        work = self._work
        assert work is not None, "nothing was summed"
        if self.job.bucket.residual is None:
            scale = 1.0 / self.job.channel.size  # what was summed is the gradient as it came
        work.mul_(scale)
        if work is not out:
            out.copy_(work)

    def interrupted(self) -> None:
        """What is summed in place must not pass for a gradient when half of it is there."""
        if self._work is self.job.grad:
            self.job.grad.fill_(math.nan)
