"""Who hands on what in the last leg of a split-reduce: slices of the owners' lists, which every rank can work out."""

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
    """A slice of what an owner has kept.

    Attributes:
        region: region that it is of.
        owner: rank that owns the region and has encoded the slice.
        holder: rank that hands it on.
        first: its first entry in the owner's list.
        last: one past its last.
    """

    region: int
    owner: int
    holder: int
    first: int
    last: int

    @property
    def count(self) -> int:
        """Nonzeros in it."""
        return self.last - self.first

    def place(self, start: int, span: int, kept: int) -> tuple[int, int]:
        """Returns start and length of the span that its positions are relative to.

        That is the owner's region, but for a region that is kept whole: its slices need no positions.

        Args:
            start: first position of the owner's region.
            span: its length.
            kept: nonzeros that the owner keeps.
        """
        return (start + self.first, self.count) if kept == span else (start, span)


def segments_of(counts: Sequence[int], owners: Sequence[int], *, even: bool) -> list[Segment]:
    """Returns all slices, in the order of positions.

    Args:
        counts: nonzeros kept in each region.
        owners: ranks by region.
        even: whether each rank is to hold about the same number; else owners hold their own.
    """
    if not even:
        return [Segment(g, r, r, 0, count) for g, (r, count) in enumerate(zip(owners, counts, strict=True)) if count]
    size, total = len(counts), sum(counts)
    shares = [total * h // size for h in range(size + 1)]  # in the order of regions: most of a slice stays at home
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
    """Decodes and checks everything that was gathered.

    Args:
        blocks: uint8, by holder.
        segments: all slices.
        counts: nonzeros kept in each region.
        regions: in use.
        arena: gives the result's buffers, which all buckets share.
        bucket: for errors.

    Returns:
        All kept sums, positions ascending.

    Raises:
        WireError: names the rank that encoded what is wrong, or the one whose block has another length.
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
