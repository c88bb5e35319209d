"""Chunked: the chunks with the largest norms over all ranks, summed densely in 16 bits (GradientFlow's CSC)."""

from __future__ import annotations

import torch

from sparsecomm.collectives import DenseSum, dense_allreduce, dense_allreduce_bytes
from sparsecomm.compress import ChunkTopK, Compressor, Places, largest_chunks
from sparsecomm.errors import ConfigError
from sparsecomm.exchange.agree import agreement_bytes
from sparsecomm.exchange.method import dense_wire, register
from sparsecomm.exchange.methods.packed import Packed
from sparsecomm.feedback import Taken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import CollectiveKind

__all__ = ["Chunked"]


@register
class Chunked(Packed):
    """Sums the L1 norms of all chunks first; all ranks then hold the same bits and take the same chunks."""

    name = "chunked"
    kind = CollectiveKind.CHUNKED

    _chunk: int
    _norms: torch.Tensor

    @classmethod
    def estimate_bytes(
        cls, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> int:
        """See `Strategy.estimate_bytes`. Of chunks of the default length; shorter ones have more norms."""
        norms = dense_allreduce_bytes(ChunkTopK().chunks_of(numel), size, ValueCodec.FP32)
        return agreement_bytes(size) + norms + dense_allreduce_bytes(k, size, dense_wire(value_codec))

    @classmethod
    def compressor_at(cls, density: float) -> Compressor:
        """See `Strategy.compressor_at`."""
        return ChunkTopK(density)

    def take(self) -> Taken:
        """See `Strategy.take`."""
        job, compressor = self.job, self.job.plan.compressor
        if not isinstance(compressor, ChunkTopK):
            raise ConfigError(f"collective 'chunked' needs a ChunkTopK, got {compressor!r}")
        self._chunk, chunks = compressor.chunk, compressor.chunks_of(job.grad.numel())
        self._norms = job.arena.get((job.bucket.index, "norms"), chunks, torch.float32)
        return job.accumulate((self._chunk, self._norms))

    def tag(self) -> int:
        """The length of a chunk."""
        return self._chunk

    def find(self) -> CollectiveSteps[Places]:
        """See `Packed.find`."""
        job, norms = self.job, self._norms
        yield from dense_allreduce(job.channel, DenseSum(norms), job.arena, job.bucket.index)
        chunks = largest_chunks(norms, -(-job.plan.k // self._chunk))
        return Places(chunks, self._chunk, job.grad.numel())
