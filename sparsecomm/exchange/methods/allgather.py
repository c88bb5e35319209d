"""Sparse allgather: every rank sends its selection to all ranks. Best for few ranks or low density.

The selections are summed in rank order. Cost: ceil(log2 P) messages for the headers, P - 1 for the bodies, and
(P - 1) (k b + 88) bytes, with b bytes per nonzero.
"""

from __future__ import annotations

import math

import torch
from typing_extensions import override

from sparsecomm import kernels
from sparsecomm.collectives import allgatherv_direct
from sparsecomm.exchange.agree import Agreement
from sparsecomm.exchange.inferred import InferredSum, infer_sum
from sparsecomm.exchange.method import Method, register
from sparsecomm.feedback import SelectedTaken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import Codecs, Pairs, Sizes, ValueCodec
from sparsecomm.wire import (
    HEADER_BYTES,
    Header,
    body_bytes,
    choose_index_codec,
    decode_bodies,
    encode_payload,
    largest_value,
    max_payload_bytes,
)

__all__ = ["Allgather"]

_LARGEST = torch.finfo(torch.float32).max


@register
class Allgather(Method):
    """Sends the selection to all ranks as one payload, whose header travels ahead in the agreement."""

    name = "allgather"
    number = 1
    has_body = True
    on_device = True

    _taken: SelectedTaken
    _most: int
    _headers: list[Header]
    _bodies: list[torch.Tensor]
    _parts: list[Pairs]
    _inferred: InferredSum | None = None

    @classmethod
    @override
    def bytes_sent(cls, sizes: Sizes) -> int:
        codecs = Codecs(sizes.values, sizes.indices)
        return (sizes.ranks - 1) * (body_bytes(sizes.k, sizes.numel, codecs) + HEADER_BYTES)

    @classmethod
    @override
    def rounds(cls, ranks: int) -> int:
        """Every rank sends its body to all others at once."""
        return (ranks - 1).bit_length() + min(1, ranks - 1)

    @override
    def take(self) -> SelectedTaken:
        self._taken = self.exchange.take_some()
        return self._taken

    @override
    def encode(self) -> None:
        """Writes the payload and adds the rounding to the residual; undoing the step overwrites both."""
        exchange, taken = self.exchange, self._taken
        plan, memory, numel = exchange.plan, exchange.memory, exchange.grad.numel()
        nnz = taken.nnz
        header = self.header = exchange.header()
        header.value_codec = plan.value_codec
        header.index_codec = choose_index_codec(nnz, numel) if plan.index_codec is None else plan.index_codec
        # Index bytes may shrink as nnz grows (a full selection has no gaps), so take the larger bound.
        counts = (nnz, max(nnz, taken.capacity))
        self._most = max(max_payload_bytes(header.index_codec, plan.value_codec, count, numel) for count in counts)
        self.payload = exchange.arena.get((memory.index, "payload"), self._most, torch.uint8)
        # Needed only until the end of this method, so all buckets share it.
        error = exchange.workspace.get("rounding", nnz, torch.float32, reserve=taken.capacity)
        encode_payload(header, taken.indices, taken.values, self.payload, error)
        if plan.value_codec != ValueCodec.FP32 and memory.residual is not None:
            kernels.scatter_add(memory.residual, taken.indices, error)

    @override
    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        exchange = self.exchange
        mine = self.payload[HEADER_BYTES : HEADER_BYTES + self.header.body_bytes]
        self._headers = agreement.headers
        lengths = [h.body_bytes for h in self._headers]
        reserve = self._most - HEADER_BYTES
        self._bodies = yield from allgatherv_direct(
            exchange.channel, mine, lengths, exchange.arena, exchange.memory.index, reserve=reserve
        )
        return True

    @override
    def decode(self) -> None:
        """Decodes and checks every rank's payload.

        The values of this rank are decoded like all others, since all ranks must add the same rounded numbers. Its
        indices are known and not decoded.
        """
        workspace, taken, headers = self.exchange.workspace, self._taken, self._headers
        total, most = sum(h.nnz for h in headers), taken.capacity * len(headers)
        # All buckets share these: write_average reads them before this thread runs another bucket. They stay in cache.
        indices = workspace.get("decoded indices", total, torch.uint32, reserve=most)
        values = workspace.get("decoded values", total, torch.float32, reserve=most)
        own = (self.exchange.channel.rank, taken.indices)
        self._parts = decode_bodies(headers, self._bodies, indices, values, own)
        largest = math.fsum(map(largest_value, headers, self._bodies))
        self.finite = largest <= _LARGEST or self._sum_is_finite()

    def _sum_is_finite(self) -> bool:
        """Adds up the values and returns whether all sums are finite."""
        exchange = self.exchange
        work = exchange.workspace.get("sum", exchange.grad.numel(), torch.float32)
        kernels.scatter_reduce(work, self._parts, scale=1.0)
        return bool(torch.isfinite(work).all())

    @override
    def write_average(self, out: torch.Tensor, scale: float) -> None:
        exchange = self.exchange
        if not (getattr(exchange.plan.feedback, "aligned", False) and exchange.memory.alignment.count):
            kernels.scatter_reduce(out, self._parts, scale=scale)
            return
        inferred = self._inferred = infer_sum(self._parts, exchange.memory.alignment, exchange.channel.size)
        out.zero_()
        out[inferred.positions] = (inferred.sums * scale).to(out.dtype)

    @override
    def finish(self) -> None:
        """Removes from the residual what the average already holds of it."""
        if self._inferred is not None:
            self._taken.give(*self._inferred.not_sent(self.exchange.channel.rank))
