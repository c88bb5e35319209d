"""Chunked: a dense sum in 16 bits of the chunks with the largest norms over all ranks (GradientFlow's CSC).

Norms are always summed in float32. The sum has the same bits on all ranks, so all ranks choose the same chunks. Of
equal norms the lowest chunk wins. Chunks that are zero on all ranks are not sent.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from typing_extensions import override

from sparsecomm.collectives import DenseSum, dense_allreduce, dense_allreduce_bytes
from sparsecomm.compress import ChunkTopK, Places, largest_chunks
from sparsecomm.errors import ConfigError
from sparsecomm.exchange.agree import agreement_bytes
from sparsecomm.exchange.method import register
from sparsecomm.exchange.methods.packed import Packed
from sparsecomm.exchange.plan import codec_for_sums
from sparsecomm.feedback import PlacesTaken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import Sizes, ValueCodec

__all__ = ["Chunked"]


@register
class Chunked(Packed):
    """Sums the L1 norms of all chunks over the ranks and sends the chunks with the largest."""

    name = "chunked"
    number = 5
    must_match: ClassVar = {"nnz": "k", "value_codec": "value_codec", "tag": "chunk"}

    _chunk: int
    _norms: torch.Tensor

    @classmethod
    @override
    def bytes_sent(cls, sizes: Sizes) -> int:
        """Assumes chunks of the default length; shorter chunks have more norms."""
        norms = dense_allreduce_bytes(ChunkTopK().chunks_of(sizes.numel), sizes.ranks, ValueCodec.FP32)
        values = dense_allreduce_bytes(sizes.k, sizes.ranks, codec_for_sums(sizes.values))
        return agreement_bytes(sizes.ranks) + norms + values

    @override
    def take(self) -> PlacesTaken:
        exchange, compressor = self.exchange, self.exchange.plan.compressor
        if not isinstance(compressor, ChunkTopK):
            raise ConfigError(f"collective 'chunked' needs a ChunkTopK, got {compressor!r}")
        self._chunk, chunks = compressor.chunk, compressor.chunks_of(exchange.grad.numel())
        self._norms = exchange.arena.get((exchange.memory.index, "norms"), chunks, torch.float32)
        self._taken = exchange.accumulate((self._chunk, self._norms))
        return self._taken

    @override
    def tag(self) -> int:
        """Returns the length of a chunk; ranks with different lengths would add values of different positions."""
        return self._chunk

    @override
    def find(self) -> CollectiveSteps[Places]:
        exchange, norms = self.exchange, self._norms
        yield from dense_allreduce(exchange.channel, DenseSum(norms), exchange.arena, exchange.memory.index)
        chunks = largest_chunks(norms, -(-exchange.plan.k // self._chunk))
        return Places(chunks, self._chunk, exchange.grad.numel())
