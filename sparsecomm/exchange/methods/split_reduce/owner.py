"""The owner of a region in a split-reduce: collects its parts, adds them, keeps the largest sums and encodes them."""

from __future__ import annotations

import numpy as np
import torch

from sparsecomm import kernels
from sparsecomm.exchange.methods.split_reduce.parts import Arrival, decode_pairs, exchange_parts, shifted
from sparsecomm.exchange.methods.split_reduce.regions import KEEP_ALL
from sparsecomm.exchange.methods.split_reduce.segments import Segment
from sparsecomm.exchange.methods.split_reduce.split import Split
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import Pairs
from sparsecomm.wire import encode_part, max_part_bytes

__all__ = ["Owner"]


class Owner:
    """The owner of a region, with the sums of the region and the kept ones.

    Args:
        split: the selection of this rank, with `regions` set.

    Attributes:
        split: the selection of this rank.
        start: first position of the region.
        span: length of the region.
        all_indices: uint32, positions of all nonzero sums, relative to `start`, ascending.
        all_values: float32, all nonzero sums.
        indices: uint32, positions of the kept sums, relative to `start`, ascending.
        values: float32, the kept sums.
        dropped: float32, as long as `all_values`: the dropped sums, with 0 for a kept sum.
        error: float32, rounding of `values`.
        finite: whether all sums are finite.
        block: uint8, the encoded kept sums.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        assert split.regions is not None, "regions come first"
        self._regions = split.regions
        self.start, self.span = split.regions.place(split.here)
        self.finite = True
        self._parts: dict[int, Pairs] = {}
        self._turn = 0

    def collect(self) -> CollectiveSteps[None]:
        """Step 2: sends the parts of this rank, receives and decodes the parts of its region. Collective."""
        split, here = self.split, self.split.channel.rank
        first, last = split.cuts[split.here], split.cuts[split.here + 1]
        mine = split.buffer("own indices", last - first, torch.uint32, reserve=split.capacity)
        self._parts[here] = (shifted(split.pairs[0][first:last], -self.start, mine), split.pairs[1][first:last])
        sources = {r: self.span for r in range(split.channel.size) if r != here}
        yield from exchange_parts(split.context, "split", split.parts, sources, self._decode)

    def _decode(self, arrivals: list[Arrival]) -> None:
        """Decodes the parts of one turn while those of the next turn travel."""
        total = sum(a.header.nnz for a in arrivals)
        indices = self.split.buffer(f"indices {self._turn}", total, torch.uint32, reserve=2 * total)
        values = self.split.buffer(f"values {self._turn}", total, torch.float32, reserve=2 * total)
        self._turn += 1
        offset = 0
        for a in arrivals:
            end = offset + a.header.nnz
            pairs = (indices[offset:end], values[offset:end])
            decode_pairs(a.header, a.body, self.span, pairs, rank=a.source, bucket=self.split.bucket)
            self._parts[a.source] = pairs
            offset = end

    def add_up(self) -> None:
        """Step 3: adds the parts in rank order. Sets all_indices, all_values and finite.

        This is the only pass over the whole region. Later steps work on the list of nonzero sums.
        """
        split = self.split
        sums = split.arena.get("region sums", self.span, torch.float32)  # needed only here, so all buckets share it
        kernels.scatter_reduce(sums, [self._parts[r] for r in range(split.channel.size)])
        most = min(self.span, sum(values.numel() for _, values in self._parts.values()))
        reserve = min(self.span, 2 * most)
        indices = split.buffer("sum indices", most, torch.uint32, reserve=reserve)
        values = split.buffer("sum values", most, torch.float32, reserve=reserve)
        result = kernels.accumulate_select(sums, sums, KEEP_ALL, indices, values, scale=0.0)  # sums + 0 * sums
        self.finite = result.nonfinite == 0
        self.all_indices, self.all_values = indices[: result.stored], values[: result.stored]

    def select(self, threshold: float) -> None:
        """Step 4: keeps the sums of at least this magnitude. Sets indices, values and dropped."""
        split, nnz = self.split, self.all_values.numel()
        self.dropped = split.buffer("dropped", nnz, torch.float32, reserve=2 * nnz).zero_()
        if threshold <= KEEP_ALL:
            self.indices, self.values = self.all_indices, self.all_values
            if self._dense_is_smaller(nnz):
                self._fill()
            return
        places = split.buffer("kept places", nnz, torch.uint32, reserve=2 * nnz)
        values = split.buffer("kept values", nnz, torch.float32, reserve=2 * nnz)
        stored = kernels.accumulate_select(self.all_values, self.dropped, threshold, places, values).stored
        indices = split.buffer("kept indices", stored, torch.uint32, reserve=2 * nnz)
        np.take(self.all_indices.numpy(), places[:stored].numpy(), out=indices.numpy(), mode="clip")
        self.indices, self.values = indices, values[:stored]

    def _fill(self) -> None:
        """Keeps every element of the region, including zeros, so that no positions are sent."""
        indices = self.split.buffer("kept indices", self.span, torch.uint32)
        values = self.split.buffer("kept values", self.span, torch.float32)
        kernels.scatter_reduce(values, [(self.all_indices, self.all_values)])
        indices.numpy()[:] = np.arange(self.span, dtype=np.uint32)
        self.indices, self.values = indices, values

    def _dense_is_smaller(self, nnz: int) -> bool:
        """Returns whether all values of the region take fewer bytes than values with positions (SparCML's DSAR)."""
        codec = self.split.codecs.values
        sparse = kernels.max_value_bytes(codec, nnz) + -(-self.span // 8)
        return 0 < nnz < self.span and sparse > kernels.max_value_bytes(codec, self.span) and self.finite

    def encode_whole(self) -> None:
        """Encodes the kept sums as one part. Sets block and error."""
        nnz = self.values.numel()
        codecs = self.split.codecs
        room = max_part_bytes(nnz, self.span, codecs) if nnz else 0
        out = self.split.buffer("block", room, torch.uint8, reserve=2 * room)
        self.error = self.split.buffer("kept error", nnz, torch.float32, reserve=2 * nnz)
        written = 0
        if nnz:
            written = encode_part(self.indices, self.values, self.span, codecs, out, self.error)
        self.block = out[:written]

    def rebalance(self, segments: list[Segment], counts: list[int]) -> CollectiveSteps[torch.Tensor]:
        """Step 6: sends slices of the kept sums to the ranks that hold them in the gather. Collective.

        The owner encodes its slices, and nobody encodes them again, so the owner knows their rounding. Mutates error.

        Args:
            segments: all slices.
            counts: kept nonzeros by region.

        Returns:
            uint8, the encoded slices that this rank holds, one after the other.
        """
        split, here = self.split, self.split.channel.rank
        mine = [s for s in segments if s.owner == here]
        held = [s for s in segments if s.holder == here]
        codecs = split.codecs
        places = [s.place(0, self.span, counts[s.region]) for s in mine]
        rooms = [max_part_bytes(s.count, span, codecs) for s, (_, span) in zip(mine, places, strict=True)]
        total = sum(rooms)
        out = split.buffer("slices", total, torch.uint8, reserve=2 * total)
        outgoing: dict[int, torch.Tensor] = {}
        offset = 0
        for s, room, (start, span) in zip(mine, rooms, places, strict=True):
            indices = self.indices[s.first : s.last]
            relative = shifted(
                indices, -start, split.arena.get("relative indices", s.count, torch.uint32, reserve=split.capacity)
            )
            place = out[offset : offset + room]
            values, error = self.values[s.first : s.last], self.error[s.first : s.last]
            written = encode_part(relative, values, span, codecs, place, error)
            outgoing[s.holder] = place[:written]
            offset += written
        parts: dict[int, torch.Tensor] = {}
        if here in outgoing:
            parts[here] = outgoing.pop(here)

        def arrived(arrivals: list[Arrival]) -> None:
            for a in arrivals:
                parts[a.source] = torch.cat([a.head, a.body])

        sources = {
            s.owner: s.place(*self._regions.place(s.region), counts[s.region])[1] for s in held if s.owner != here
        }
        yield from exchange_parts(split.context, "slices", outgoing, sources, arrived)
        total = sum(p.numel() for p in parts.values())
        block = split.buffer("held", total, torch.uint8, reserve=2 * total)
        offset = 0
        for s in held:
            part = parts[s.owner]
            block[offset : offset + part.numel()] = part
            offset += part.numel()
        return block
