"""Everything, the residual included, summed densely; what 16 bits round off on the way goes back to the residual."""

from __future__ import annotations

import math

import torch

from sparsecomm.collectives import DenseSum, dense_allreduce, dense_ring_bytes, dense_seconds
from sparsecomm.compress import Compressor
from sparsecomm.compress import Dense as DenseCompressor
from sparsecomm.exchange.agree import Agreement
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import Strategy, dense_wire, register
from sparsecomm.feedback import Taken
from sparsecomm.runtime.device import side_of
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import HEADER_BYTES, CollectiveKind

__all__ = ["Dense"]


@register
class Dense(Strategy):
    """Sums the residuals, or the gradients where nothing was ever left over."""

    name = "dense"
    kind = CollectiveKind.DENSE
    needs_residual = False
    on_device = True

    _work: torch.Tensor | None = None
    _taken: Taken

    @classmethod
    def estimate_bytes(
        cls, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> int:
        """See `Strategy.estimate_bytes`."""
        return dense_ring_bytes(numel, size, dense_wire(value_codec)) + HEADER_BYTES * (size - 1)

    @classmethod
    def compressor_at(cls, density: float) -> Compressor:
        """See `Strategy.compressor_at`; there is no other density than 1."""
        return DenseCompressor()

    @classmethod
    def estimate(
        cls, costs: Costs, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> Estimate:
        """See `Strategy.estimate`. In float32 the gradient is summed in place; else there is a residual to keep."""
        wire = dense_wire(value_codec)
        link = dense_seconds(numel, size, wire, alpha=costs.alpha, beta=costs.beta, add=costs.add)
        agreement = costs.alpha * (size - 1).bit_length()
        around = 0.0 if wire == ValueCodec.FP32 else costs.add + 2 * costs.fill
        return Estimate(link + agreement, costs.exchange + around * numel)

    def take(self) -> Taken:
        """See `Strategy.take`."""
        return self.job.take_all(exact=dense_wire(self.job.plan.value_codec) == ValueCodec.FP32)

    def encode(self, taken: Taken) -> None:
        """Makes the header, which is all that goes ahead."""
        self._taken = taken
        self.header = self.job.header()
        self.header.value_codec = dense_wire(self.job.plan.value_codec)
        self.bare_payload()

    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        """See `Strategy.communicate`."""
        job, grad, key = self.job, self.job.grad, self.job.bucket.index
        residual = None if self._taken.direct else job.bucket.residual
        work, wire = grad, self.header.value_codec
        if residual is not None or grad.dtype != torch.float32 or not grad.is_cpu:
            # The gradient itself stays intact until the sum has arrived, so that a failure can be undone. All of it is
            # sent, so that from a GPU all of it comes to the host.
            work = job.arena.get((key, "work"), grad.numel(), torch.float32)
            side_of(grad.device).fetch(grad if residual is None else residual, work)
        if residual is not None and wire != ValueCodec.FP32:
            self._taken.left = job.arena.get((key, "left"), grad.numel(), torch.float32)
        self._work = work
        scale = (job.plan.grad_scale if residual is not None else 1.0) / job.channel.size
        yield from dense_allreduce(job.channel, DenseSum(work, wire, scale, self._taken.left), job.arena, key)
        # With a residual NaN and infinity were found when the gradient was added. Without, they matter only where other
        # buckets would have to be taken back with this one.
        return job.settle or residual is not None or _is_finite(work)

    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """See `Strategy.write_average`. The owners have scaled already, before they rounded."""
        assert self._work is not None, "nothing was summed"
        if self._work is not out:
            out.copy_(self._work, non_blocking=True)

    def interrupted(self) -> None:
        """What is summed in place must not pass for a gradient when half of it is there."""
        if self._work is self.job.grad:
            self.job.grad.fill_(math.nan)


def _is_finite(vector: torch.Tensor) -> bool:
    return not vector.numel() or bool(torch.stack(torch.aminmax(vector)).isfinite().all())
