"""Shared indices: the same positions on all ranks, drawn from a seed or chosen by one rank for all (CLT-k)."""

from __future__ import annotations

import torch

from sparsecomm.collectives import broadcast, broadcast_bytes, dense_allreduce_bytes
from sparsecomm.compress import Compressor, CyclicTopK, Places, SharedPositions
from sparsecomm.errors import ConfigError, WireError
from sparsecomm.exchange.agree import agreement_bytes
from sparsecomm.exchange.method import dense_wire, register
from sparsecomm.exchange.methods.packed import Packed
from sparsecomm.feedback import Taken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import (
    POSITIONS_HEADER_BYTES,
    CollectiveKind,
    decode_positions,
    encode_positions,
    max_positions_bytes,
    positions_bytes,
    read_positions_header,
)

__all__ = ["SharedIndex"]


@register
class SharedIndex(Packed):
    """Takes the positions that the compressor draws, or those of the rank that leads this step."""

    name = "shared_index"
    kind = CollectiveKind.SHARED_INDEX

    _compressor: SharedPositions
    _leader: int | None = None
    _drawn: torch.Tensor
    _indices: torch.Tensor
    _message: torch.Tensor

    @classmethod
    def estimate_bytes(
        cls, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> int:
        """See `Strategy.estimate_bytes`. Of the leader; where nobody leads no positions travel."""
        positions = broadcast_bytes(positions_bytes(k, numel, index_codec), size)
        return agreement_bytes(size) + positions + dense_allreduce_bytes(k, size, dense_wire(value_codec))

    @classmethod
    def compressor_at(cls, density: float) -> Compressor:
        """See `Strategy.compressor_at`."""
        return CyclicTopK(density)

    def take(self) -> Taken:
        """See `Strategy.take`. The leader selects, and puts what it has selected back."""
        job, plan = self.job, self.job.plan
        if not isinstance(plan.compressor, SharedPositions):
            raise ConfigError(f"collective 'shared_index' needs a RandomK or CyclicTopK, got {plan.compressor!r}")
        self._compressor = plan.compressor
        self._leader = plan.compressor.leader(plan.step, job.channel.size)
        if self._leader == job.channel.rank:
            taken = job.take_some()
            self._indices = taken.put_back()
            return taken
        taken = job.accumulate()
        if self._leader is None:
            marks = job.arena.get("marks", job.grad.numel(), torch.uint8)  # free again at once: all buckets share it
            self._drawn = plan.compressor.positions(plan.k, plan.step, job.bucket.layout.hash, marks)
        return taken

    def tag(self) -> int:
        """The compressor's."""
        return self._compressor.tag

    def encode(self, taken: Taken) -> None:
        """Makes the header and, on the leader, the message with its positions."""
        super().encode(taken)
        job = self.job
        if self._leader == job.channel.rank and job.channel.size > 1:
            codec, numel = job.plan.index_codec, job.grad.numel()
            most = max(max_positions_bytes(n, numel, codec) for n in (self._indices.numel(), job.plan.k))
            room = job.arena.get((job.bucket.index, "positions"), most, torch.uint8)
            self._message = room[: encode_positions(self._indices, numel, codec, room)]

    def find(self) -> CollectiveSteps[Places]:
        """See `Packed.find`."""
        job, numel = self.job, self.job.grad.numel()
        if self._leader is None:
            return Places(self._drawn, 1, numel)
        if job.channel.size > 1:
            yield from self._spread(self._leader)
        return Places(self._indices.to(torch.int64), 1, numel)

    def _spread(self, leader: int) -> CollectiveSteps[None]:
        """Sends the leader's positions to all: the header, which tells how long the rest is, then the rest."""
        job, key, numel = self.job, self.job.bucket.index, self.job.grad.numel()
        if leader == job.channel.rank:
            head, body = self._message[:POSITIONS_HEADER_BYTES], self._message[POSITIONS_HEADER_BYTES:]
            yield from broadcast(job.channel, head, leader)
            if body.numel():
                yield from broadcast(job.channel, body, leader)
            return
        head = job.arena.get((key, "positions header"), POSITIONS_HEADER_BYTES, torch.uint8)
        yield from broadcast(job.channel, head, leader)
        try:
            header = read_positions_header(head, numel, job.plan.k)
            body = job.arena.get((key, "positions"), header.index_bytes, torch.uint8)
            if body.numel():
                yield from broadcast(job.channel, body, leader)
            self._indices = job.arena.get((key, "shared"), header.nnz, torch.uint32, reserve=job.plan.k)
            decode_positions(header, body, numel, self._indices)
        except WireError as error:
            raise error.at(rank=leader, bucket=key) from None
