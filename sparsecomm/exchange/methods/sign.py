"""1-bit signs: every rank sends its signs and its scale to all ranks. For comparison.

The products of signs and scales are summed in rank order. A sign cannot be zero, so a rank omits the spans of
parameters that it has not used from its payload.
"""

from __future__ import annotations

import math

import torch
from typing_extensions import override

from sparsecomm.collectives import allgatherv_direct
from sparsecomm.exchange.agree import Agreement
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import Method, Scope, register
from sparsecomm.feedback import WholeTaken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import Sizes
from sparsecomm.wire import (
    HEADER_BYTES,
    Header,
    HeaderRules,
    add_signs,
    check_signs,
    encode_signs,
    max_signs_bytes,
    read_spans,
)

__all__ = ["Signs"]

_LARGEST = float(torch.finfo(torch.float32).max)


@register
class Signs(Method):
    """EF-signSGD: the accumulated gradient minus sign times scale stays in the residual."""

    name = "sign"
    number = 9
    has_body = True
    scope = Scope.OWN

    _taken: WholeTaken
    _headers: list[Header]
    _bodies: list[torch.Tensor]
    _sum: torch.Tensor

    @classmethod
    @override
    def bytes_sent(cls, sizes: Sizes) -> int:
        return (sizes.ranks - 1) * max_signs_bytes(sizes.numel, 0)

    @classmethod
    @override
    def rounds(cls, ranks: int) -> int:
        """Every rank sends its body to all others at once."""
        return (ranks - 1).bit_length() + min(1, ranks - 1)

    @classmethod
    @override
    def seconds(cls, sizes: Sizes, costs: Costs) -> Estimate:
        """Signs are packed once; they are unpacked and added once per rank and once for the residual."""
        compute = costs.exchange + (4 * costs.add + (sizes.ranks + 1) * (costs.add + 4 * costs.fill)) * sizes.numel
        return Estimate(costs.alpha * cls.rounds(sizes.ranks) + costs.beta * cls.bytes_sent(sizes), compute)

    @classmethod
    @override
    def header_rules(cls) -> HeaderRules:
        """Bodies consist of spans and signs."""
        return HeaderRules(cls.number, cls.name.upper(), check_signs)

    @override
    def take(self) -> WholeTaken:
        self._taken = self.exchange.take_whole()
        return self._taken

    @override
    def encode(self) -> None:
        """Writes the payload and computes the next residual."""
        exchange, key, numel = self.exchange, self.exchange.memory.index, self.exchange.grad.numel()
        residual = exchange.memory.residual
        assert residual is not None, "signs need a residual"
        spans = [(start, end) for start, end in sorted(exchange.plan.unused) if start < end]
        self.header = exchange.header()
        self.payload = exchange.arena.get((key, "payload"), max_signs_bytes(numel, len(spans)), torch.uint8)
        encode_signs(self.header, residual, spans, self.payload)
        rest = exchange.arena.get((key, "rest"), numel, torch.float32).copy_(residual)
        add_signs(self.header, self._mine, spans, rest, sub=True)
        self._taken.rest = rest

    @property
    def _mine(self) -> torch.Tensor:
        return self.payload[HEADER_BYTES : HEADER_BYTES + self.header.body_bytes]

    @override
    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        """Gathers the bodies, unless the sum of the scales, which bounds every element, exceeds float32."""
        exchange, self._headers = self.exchange, agreement.headers
        if math.fsum(h.value_scale for h in self._headers if h.nnz) > _LARGEST:
            return False
        lengths = [h.body_bytes for h in self._headers]
        self._bodies = yield from allgatherv_direct(
            exchange.channel, self._mine, lengths, exchange.arena, exchange.memory.index
        )
        return True

    @override
    def decode(self) -> None:
        """Checks every rank's payload, then adds all of them in rank order."""
        spans = [read_spans(*pair) for pair in zip(self._headers, self._bodies, strict=True)]
        # Applied before another bucket runs on this thread, so all buckets share it.
        self._sum = self.exchange.arena.get("sum of signs", self.exchange.grad.numel(), torch.float32).zero_()
        for header, body, left_out in zip(self._headers, self._bodies, spans, strict=True):
            add_signs(header, body, left_out, self._sum)

    @override
    def write_average(self, out: torch.Tensor, scale: float) -> None:
        out.copy_(self._sum.mul_(scale))
