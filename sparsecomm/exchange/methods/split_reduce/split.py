"""The selection of a rank in a split-reduce, cut into encoded parts for the owners of regions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from sparsecomm.exchange.methods.split_reduce.context import Context
from sparsecomm.exchange.methods.split_reduce.parts import shifted
from sparsecomm.exchange.methods.split_reduce.regions import Regions
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel
from sparsecomm.types import Codecs, Pairs
from sparsecomm.wire import encode_part, max_part_bytes

__all__ = ["Split"]


@dataclass(slots=True)
class Split:
    """The selection of one rank in a split-reduce, and its encoded parts.

    Attributes:
        channel: connection to the other ranks.
        arena: allocates all buffers.
        bucket: bucket number, part of the names of buffers.
        step: training step.
        numel: elements of the bucket.
        pairs: the selection of this rank; must not change before the exchange ends.
        capacity: largest selection in any step; sizes buffers.
        k: requested number of selected elements, the same on all ranks.
        codecs: codecs of the parts.
        keep_all: whether all sums are kept, not about k of them.
        regions: regions in use; None before `encode`.
        cuts: first entry of each region in `pairs`, then the number of pairs.
        parts: encoded parts by destination.
        error: float32, shape (nnz,), rounding of `pairs`; 0 in the region of this rank.
    """

    channel: Channel
    arena: Arena
    bucket: int
    step: int
    numel: int
    pairs: Pairs
    capacity: int
    k: int
    codecs: Codecs
    keep_all: bool = False
    regions: Regions | None = None
    cuts: list[int] = field(default_factory=list)
    parts: dict[int, torch.Tensor] = field(default_factory=dict)
    error: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))

    @property
    def context(self) -> Context:
        """Channel, arena and bucket."""
        return Context(self.channel, self.arena, self.bucket)

    @property
    def wanted(self) -> int | None:
        """Number of sums that all owners together should keep; None to keep all sums."""
        return None if self.keep_all or self.channel.size == 1 else self.k

    @property
    def here(self) -> int:
        """Number of the region that this rank owns."""
        assert self.regions is not None, "regions come first"
        return self.regions.owners.index(self.channel.rank)

    def buffer(self, name: str, numel: int, dtype: torch.dtype, *, reserve: int = 0) -> torch.Tensor:
        """Returns a buffer that only this bucket uses."""
        return self.arena.get((self.bucket, "split", name), numel, dtype, reserve=reserve)

    def encode(self, regions: Regions) -> None:
        """Cuts the selection into these regions and encodes the parts of other owners. Sets cuts, parts and error."""
        self.regions = regions
        indices, values = self.pairs
        nnz, here, size, codecs = values.numel(), self.here, self.channel.size, self.codecs
        inner = np.searchsorted(indices.numpy(), regions.bounds[1:-1].astype(np.uint32))
        cuts = self.cuts = [0, *inner.tolist(), nnz]
        rooms = [max_part_bytes(cuts[g + 1] - cuts[g], regions.place(g)[1], codecs) for g in range(size)]
        total = sum(rooms)
        out = self.buffer("parts", total, torch.uint8, reserve=total * self.capacity // max(nnz, 1))
        self.error = self.buffer("error", nnz, torch.float32, reserve=self.capacity)
        self.parts, offset = {}, 0
        for g in range(size):
            first, last = cuts[g], cuts[g + 1]
            if g == here:
                self.error[first:last] = 0.0
                continue
            start, span = regions.place(g)
            room, error = out[offset : offset + rooms[g]], self.error[first:last]
            relative = self.relative(first, last, start)
            written = encode_part(relative, values[first:last], span, codecs, room, error)
            self.parts[regions.owners[g]] = room[:written]
            offset += written

    def relative(self, first: int, last: int, start: int) -> torch.Tensor:
        """Returns selected positions first to last - 1, relative to `start`, in a buffer that all buckets share."""
        chosen = self.pairs[0][first:last]
        out = self.arena.get("relative indices", last - first, torch.uint32, reserve=self.capacity)
        return shifted(chosen, -start, out)
