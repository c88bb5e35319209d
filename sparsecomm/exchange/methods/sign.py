"""1-bit signs: every rank's signs and scale to all ranks, their products summed in rank order. For comparison."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from sparsecomm.collectives import allgather_bodies
from sparsecomm.compress import Compressor, Sign
from sparsecomm.exchange.agree import Agreement
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import Strategy, register
from sparsecomm.feedback import Taken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import HEADER_BYTES, CollectiveKind, Header, add_signs, encode_signs, max_signs_bytes, read_spans

__all__ = ["Signs"]

_LARGEST = float(torch.finfo(torch.float32).max)


@register
class Signs(Strategy):
    """EF-signSGD. What sign times scale does not say of the accumulated gradient stays in the residual.

    Of parameters that this rank did not use nothing is sent: their spans are left out, since a sign cannot be zero.
    """

    name = "sign"
    kind = CollectiveKind.SIGN
    gathers_headers = True
    special: ClassVar[bool] = True

    _headers: list[Header]
    _bodies: list[torch.Tensor]
    _sum: torch.Tensor

    @classmethod
    def estimate_bytes(
        cls, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> int:
        """See `Strategy.estimate_bytes`."""
        return (size - 1) * max_signs_bytes(numel, 0)

    @classmethod
    def compressor_at(cls, density: float) -> Compressor:
        """See `Strategy.compressor_at`. There is but one density."""
        return Sign()

    @classmethod
    def rounds(cls, size: int) -> int:
        """See `Strategy.rounds`. Bodies go to each rank directly, all at once."""
        return (size - 1).bit_length() + min(1, size - 1)

    @classmethod
    def estimate(
        cls, costs: Costs, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> Estimate:
        """See `Strategy.estimate`: packed once, unpacked and added for every rank and for the residual."""
        sent = cls.estimate_bytes(k, numel, size, value_codec, index_codec)
        compute = costs.exchange + (4 * costs.add + (size + 1) * (costs.add + 4 * costs.fill)) * numel
        return Estimate(costs.alpha * cls.rounds(size) + costs.beta * sent, compute)

    def take(self) -> Taken:
        """See `Strategy.take`."""
        return self.job.take_all()

    def encode(self, taken: Taken) -> None:
        """Writes the payload and notes what it does not say."""
        job, key, numel = self.job, self.job.bucket.index, self.job.grad.numel()
        residual = job.bucket.residual
        assert residual is not None, "signs need a residual"
        spans = [(start, end) for start, end in sorted(job.plan.held) if start < end]
        self.header = job.header()
        self.payload = job.arena.get((key, "payload"), max_signs_bytes(numel, len(spans)), torch.uint8)
        encode_signs(self.header, residual, spans, self.payload)
        taken.left = job.arena.get((key, "left"), numel, torch.float32).copy_(residual)
        add_signs(self.header, self._mine, spans, taken.left, sub=True)

    @property
    def _mine(self) -> torch.Tensor:
        return self.payload[HEADER_BYTES : HEADER_BYTES + self.header.body_bytes]

    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        """See `Strategy.communicate`. The sum of the scales bounds every sum."""
        job, self._headers = self.job, agreement.headers
        if math.fsum(h.value_scale for h in self._headers if h.nnz) > _LARGEST:
            return False
        lengths = [h.body_bytes for h in self._headers]
        self._bodies = yield from allgather_bodies(job.channel, self._mine, lengths, job.arena, job.bucket.index)
        return True

    def decode(self) -> None:
        """Checks every rank's payload, then adds them up in rank order."""
        spans = [read_spans(*pair) for pair in zip(self._headers, self._bodies, strict=True)]
        # Applied before anything else runs on this thread, so all buckets share it.
        self._sum = self.job.arena.get("sum of signs", self.job.grad.numel(), torch.float32).zero_()
        for header, body, left_out in zip(self._headers, self._bodies, spans, strict=True):
            add_signs(header, body, left_out, self._sum)

    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """See `Strategy.write_average`."""
        out.copy_(self._sum.mul_(scale))
