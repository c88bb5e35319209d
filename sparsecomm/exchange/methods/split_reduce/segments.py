"""The slices of kept sums in the gather of a split-reduce, which every rank can compute from the announced counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from sparsecomm.errors import WireError
from sparsecomm.exchange.methods.split_reduce.parts import decode_pairs, read_header_of, shifted
from sparsecomm.exchange.methods.split_reduce.regions import Regions
from sparsecomm.runtime.arena import Arena
from sparsecomm.types import Pairs
from sparsecomm.wire import PART_HEADER_BYTES

__all__ = ["Segment", "decode_blocks", "segments_of"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A slice of the kept sums of an owner.

    Attributes:
        region: region of the sums.
        owner: rank that owns the region and encodes the slice.
        holder: rank that contributes the slice to the gather.
        first: first entry of the slice in the owner's list of kept sums.
        last: one past the last entry.
    """

    region: int
    owner: int
    holder: int
    first: int
    last: int

    @property
    def count(self) -> int:
        """Number of entries."""
        return self.last - self.first

    def place(self, start: int, span: int, kept: int) -> tuple[int, int]:
        """Returns start and length of the span to which the positions of the slice are relative.

        The span is the region, or exactly the slice if the region is kept whole: then no positions are sent.

        Args:
            start: first position of the region.
            span: length of the region.
            kept: number of sums that the owner keeps.
        """
        return (start + self.first, self.count) if kept == span else (start, span)


def segments_of(counts: Sequence[int], owners: Sequence[int], *, even: bool) -> list[Segment]:
    """Returns all slices, in the order of positions.

    Args:
        counts: kept nonzeros by region.
        owners: owners by region.
        even: whether all ranks hold about equally many entries; otherwise every owner holds all of its sums.
    """
    if not even:
        return [Segment(g, r, r, 0, count) for g, (r, count) in enumerate(zip(owners, counts, strict=True)) if count]
    size, total = len(counts), sum(counts)
    # In the order of regions, so that most entries stay with their owner.
    shares = [total * h // size for h in range(size + 1)]
    starts = [0, *accumulate(counts)]
    found, region, share = [], 0, 0
    while region < size and share < size:
        first, last = max(starts[region], shares[share]), min(starts[region + 1], shares[share + 1])
        if first < last:
            slice_ = (first - starts[region], last - starts[region])
            found.append(Segment(region, owners[region], owners[share], *slice_))
        if starts[region + 1] <= shares[share + 1]:
            region += 1
        else:
            share += 1
    return found


def decode_blocks(
    blocks: Sequence[torch.Tensor],
    segments: Sequence[Segment],
    counts: Sequence[int],
    regions: Regions,
    arena: Arena,
    bucket: int,
) -> Pairs:
    """Decodes and checks all gathered blocks.

    Args:
        blocks: uint8, by holder.
        segments: all slices.
        counts: kept nonzeros by region.
        regions: regions in use.
        arena: allocates the result's buffers, which all buckets share.
        bucket: bucket number, for errors.

    Returns:
        All kept sums, positions ascending.

    Raises:
        WireError: a block is damaged. The error names the rank that encoded the damaged part, or the holder of a block
            of the wrong length.
    """
    total = sum(counts)
    indices = arena.get("decoded indices", total, torch.uint32, reserve=2 * total)
    values = arena.get("decoded values", total, torch.float32, reserve=2 * total)
    read = [0] * len(blocks)
    offset = 0
    for s in segments:
        start, span = s.place(*regions.place(s.region), counts[s.region])
        rest = blocks[s.holder][read[s.holder] :]
        origin = {"rank": s.owner, "bucket": bucket}
        header = read_header_of(rest, span, **origin)
        if header.nnz != s.count:
            raise WireError("nnz", header.nnz, f"{s.count} were announced", **origin)
        length = PART_HEADER_BYTES + header.body_bytes
        if rest.numel() < length:
            raise WireError("length", rest.numel(), f"the part's header announces {length} bytes", **origin)
        pairs = (indices[offset : offset + s.count], values[offset : offset + s.count])
        decode_pairs(header, rest[PART_HEADER_BYTES:length], span, pairs, **origin)
        if start:
            shifted(pairs[0], start, pairs[0])
        read[s.holder] += length
        offset += s.count
    for rank, block in enumerate(blocks):
        if read[rank] != block.numel():
            raise WireError("length", block.numel(), f"its parts have {read[rank]} bytes", rank=rank, bucket=bucket)
    return indices, values
