"""The regions of a split-reduce with their owners, and the threshold of kept sums, both estimated from samples.

Every rank contributes a few quantiles of its positions or magnitudes. All ranks compute the same result from the union.
Rank r takes its s quantiles at (j + (r + 1/2) / P) / s. So P ranks with equal positions contribute P s different
quantiles, not s.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from sparsecomm.collectives.gather import allgather
from sparsecomm.errors import WireError
from sparsecomm.exchange.methods.split_reduce.context import Context
from sparsecomm.transport import CollectiveSteps
from sparsecomm.wire import Record

__all__ = ["KEEP_ALL", "LIFETIME", "Regions", "new_bounds", "new_threshold", "samples_of"]

LIFETIME = 64
"""Number of steps that use the same regions (Ok-Topk's tau)."""
KEEP_ALL = 2.0**-149
"""The smallest positive float32: a threshold that keeps every nonzero sum."""
_SAMPLES = 2048
_GAIN = 1 / 8  # in the tails of gradients, counts fall with the 4th to 10th power of the threshold
_NUDGE = 0.1  # largest relative change of the threshold from one step to the next

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Regions:
    """The regions of one bucket and the threshold of its kept sums; the same on all ranks.

    Attributes:
        bounds: int64, shape (P + 1,), ascending from 0 to n: region g is bounds[g] .. bounds[g + 1] - 1.
        owners: owners by region.
        k: requested number of selected elements in the step that made the regions.
        made: step that made the regions.
        used: last step that used the regions.
        threshold: smallest magnitude of a kept sum; NaN if it is not yet estimated.
        tag: checksum of all other attributes, never 0.
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
        """Returns first position and length of a region."""
        start = int(self.bounds[region])
        return start, int(self.bounds[region + 1]) - start

    def fit(self, size: int, numel: int, k: int, step: int) -> bool:
        """Returns whether the regions suit this world, bucket and k, and whether `step` follows their last use."""
        return (
            len(self.bounds) == size + 1
            and int(self.bounds[-1]) == numel
            and step == self.used + 1
            and step < self.made + LIFETIME
            and self.k <= 2 * k
            and k <= 2 * self.k
        )

    def after(self, step: int, threshold: float, kept: int, wanted: int) -> Regions:
        """Returns the same regions after a step, with the threshold corrected.

        Args:
            step: the finished step.
            threshold: threshold of that step.
            kept: number of sums that reached the threshold on all ranks together.
            wanted: desired number of such sums; 0 to leave the threshold as it is.
        """
        if threshold > KEEP_ALL and wanted:
            # No power or logarithm: only plain arithmetic rounds in the same way on every machine.
            drift = (kept - wanted) / wanted * _GAIN
            threshold = max(KEEP_ALL, threshold * (1.0 + min(_NUDGE, max(-_NUDGE, drift))))
        return replace(self, used=step, threshold=threshold)


def samples_of(size: int) -> int:
    """Returns the number of quantiles that each of `size` ranks contributes."""
    return max(16, min(128, _SAMPLES // size))


def new_bounds(context: Context, indices: torch.Tensor, numel: int, k: int, step: int) -> CollectiveSteps[Regions]:
    """Cuts the index space into regions that receive about equally many nonzeros. Collective.

    1. Each rank contributes the number of its positions and their quantiles.
    2. The samples of a rank define a distribution function, linear between samples. Add those of all ranks.
    3. Region g ends where the sum reaches (g + 1) / P of its maximum.
    4. A region goes to the rank with the most samples in it, with one region per rank. The owner's own part of a region
       need not travel.

    Args:
        context: channel, arena and bucket.
        indices: uint32, shape (nnz,), ascending: positions that this rank has selected.
        numel: elements of the bucket.
        k: requested number of positions.
        step: training step.

    Raises:
        WireError: the samples of a rank are damaged. The error names the rank.
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
    """Adds the distribution functions of all ranks, each interpolated linearly between the samples of the rank.

    With every sample as a step instead, the roundings of P ranks add up, and regions differ by 15% at P = 256.

    Args:
        found: shape (ranks, samples), the samples of each rank, ascending.
        places: shape (ranks, samples), the number of positions of the rank below each sample.
        counts: shape (ranks,), the number of positions of each rank.

    Returns:
        Points x, and the estimated number of positions of all ranks below each x; both ascending.
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
    """Returns the owner of each region.

    Pairs of rank and region are served in the order of their number of samples. The regions that remain go to the ranks
    that remain, in rank order.

    Args:
        ranks: rank of each sample.
        regions: region of each sample.
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
    """Estimates the magnitude that about `wanted` of the values of all ranks reach. Collective.

    Args:
        context: channel, arena and bucket.
        values: float32, shape (nnz,): the sums of this rank, finite.
        wanted: number of sums that all ranks together should keep.

    Returns:
        The threshold, at least KEEP_ALL.

    Raises:
        WireError: the samples of a rank are damaged. The error names the rank.
    """
    ascending = np.sort(np.abs(values.numpy()))  # faster than numpy's partition for so many quantiles
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
    """Returns the layout of the samples of one rank: the count of its numbers, then the samples, ascending."""
    return Record("samples", (("count", "I"), ("samples", f"{4 * (samples + 2)}s")), crc="samples_crc")


def _union(
    context: Context, ascending: npt.NDArray[np.uint32], name: str
) -> CollectiveSteps[tuple[_Floats, _Floats, _Floats]]:
    """Gathers quantiles of the 32-bit numbers of all ranks. Collective.

    Returns:
        By rank, the count of its numbers, its samples in ascending order, and the count of its numbers below each
        sample. All zero for a rank without numbers.
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
    blocks = yield from allgather(channel, block, context.arena, key)
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
    """Returns the entries of an ascending list that a rank contributes: the first, the quantiles and the last."""
    inner = (np.arange(samples) + (rank + 0.5) / size) / samples * count
    return np.minimum(np.concatenate([[0.0], inner, [count]]).astype(np.int64), count - 1)
