"""Sparse allgather: every rank's selection to all ranks, summed in rank order. Best for few ranks or low density."""

from __future__ import annotations

import torch

from sparsecomm import kernels
from sparsecomm.collectives import allgather_bodies
from sparsecomm.exchange.agree import Agreement
from sparsecomm.exchange.method import Strategy, register
from sparsecomm.feedback import Taken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import (
    HEADER_BYTES,
    CollectiveKind,
    Header,
    choose_index_codec,
    decode_bodies,
    encode_payload,
    max_payload_bytes,
)
from sparsecomm.wire.pairs import body_bytes

__all__ = ["Allgather", "allgather_bytes"]


@register
class Allgather(Strategy):
    """Sends the selection to all ranks, as one payload whose header goes ahead."""

    name = "allgather"
    kind = CollectiveKind.ALLGATHER
    gathers_headers = True
    on_device = True

    _taken: Taken
    _most: int
    _headers: list[Header]
    _bodies: list[torch.Tensor]
    _parts: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def estimate_bytes(
        cls, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> int:
        """See `Strategy.estimate_bytes`."""
        return allgather_bytes(k, numel, size, value_codec, index_codec)

    @classmethod
    def rounds(cls, size: int) -> int:
        """See `Strategy.rounds`. Bodies go to each rank directly, all at once."""
        return (size - 1).bit_length() + min(1, size - 1)

    def take(self) -> Taken:
        """See `Strategy.take`."""
        return self.job.take_some()

    def encode(self, taken: Taken) -> None:
        """Writes the payload and gives the residual what rounding drops; undoing the step overwrites that."""
        plan, arena, bucket = self.job.plan, self.job.arena, self.job.bucket
        nnz, numel = taken.values.numel(), self.job.grad.numel()
        header = self.header = self.job.header()
        header.value_codec = plan.value_codec
        header.index_codec = choose_index_codec(nnz, numel) if plan.index_codec is None else plan.index_codec
        # Index bytes need not grow with nnz (no gaps are left when all is sent), so both ends are asked.
        sizes = (nnz, max(nnz, taken.capacity))
        self._taken = taken
        self._most = max(max_payload_bytes(header.index_codec, plan.value_codec, size, numel) for size in sizes)
        self.payload = arena.get((bucket.index, "payload"), self._most, torch.uint8)
        # Free again at once: all buckets share it.
        error = self.job.memory.get("rounding", nnz, torch.float32, reserve=taken.capacity)
        encode_payload(header, taken.indices, taken.values, self.payload, error)
        if plan.value_codec != ValueCodec.FP32 and bucket.residual is not None:
            kernels.scatter_add(bucket.residual, taken.indices, error)

    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        """See `Strategy.communicate`."""
        job = self.job
        mine = self.payload[HEADER_BYTES : HEADER_BYTES + self.header.body_bytes]
        self._headers = agreement.headers
        lengths = [h.body_bytes for h in self._headers]
        reserve = self._most - HEADER_BYTES
        self._bodies = yield from allgather_bodies(
            job.channel, mine, lengths, job.arena, job.bucket.index, reserve=reserve
        )
        return True

    def decode(self) -> None:
        """Decodes and checks every rank's payload.

        This rank's own values are decoded like all others, since all ranks must add the same rounded numbers; its own
        indices are at hand.
        """
        memory, taken, headers = self.job.memory, self._taken, self._headers
        total, most = sum(h.nnz for h in headers), taken.capacity * len(headers)
        # Applied before anything else runs on this thread, so all buckets share these, which also keeps them in cache.
        indices = memory.get("decoded indices", total, torch.uint32, reserve=most)
        values = memory.get("decoded values", total, torch.float32, reserve=most)
        self._parts = decode_bodies(headers, self._bodies, indices, values, (self.job.channel.rank, taken.indices))

    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """See `Strategy.write_average`."""
        kernels.scatter_reduce(out, self._parts, scale=scale)


def allgather_bytes(k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None) -> int:
    """Returns the bytes one rank is expected to send in a sparse allgather. Arguments as in `choose_collective`."""
    return (size - 1) * (body_bytes(k, numel, value_codec, index_codec) + HEADER_BYTES)
