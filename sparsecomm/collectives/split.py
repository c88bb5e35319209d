"""What a rank brings to a split-reduce: its selection, cut into encoded parts for the owners of the regions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from sparsecomm.arena import Arena
from sparsecomm.collectives.parts import Codecs, Pairs, shifted
from sparsecomm.collectives.regions import Regions
from sparsecomm.transport import Channel
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
    def wanted(self) -> int | None:
        """How many nonzeros to keep in all; None for all there are."""
        return None if self.keep_all or self.channel.size == 1 else self.k

    def region(self, rank: int) -> tuple[int, int]:
        """Returns the first position of a rank's region and its length."""
        assert self.regions is not None, "regions come first"
        start = int(self.regions.bounds[rank])
        return start, int(self.regions.bounds[rank + 1]) - start

    def buffer(self, name: str, numel: int, dtype: torch.dtype, *, reserve: int = 0) -> torch.Tensor:
        """Returns a buffer of this bucket's own."""
        return self.arena.get((self.bucket, "split", name), numel, dtype, reserve=reserve)

    def encode(self, regions: Regions) -> None:
        """Cuts what is selected at these regions and encodes the others' parts. Mutates cuts, parts and error."""
        self.regions = regions
        indices, values = self.pairs
        nnz, here = values.numel(), self.channel.rank
        inner = np.searchsorted(indices.numpy(), regions.bounds[1:-1].astype(np.uint32))
        cuts = self.cuts = [0, *inner.tolist(), nnz]
        rooms = [0] * self.channel.size
        for r in range(self.channel.size):
            if r != here:
                span = self.region(r)[1]
                rooms[r] = max_part_bytes(cuts[r + 1] - cuts[r], span, self.codecs.values, self.codecs.indices)
        total = sum(rooms)
        out = self.buffer("parts", total, torch.uint8, reserve=total * self.capacity // max(nnz, 1))
        self.error = self.buffer("error", nnz, torch.float32, reserve=self.capacity)
        self.error[cuts[here] : cuts[here + 1]] = 0.0
        self.parts, offset = {}, 0
        for r in range(self.channel.size):
            if r == here:
                continue
            start, span = self.region(r)
            first, last = cuts[r], cuts[r + 1]
            relative = self.relative(first, last, start)
            room = out[offset : offset + rooms[r]]
            written = encode_part(
                relative,
                values[first:last],
                span,
                self.codecs.values,
                self.codecs.indices,
                room,
                self.error[first:last],
            )
            self.parts[r] = room[:written]
            offset += written

    def relative(self, first: int, last: int, start: int) -> torch.Tensor:
        """Returns some of the selected positions relative to a region's start, in a buffer that all buckets share."""
        chosen = self.pairs[0][first:last]
        return shifted(chosen, -start, self.arena.get("relative indices", last - first, torch.uint32))
