"""Which rank owns which part of the index space, and which magnitudes a split-reduce keeps: both from samples.

Every rank contributes a few quantiles of what it holds; from the union all compute the same numbers. Rank r takes its
quantiles at (j + (r + 1/2) / P) / s, so that P ranks that hold the same positions contribute P s different quantiles
and not s.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from sparsecomm.collectives.gather import allgather_fixed
from sparsecomm.errors import WireError
from sparsecomm.exchange.methods.split_reduce.context import Context
from sparsecomm.transport import CollectiveSteps
from sparsecomm.wire import Record

__all__ = ["KEEP_ALL", "LIFETIME", "Regions", "new_bounds", "new_threshold", "samples_of"]

LIFETIME = 64
"""Steps that regions are used for (Ok-Topk's tau)."""
KEEP_ALL = 2.0**-149
"""The smallest positive float32: a threshold that keeps whatever is not zero."""
_SAMPLES = 2048
_GAIN = 1 / 8  # counts fall with the 4th to 10th power of the threshold in the tails of gradients
_NUDGE = 0.1

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Regions:
    """What ranks remember together of one bucket; the same on all of them.

    Attributes:
        bounds: int64, shape (P + 1,), ascending from 0 to n: region g is bounds[g] .. bounds[g + 1] - 1.
        owners: ranks by region.
        k: nonzeros each rank was asked to select when they were made.
        made: step at which they were made.
        used: last step that they were used in.
        threshold: smallest magnitude of a sum to keep; NaN to find one.
        tag: 32 bits that differ where any of these does, never 0.
    """

    bounds: npt.NDArray[np.int64]
    owners: tuple[int, ...]
    k: int
    made: int
    used: int
    threshold: float
    tag: int = field(init=False)

    def __post_init__(self) -> None:
        numbers = struct.pack(f"<qqqd{len(self.owners)}I", self.k, self.made, self.used, self.threshold, *self.owners)
        object.__setattr__(self, "tag", zlib.crc32(self.bounds.tobytes(), zlib.crc32(numbers)) or 1)

    def place(self, region: int) -> tuple[int, int]:
        """Returns a region's first position and its length."""
        start = int(self.bounds[region])
        return start, int(self.bounds[region + 1]) - start

    def fit(self, size: int, numel: int, k: int, step: int) -> bool:
        """Returns whether they may be used: for this world and bucket, about this k, and the step after the last."""
        return (
            len(self.bounds) == size + 1
            and int(self.bounds[-1]) == numel
            and step == self.used + 1
            and step < self.made + LIFETIME
            and self.k <= 2 * k
            and k <= 2 * self.k
        )

    def after(self, step: int, threshold: float, kept: int, wanted: int) -> Regions:
        """Returns what to remember after a step.

        Args:
            step: that step.
            threshold: in use in it.
            kept: nonzeros that reached it on all ranks together.
            wanted: how many should have.
        """
        if threshold > KEEP_ALL and wanted:
            # Plain arithmetic, no power or logarithm: these round alike on every machine.
            drift = (kept - wanted) / wanted * _GAIN
            threshold = max(KEEP_ALL, threshold * (1.0 + min(_NUDGE, max(-_NUDGE, drift))))
        return replace(self, used=step, threshold=threshold)


def samples_of(size: int) -> int:
    """Returns how many quantiles each of `size` ranks contributes, once in 64 steps."""
    return max(16, min(128, _SAMPLES // size))


def new_bounds(context: Context, indices: torch.Tensor, numel: int, k: int, step: int) -> CollectiveSteps[Regions]:
    """Cuts the index space so that every rank is sent about the same number of nonzeros. Collective.

    1. Contribute the number of selected positions and their quantiles.
    2. Each rank's samples are a distribution function, linear in between; add them all up.
    3. Region g ends where it reaches (g + 1) / P.
    4. The rank with the most samples in a region owns it, as far as each owns one: what is there already need not
       travel.

    Args:
        context: the ranks and the buffers.
        indices: uint32, shape (nnz,), ascending: positions that this rank has selected.
        numel: elements of the bucket.
        k: number of positions that this rank was asked to select.
        step: training step.

    Raises:
        WireError: if a rank's samples are damaged; names it.
    """
    size = context.channel.size
    counts, found, places = yield from _union(context, indices.numpy(), "positions")
    bounds = np.linspace(0, numel, size + 1).astype(np.int64)
    ranks = np.flatnonzero(counts)
    if len(ranks):
        knots, reached = _distribution(found[ranks], places[ranks], counts[ranks])
        targets = reached[-1] * np.arange(1, size) / size
        inner = np.ceil(np.interp(targets, reached, knots)).astype(np.int64)
        bounds[1:-1] = np.clip(inner, 0, min(numel, 2**32 - 1))
    held = np.searchsorted(bounds[1:-1], found[ranks].reshape(-1), side="right")
    owners = _owners(np.repeat(ranks, found.shape[1]), held, size)
    return Regions(bounds, owners, k, step, step, float("nan"))


def _distribution(found: _Floats, places: _Floats, counts: _Floats) -> tuple[_Floats, _Floats]:
    """Adds up what is known of every rank's positions: how many lie below x, linear between a rank's samples.

    Interpolating rank by rank matters: with every sample as a step of its own, P ranks' roundings add up to regions
    that differ by 15% at P = 256.

    Args:
        found: shape (ranks, samples), ascending in each row.
        places: how many positions of that rank are below each.
        counts: shape (ranks,).

    Returns:
        Points x and how many positions of all ranks are below them, both ascending.
    """
    ends = np.concatenate([found, found[:, -1:] + 1.0], axis=1)
    below = np.concatenate([places, counts[:, None]], axis=1)
    widths, masses = np.diff(ends, axis=1), np.diff(below, axis=1)
    slopes = np.divide(masses, widths, out=np.zeros_like(masses), where=widths > 0)
    knots = np.concatenate([ends[:, :-1].reshape(-1), ends[:, 1:].reshape(-1)])
    changes = np.concatenate([slopes.reshape(-1), -slopes.reshape(-1)])
    order = np.argsort(knots, kind="stable")
    knots, slope = knots[order], np.cumsum(changes[order])
    return knots, np.concatenate([[0.0], np.maximum.accumulate(np.cumsum(slope[:-1] * np.diff(knots)))])


def _owners(ranks: npt.NDArray[np.int64], regions: npt.NDArray[np.int64], size: int) -> tuple[int, ...]:
    """Gives regions to ranks, those with the most samples first; what is left goes in order of rank.

    Args:
        ranks: whose each sample is.
        regions: where each sample is.
        size: number of ranks.
    """
    pairs, votes = np.unique(ranks * size + regions, return_counts=True)
    owners, taken = [-1] * size, [False] * size
    for pair in pairs[np.argsort(-votes, kind="stable")].tolist():
        rank, region = divmod(pair, size)
        if owners[region] < 0 and not taken[rank]:
            owners[region], taken[rank] = rank, True
    free = (r for r in range(size) if not taken[r])
    return tuple(next(free) if r < 0 else r for r in owners)


def new_threshold(context: Context, values: torch.Tensor, wanted: int) -> CollectiveSteps[float]:
    """Finds the magnitude that about `wanted` of all ranks' values reach. Collective.

    Args:
        context: the ranks and the buffers.
        values: float32, shape (nnz,): this rank's sums, finite.
        wanted: number of sums to keep in all.

    Returns:
        At least KEEP_ALL.

    Raises:
        WireError: if a rank's samples are damaged; names it.
    """
    ascending = np.sort(np.abs(values.numpy()))  # faster than numpy's partition at this many quantiles
    counts, found, _ = yield from _union(context, ascending.view(np.uint32), "magnitudes")
    ranks = np.flatnonzero(counts)
    if counts.sum() <= wanted or not len(ranks):
        return KEEP_ALL
    inner = found[ranks, 1:-1]
    sampled = inner.reshape(-1).astype(np.uint32).view(np.float32).astype(np.float64)
    weights = np.repeat(counts[ranks] / inner.shape[1], inner.shape[1])
    order = np.argsort(-sampled, kind="stable")
    reached = np.cumsum(weights[order]) - weights[order] / 2
    return max(KEEP_ALL, float(np.interp(wanted, reached, sampled[order])))


@cache
def _record(samples: int) -> Record:
    """Returns the layout of one rank's samples: how many numbers it has, and the samples, ascending."""
    return Record("samples", (("count", "I"), ("samples", f"{4 * (samples + 2)}s")), crc="samples_crc")


def _union(
    context: Context, ascending: npt.NDArray[np.uint32], name: str
) -> CollectiveSteps[tuple[_Floats, _Floats, _Floats]]:
    """Gathers quantiles of 32-bit numbers.

    Returns:
        By rank: the count of its numbers; its samples, ascending; the count of numbers below each. Zeros where it has
        none.
    """
    channel = context.channel
    size, samples = channel.size, samples_of(channel.size)
    record = _record(samples)
    key = (context.bucket, "split", name)
    mine = np.zeros(samples + 2, dtype="<u4")
    if len(ascending):
        mine[:] = ascending[_places(channel.rank, size, samples, len(ascending))]
    block = context.arena.get((key, "block"), record.nbytes, torch.uint8)
    record.write(block, (len(ascending), mine.tobytes()))
    blocks = yield from allgather_fixed(channel, block, context.arena, key)
    counts = np.zeros(size)
    found, places = np.zeros((size, samples + 2)), np.zeros((size, samples + 2))
    for rank, theirs in enumerate(blocks):
        try:
            count, numbers = record.read(theirs)
        except WireError as error:
            raise error.at(rank=rank, bucket=context.bucket) from None
        counts[rank], found[rank] = count, np.frombuffer(numbers, dtype="<u4")
        if count:
            places[rank] = _places(rank, size, samples, count)
    return counts, found, places


def _places(rank: int, size: int, samples: int, count: int) -> npt.NDArray[np.int64]:
    """Returns which entries of an ascending list a rank contributes: the first, quantiles, the last."""
    inner = (np.arange(samples) + (rank + 0.5) / size) / samples * count
    return np.minimum(np.concatenate([[0.0], inner, [count]]).astype(np.int64), count - 1)
