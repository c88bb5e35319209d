"""What a rank brings to a split-reduce: its selection, cut into encoded parts for the owners of the regions."""

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
    """One rank's part in a split-reduce.

    Attributes:
        channel: the ranks.
        arena: gives all buffers.
        bucket: bucket number, names them.
        step: training step.
        numel: elements of the bucket.
        pairs: what this rank has selected; must stay until the end.
        capacity: how many it may select in other steps.
        k: how many it was asked to select, the same on all ranks.
        codecs: how parts are written.
        keep_all: keep whatever is reduced, not about k of it.
        regions: in use.
        cuts: where in `pairs` each region starts, and the end.
        parts: encoded parts by their destination.
        error: float32, shape (nnz,): what rounding drops of `pairs`; 0 in the own region.
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
    error: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def context(self) -> Context:
        """The ranks, the buffers and the bucket."""
        return Context(self.channel, self.arena, self.bucket)

    @property
    def wanted(self) -> int | None:
        """How many nonzeros to keep in all; None for all there are."""
        return None if self.keep_all or self.channel.size == 1 else self.k

    @property
    def here(self) -> int:
        """The region that this rank owns."""
        assert self.regions is not None, "regions come first"
        return self.regions.owners.index(self.channel.rank)

    def buffer(self, name: str, numel: int, dtype: torch.dtype, *, reserve: int = 0) -> torch.Tensor:
        """Returns a buffer of this bucket's own."""
        return self.arena.get((self.bucket, "split", name), numel, dtype, reserve=reserve)

    def encode(self, regions: Regions) -> None:
        """Cuts what is selected at these regions and encodes the others' parts. Mutates cuts, parts and error."""
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
        """Returns some of the selected positions relative to a region's start, in a buffer that all buckets share."""
        chosen = self.pairs[0][first:last]
        out = self.arena.get("relative indices", last - first, torch.uint32, reserve=self.capacity)
        return shifted(chosen, -start, out)
