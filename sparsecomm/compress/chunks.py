"""Top chunks: coarse-grained sparsification, whose positions cost a float a chunk and whose values travel densely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsecomm import kernels
from sparsecomm.compress.base import Selection, SelectionBuffers, SelectorMemory, SparsifyingCompressor, take_out
from sparsecomm.compress.places import Places
from sparsecomm.errors import ConfigError

__all__ = ["ChunkTopK", "largest_chunks"]

_MOST = 2**32 - 1


@dataclass(frozen=True)
class ChunkTopK(SparsifyingCompressor):
    """The chunks with the largest L1 norm summed over ranks (GradientFlow's CSC, Sun et al. 2019).

    All ranks find the same chunks, so that the "chunked" collective, which this needs, sums them densely in 16 bits and
    sends no positions. A bucket of fewer elements than a chunk is one chunk, and always sent: choose chunks much
    smaller than DDP's buckets.

    Attributes:
        density: fraction of the chunks, a number in (0, 1], a schedule, or a callable from step to density.
        chunk: elements of a chunk.
    """

    chunk: int = 32768

    collectives: ClassVar[tuple[str, ...]] = ("chunked",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.chunk, bool) or not isinstance(self.chunk, int) or not 1 <= self.chunk <= _MOST:
            raise ConfigError(f"ChunkTopK.chunk must be an int in 1 .. {_MOST}, got {self.chunk!r}")

    def chunks_of(self, numel: int) -> int:
        """Returns the number of chunks of a bucket, the last one maybe short."""
        return -(-numel // self.chunk)

    def k_for(self, numel: int, step: int) -> int:
        """Returns the elements of as many full chunks as are sent: at least one, density * chunks rounded."""
        return min(numel, super().k_for(self.chunks_of(numel), step) * self.chunk)

    def capacity(self, k: int, numel: int) -> int:
        """Returns room for whole chunks."""
        return min(numel, self.chunks_of(k) * self.chunk)

    def select(
        self,
        grad: torch.Tensor,
        residual: torch.Tensor,
        k: int,
        memory: SelectorMemory,
        out: SelectionBuffers,
        *,
        scale: float = 1.0,
    ) -> Selection:
        """See `Compressor.select`. Takes the chunks that are largest on this rank alone: k rounded up to whole ones."""
        before = residual.clone()
        norms = torch.empty(self.chunks_of(residual.numel()))
        nonfinite = kernels.accumulate_norms(grad, residual, self.chunk, norms, scale=scale)
        positions = Places(largest_chunks(norms, self.chunks_of(k)), self.chunk, residual.numel()).positions()
        return take_out(positions, before, grad, residual, nonfinite, out, scale=scale)


def largest_chunks(norms: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the numbers of the largest norms, int64, ascending, ties to the lowest; zeros are left out.

    Args:
        norms: float32, shape (m,). Mutated: it is used up.
        count: how many at most.
    """
    norms.clamp_(max=torch.finfo(torch.float32).max)  # a sum of finite norms may overflow
    room = min(count, norms.numel())
    indices, values = torch.empty(room, dtype=torch.uint32), torch.empty(room)
    stored = kernels.exact_topk(None, norms, room, indices, values).stored
    return indices[:stored].to(torch.int64)
