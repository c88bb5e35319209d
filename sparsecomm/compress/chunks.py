"""Top chunks: coarse-grained sparsification. It sends one float per chunk to agree on chunks, then dense values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from sparsecomm import kernels
from sparsecomm.compress.base import Accumulated, Selection, SelectionBuffers, SelectorMemory, SparsifyingCompressor
from sparsecomm.compress.places import Places
from sparsecomm.errors import ConfigError

__all__ = ["ChunkTopK", "largest_chunks"]

_MOST = 2**32 - 1


@dataclass(frozen=True)
class ChunkTopK(SparsifyingCompressor):
    """The chunks with the largest L1 norms, summed over ranks (GradientFlow's CSC, Sun et al. 2019).

    This compressor needs the "chunked" collective. All ranks find the same chunks, so that the collective sums them
    densely in 16 bits and sends no positions. A bucket smaller than a chunk is a single chunk and is always sent, so
    choose chunks much smaller than DDP's buckets.

    Attributes:
        density: fraction of chunks to send: a number in (0, 1], a schedule, or a callable from step to density.
        chunk: elements per chunk.
    """

    chunk: int = 32768

    collectives: ClassVar[tuple[str, ...]] = ("chunked",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.chunk, bool) or not isinstance(self.chunk, int) or not 1 <= self.chunk <= _MOST:
            raise ConfigError(f"ChunkTopK.chunk must be an int in 1 .. {_MOST}, got {self.chunk!r}")

    def chunks_of(self, numel: int) -> int:
        """Returns the number of chunks in a bucket; the last one may be short."""
        return -(-numel // self.chunk)

    @override
    def k_for(self, numel: int, step: int) -> int:
        """Counts whole chunks: density * chunks, rounded, and at least one."""
        return min(numel, super().k_for(self.chunks_of(numel), step) * self.chunk)

    @override
    def capacity(self, k: int, numel: int) -> int:
        """Rounds k up to whole chunks."""
        return min(numel, self.chunks_of(k) * self.chunk)

    @override
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
        """Takes the chunks that are largest on this rank alone; k is rounded up to whole chunks."""
        before = residual.clone()
        norms = torch.empty(self.chunks_of(residual.numel()), dtype=torch.float32)
        nonfinite = kernels.accumulate_norms(grad, residual, self.chunk, norms, scale=scale)
        positions = Places(largest_chunks(norms, self.chunks_of(k)), self.chunk, residual.numel()).positions()
        return Accumulated(grad, scale, before, residual, nonfinite).take_out(positions, out)


def largest_chunks(norms: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the numbers of the chunks with the largest norms, int64, ascending. Zero norms are left out.

    Among equal norms the lowest number wins.

    Args:
        norms: float32, shape (m,). Mutated: used as work space.
        count: maximal number of chunks.
    """
    norms.clamp_(max=torch.finfo(torch.float32).max)  # a sum of finite norms may overflow
    room = min(count, norms.numel())
    indices, values = torch.empty(room, dtype=torch.uint32), torch.empty(room, dtype=torch.float32)
    stored = kernels.exact_topk(None, norms, room, indices, values).stored
    return indices[:stored].to(torch.int64)
