"""Sparse allreduce whose cost does not grow with P: regions with an owner each, reduced, selected again, gathered.

After Ok-Topk (Li and Hoefler 2022) and SparCML's SSAR (Renggli et al. 2019), from their descriptions.

    1 regions      cut the index space into P regions that receive about as many nonzeros each; kept for 64 steps
    2 split        send each region's part to its owner, in rotated order, 8 destinations in flight
    3 reduce       the owner adds the parts up in rank order
    4 select       and keeps the sums above a global threshold, so that about k are kept in all
    5 announce     how many each keeps, and in how many bytes; if it is far off k, a new threshold, once
    6 rebalance    if some rank keeps so much more than others that it would send far more: move slices
    7 gather       all blocks to all ranks; everybody decodes the same bytes, their owner too

Cost, with b bytes a nonzero: 2 (P - 1) + O(log P) alpha, about 2 k b (P - 1) / P bytes sent and as many received.
Without step 4 ("ssar") the last leg grows with the number of different positions, up to dense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparsecomm.collectives.gather import allgather_blocks, allgather_fixed
from sparsecomm.errors import WireError
from sparsecomm.exchange.methods.split_reduce.owner import Owner
from sparsecomm.exchange.methods.split_reduce.regions import KEEP_ALL, Regions, new_bounds, new_threshold
from sparsecomm.exchange.methods.split_reduce.segments import decode_blocks, segments_of
from sparsecomm.exchange.methods.split_reduce.split import Split
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import Pairs
from sparsecomm.wire import Record

__all__ = ["ANNOUNCEMENT_BYTES", "Reduced", "split_reduce"]

_ANNOUNCEMENT = Record("announcement", (("kept", "I"), ("length", "I"), ("flags", "I")), crc="announcement_crc")
ANNOUNCEMENT_BYTES = _ANNOUNCEMENT.nbytes
_NONFINITE = 1
_UNEVEN = 0.1  # of all that is gathered: what the busiest rank may send above the mean
_SLACK = 32  # small counts fluctuate by more than a third
_WORTH_MOVING = 1024  # bytes: about what two more messages cost on a 1 Gbit/s network


@dataclass(slots=True)
class Reduced:
    """The result of a split-reduce, and what this rank has to put into its residual for it.

    Attributes:
        pairs: the kept sums of all regions, positions ascending; the same bits on all ranks. They hold until the next
            exchange of any bucket.
        regions: to remember.
        start: first position of this rank's region.
        span: its length.
        dropped: positions in this region, uint32, and sums that were not kept, float32; 0 for those that were.
        indices: uint32, positions in this region that were kept.
        error: float32, what rounding drops of these.
        moved: whether slices were moved to even the gather out.
        estimated: whether the threshold was found anew.
    """

    pairs: Pairs
    regions: Regions
    start: int
    span: int
    dropped: Pairs
    indices: torch.Tensor
    error: torch.Tensor
    moved: bool
    estimated: bool


def split_reduce(split: Split) -> CollectiveSteps[Reduced | None]:
    """Sums the selections of all ranks, keeping about k of the sums. Collective.

    Args:
        split: what this rank has selected. If all ranks hold the same regions, with `Split.encode` done; else with
            `regions` None on all of them. Mutated.

    Returns:
        None if a sum is not finite, on all ranks alike.

    Raises:
        WireError: if anything that came here is damaged; names the sender and the bucket.
    """
    if split.regions is None:
        found = yield from new_bounds(split.context, split.pairs[0], split.numel, split.k, split.step)
        split.encode(found)
    regions = split.regions
    assert regions is not None
    owner = Owner(split)
    yield from owner.collect()
    owner.add_up()
    chosen = yield from _select(split, regions, owner)
    if chosen is None:
        return None
    counts, lengths = chosen.counts, chosen.lengths
    moved = _is_uneven(lengths)
    segments = segments_of(counts, regions.owners, even=moved)
    block = owner.block
    if moved:
        block = yield from owner.rebalance(segments, counts)
        _, lengths, _ = yield from _announce(split, regions, 0, block, True)
    total = sum(lengths)
    key = (split.bucket, "gathered")
    blocks = yield from allgather_blocks(split.channel, block, lengths, split.arena, key, reserve=2 * total)
    pairs = decode_blocks(blocks, segments, counts, regions, split.arena, split.bucket)
    return Reduced(
        pairs=pairs,
        regions=regions.after(split.step, chosen.threshold, sum(counts), split.wanted or 0),
        start=owner.start,
        span=owner.span,
        dropped=(owner.all_indices, owner.dropped),
        indices=owner.indices,
        error=owner.error,
        moved=moved,
        estimated=chosen.estimated,
    )


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The outcome of steps 4 and 5, the same on all ranks.

    Attributes:
        threshold: magnitude that a kept sum reaches.
        estimated: whether it was found anew.
        counts: nonzeros kept in each region.
        lengths: bytes of each rank's block.
    """

    threshold: float
    estimated: bool
    counts: list[int]
    lengths: list[int]


def _select(split: Split, regions: Regions, owner: Owner) -> CollectiveSteps[_Chosen | None]:
    """Steps 4 and 5: keeps the sums above a threshold and tells all ranks; None if a sum is not finite."""
    wanted = split.wanted
    threshold = KEEP_ALL if wanted is None else regions.threshold
    estimated = False
    while True:
        if wanted is not None and math.isnan(threshold):
            threshold = yield from new_threshold(split.context, owner.all_values, wanted)
            estimated = True
        owner.select(threshold)
        owner.encode_whole()
        counts, lengths, finite = yield from _announce(split, regions, owner.values.numel(), owner.block, owner.finite)
        if not finite:
            return None
        if estimated or wanted is None or not _far_off(sum(counts), wanted, threshold):
            return _Chosen(threshold, estimated, counts, lengths)
        threshold = math.nan


def _far_off(kept: int, wanted: int, threshold: float) -> bool:
    if threshold <= KEEP_ALL:
        return 3 * kept > 4 * wanted + _SLACK  # there is no more to keep
    return not 2 * wanted - _SLACK <= 3 * kept <= 4 * wanted + _SLACK


def _is_uneven(lengths: list[int]) -> bool:
    """Returns whether to even the blocks out: of its own a rank sends log2 P copies in the gather."""
    size = len(lengths)
    excess = (max(lengths) - sum(lengths) / size) * (size - 1).bit_length()
    return excess > _UNEVEN * sum(lengths) and excess > _WORTH_MOVING


def _announce(
    split: Split, regions: Regions, kept: int, block: torch.Tensor, finite: bool
) -> CollectiveSteps[tuple[list[int], list[int], bool]]:
    """Tells all ranks how many nonzeros this rank keeps and in how many bytes.

    Returns:
        The nonzeros by region, the bytes by rank, and whether all sums are finite.
    """
    mine = split.buffer("announcement", ANNOUNCEMENT_BYTES, torch.uint8)
    _ANNOUNCEMENT.write(mine, (kept, block.numel(), 0 if finite else _NONFINITE))
    key = (split.bucket, "announcements")
    blocks = yield from allgather_fixed(split.channel, mine, split.arena, key)
    region_of = {owner: g for g, owner in enumerate(regions.owners)}
    counts, lengths, all_finite = [0] * len(blocks), [], True
    for rank, theirs in enumerate(blocks):
        origin = {"rank": rank, "bucket": split.bucket}
        try:
            count, length, flags = _ANNOUNCEMENT.read(theirs)
        except WireError as error:
            raise error.at(**origin) from None
        if flags & ~_NONFINITE:
            raise WireError("flags", flags, "unknown bits", **origin)
        region = region_of[rank]
        span = regions.place(region)[1]
        if count > span:
            raise WireError("kept", count, f"more than the {span} elements of the region", **origin)
        counts[region] = count
        lengths.append(length)
        all_finite &= not flags & _NONFINITE
    return counts, lengths, all_finite
