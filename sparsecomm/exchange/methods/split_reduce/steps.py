"""The steps of a split-reduce, a sparse allreduce whose bytes do not grow with P.

After Ok-Topk (Li and Hoefler 2022) and SparCML's SSAR (Renggli et al. 2019), from their descriptions.

    1 regions      cut the index space into P regions that receive about equally many nonzeros; they last 64 steps
    2 split        send the part of each region to its owner, in rotated order, 8 destinations in flight
    3 reduce       the owner adds the parts of its region in rank order
    4 select       the owner keeps the sums above a global threshold, so that all owners together keep about k
    5 announce     tell all ranks the count and the bytes of the kept sums; if the total is far from k, find a new
                   threshold and select again, once
    6 rebalance    if some rank would send far more than the others, move slices of kept sums between ranks
    7 gather       send all blocks to all ranks; everyone decodes the same bytes, owners included

Cost, with b bytes per nonzero: 2 (P - 1) + O(log P) messages, about 2 k b (P - 1) / P bytes sent and as many received.
Without step 4 ("ssar") step 7 grows with the number of different positions, up to the cost of a dense gather.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparsecomm.collectives.gather import allgather, allgatherv
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
_UNEVEN = 0.1  # excess of the busiest rank over the mean, relative to all gathered bytes, above which slices move
_SLACK = 32  # nonzeros, since small counts fluctuate by more than a third
_WORTH_MOVING = 1024  # bytes that take about as long as two more messages on a 1 Gbit/s network


@dataclass(slots=True)
class Reduced:
    """The result of a split-reduce, and the terms that this rank adds to its residual.

    Attributes:
        pairs: the kept sums of all regions, positions ascending; the same bits on all ranks. Valid until the next
            exchange of any bucket.
        regions: regions for the next step.
        start: first position of this rank's region.
        span: length of this rank's region.
        dropped: all positions of this region with a sum, uint32, relative to `start`, and the dropped sums, float32,
            with 0 for a kept sum.
        indices: uint32, positions of the kept sums of this region, relative to `start`.
        error: float32, rounding of these sums.
    """

    pairs: Pairs
    regions: Regions
    start: int
    span: int
    dropped: Pairs
    indices: torch.Tensor
    error: torch.Tensor


def split_reduce(split: Split) -> CollectiveSteps[Reduced | None]:
    """Sums the selections of all ranks and keeps about k of the sums. Collective.

    Args:
        split: the selection of this rank. Mutated. If all ranks hold the same regions, `Split.encode` has been called
            with them on all ranks; otherwise `regions` is None on all ranks.

    Returns:
        The result; None on all ranks if a sum is not finite.

    Raises:
        WireError: a message is damaged. The error names the sender and the bucket.
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
    uneven = _is_uneven(lengths)
    segments = segments_of(counts, regions.owners, even=uneven)
    block = owner.block
    if uneven:
        block = yield from owner.rebalance(segments, counts)
        _, lengths, _ = yield from _announce(split, regions, 0, block, True)
    total = sum(lengths)
    key = (split.bucket, "gathered")
    blocks = yield from allgatherv(split.channel, block, lengths, split.arena, key, reserve=2 * total)
    pairs = decode_blocks(blocks, segments, counts, regions, split.arena, split.bucket)
    return Reduced(
        pairs=pairs,
        regions=regions.after(split.step, chosen.threshold, sum(counts), split.wanted or 0),
        start=owner.start,
        span=owner.span,
        dropped=(owner.all_indices, owner.dropped),
        indices=owner.indices,
        error=owner.error,
    )


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The outcome of steps 4 and 5, the same on all ranks.

    Attributes:
        threshold: smallest magnitude of a kept sum.
        counts: kept nonzeros by region.
        lengths: bytes of the blocks by rank.
    """

    threshold: float
    counts: list[int]
    lengths: list[int]


def _select(split: Split, regions: Regions, owner: Owner) -> CollectiveSteps[_Chosen | None]:
    """Steps 4 and 5: keeps the sums above a threshold and announces them. Returns None if a sum is not finite."""
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
            return _Chosen(threshold, counts, lengths)
        threshold = math.nan


def _far_off(kept: int, wanted: int, threshold: float) -> bool:
    if threshold <= KEEP_ALL:
        return 3 * kept > 4 * wanted + _SLACK  # all sums are kept, so a new threshold helps only if there are too many
    return not 2 * wanted - _SLACK <= 3 * kept <= 4 * wanted + _SLACK


def _is_uneven(lengths: list[int]) -> bool:
    """Returns whether to move slices between blocks. In the gather a rank sends log2 P copies of its block."""
    size = len(lengths)
    excess = (max(lengths) - sum(lengths) / size) * (size - 1).bit_length()
    return excess > _UNEVEN * sum(lengths) and excess > _WORTH_MOVING


def _announce(
    split: Split, regions: Regions, kept: int, block: torch.Tensor, finite: bool
) -> CollectiveSteps[tuple[list[int], list[int], bool]]:
    """Tells all ranks how many nonzeros this rank keeps and how many bytes its block has. Collective.

    Returns:
        Kept nonzeros by region, bytes by rank, and whether all sums on all ranks are finite.
    """
    mine = split.buffer("announcement", ANNOUNCEMENT_BYTES, torch.uint8)
    _ANNOUNCEMENT.write(mine, (kept, block.numel(), 0 if finite else _NONFINITE))
    key = (split.bucket, "announcements")
    blocks = yield from allgather(split.channel, mine, split.arena, key)
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
