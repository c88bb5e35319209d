"""Shared indices: all ranks use the same positions, drawn from a seed or selected by a leader (CLT-k).

The positions of a leader travel down a binomial tree in two broadcasts of ceil(log2 P) rounds each. The first carries
the header with the length, the second the body.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from typing_extensions import override

from sparsecomm.collectives import broadcast, broadcast_bytes, dense_allreduce_bytes
from sparsecomm.compress import Places, SharedPositions
from sparsecomm.errors import ConfigError, WireError
from sparsecomm.exchange.agree import agreement_bytes
from sparsecomm.exchange.method import register
from sparsecomm.exchange.methods.packed import Packed
from sparsecomm.exchange.plan import codec_for_sums
from sparsecomm.feedback import PlacesTaken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import Sizes
from sparsecomm.wire import (
    POSITIONS_HEADER_BYTES,
    decode_positions,
    encode_positions,
    max_positions_bytes,
    positions_bytes,
    read_positions_header,
)

__all__ = ["SharedIndex"]


@register
class SharedIndex(Packed):
    """Sends the elements at positions that the compressor draws, or that the leader of this step selects."""

    name = "shared_index"
    number = 6
    must_match: ClassVar = {"nnz": "k", "value_codec": "value_codec", "tag": "seed"}

    _compressor: SharedPositions
    _leader: int | None = None
    _drawn: torch.Tensor
    _indices: torch.Tensor
    _message: torch.Tensor

    @classmethod
    @override
    def bytes_sent(cls, sizes: Sizes) -> int:
        """Assumes a leader, which sends most. Without a leader no positions travel."""
        positions = broadcast_bytes(positions_bytes(sizes.k, sizes.numel, sizes.indices), sizes.ranks)
        values = dense_allreduce_bytes(sizes.k, sizes.ranks, codec_for_sums(sizes.values))
        return agreement_bytes(sizes.ranks) + positions + values

    @classmethod
    @override
    def show(cls, field: str, value: Any) -> str:
        """The tag is 1 + the seed of the sample, or 0 if there is a leader."""
        if field == "tag":
            return str(value - 1) if value else "none (a rank leads)"
        return super().show(field, value)

    @override
    def take(self) -> PlacesTaken:
        """Adds the gradient; the leader selects positions and returns the selected values to the residual."""
        exchange, plan = self.exchange, self.exchange.plan
        if not isinstance(plan.compressor, SharedPositions):
            raise ConfigError(f"collective 'shared_index' needs a RandomK or CyclicTopK, got {plan.compressor!r}")
        self._compressor = plan.compressor
        self._leader = plan.compressor.leader(plan.step, exchange.channel.size)
        if self._leader == exchange.channel.rank:
            self._taken, self._indices = exchange.take_some().as_places()
            return self._taken
        self._taken = exchange.accumulate()
        if self._leader is None:
            # Needed only for this call, so all buckets share it.
            marks = exchange.arena.get("marks", exchange.grad.numel(), torch.uint8)
            self._drawn = plan.compressor.positions(plan.k, plan.step, exchange.memory.layout.hash, marks)
        return self._taken

    @override
    def tag(self) -> int:
        return self._compressor.tag

    @override
    def encode(self) -> None:
        """Writes the header and, on the leader, the message with the positions."""
        super().encode()
        exchange = self.exchange
        if self._leader == exchange.channel.rank and exchange.channel.size > 1:
            codec, numel = exchange.plan.index_codec, exchange.grad.numel()
            most = max(max_positions_bytes(n, numel, codec) for n in (self._indices.numel(), exchange.plan.k))
            room = exchange.arena.get((exchange.memory.index, "positions"), most, torch.uint8)
            self._message = room[: encode_positions(self._indices, numel, codec, room)]

    @override
    def find(self) -> CollectiveSteps[Places]:
        exchange, numel = self.exchange, self.exchange.grad.numel()
        if self._leader is None:
            return Places(self._drawn, 1, numel)
        if exchange.channel.size > 1:
            yield from self._broadcast_positions(self._leader)
        return Places(self._indices.to(torch.int64), 1, numel)

    def _broadcast_positions(self, leader: int) -> CollectiveSteps[None]:
        """Broadcasts the leader's positions. Sets `_indices` on the other ranks. Collective."""
        exchange, key, numel = self.exchange, self.exchange.memory.index, self.exchange.grad.numel()
        channel, arena, k = exchange.channel, exchange.arena, exchange.plan.k
        if leader == channel.rank:
            head, body = self._message[:POSITIONS_HEADER_BYTES], self._message[POSITIONS_HEADER_BYTES:]
            yield from broadcast(channel, head, leader)
            if body.numel():
                yield from broadcast(channel, body, leader)
            return
        head = arena.get((key, "positions header"), POSITIONS_HEADER_BYTES, torch.uint8)
        yield from broadcast(channel, head, leader)
        try:
            header = read_positions_header(head, numel, k)
            body = arena.get((key, "positions"), header.index_bytes, torch.uint8)
            if body.numel():
                yield from broadcast(channel, body, leader)
            self._indices = arena.get((key, "shared"), header.nnz, torch.uint32, reserve=k)
            decode_positions(header, body, numel, self._indices)
        except WireError as error:
            raise error.at(rank=leader, bucket=key) from None
