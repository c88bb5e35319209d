"""How far the ranks agree in one bucket, measured on a sample of its elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from sparsecomm.feedback.layout import BucketLayout

__all__ = ["SAMPLE", "Alignment", "Squares", "is_due", "sample_positions"]

SAMPLE = 512
"""Elements of a bucket that are compared, at most."""
_OFTEN_UNTIL = 32  # steps; gradients of the first steps agree, and those of later steps do not
_EVERY = 16  # steps between two measurements from then on
_NEWEST = 0.05  # weight of the newest measurement in the running means: of 20, samples of 320 steps


@dataclass(frozen=True, slots=True)
class Squares:
    """Mean squares of one vector's elements on all ranks.

    Attributes:
        mean: mean square of the mean over ranks.
        each: mean over ranks of the mean square.
    """

    mean: float
    each: float


@dataclass(slots=True)
class Alignment:
    """How far the ranks agree in one bucket. The same on all ranks, bit for bit.

    The alignment of a vector is the squared norm of its mean over P ranks, divided by the mean of the squared norms. It
    is 1 if all ranks hold the same vector, and 1/P if the vectors of the ranks are independent noise. Both uses follow
    from it: the second moment of the average gradient is that of a rank's gradient times the alignment of gradients,
    and the least-squares estimate of the average residual is a rank's residual times the alignment of residuals.

    Attributes:
        size: number of ranks P.
        count: number of measurements.
        gradient: running means of the gradient's squares.
        residual: running means of the residual's squares.
    """

    size: int = 1
    count: int = 0
    gradient: Squares = Squares(1.0, 1.0)
    residual: Squares = Squares(1.0, 1.0)

    def add(self, gradient: Squares, residual: Squares) -> None:
        """Adds a measurement to the running means. The first ones count alike."""
        self.count += 1
        weight = max(_NEWEST, 1.0 / self.count)
        self.gradient = _mixed(self.gradient, gradient, weight)
        self.residual = _mixed(self.residual, residual, weight)

    @classmethod
    def merged(cls, parts: Sequence[tuple[int, Alignment]]) -> Alignment:
        """Returns the alignment of a bucket that is made of parts of others.

        Args:
            parts: elements that come from a bucket, and the alignment of that bucket.
        """
        known = [(n, a) for n, a in parts if a.count]
        if not known:
            return cls()
        first = known[0][1]
        if all(a == first for _, a in known):
            return replace(first)
        total = sum(n for n, _ in known)

        def mean(of: Callable[[Alignment], Squares]) -> Squares:
            return Squares(*(sum(n * getattr(of(a), k) for n, a in known) / total for k in ("mean", "each")))

        return cls(first.size, first.count, mean(lambda a: a.gradient), mean(lambda a: a.residual))

    def of_gradients(self) -> float:
        """Returns the alignment of the gradients, in [1/P, 1]; 1 before the first measurement."""
        return self._bounded(self.gradient)

    def of_residuals(self) -> float:
        """Returns the alignment of the residuals, in [1/P, 1]; 1 before the first measurement."""
        return self._bounded(self.residual)

    def common_share(self) -> float:
        """Returns the share of the ranks' common part in their residuals' squared norm, in [0, 1].

        It is 0 for one rank, and as long as no residual was seen that is not zero.
        """
        if self.count == 0 or self.size == 1 or self.residual.each <= 0.0:
            return 0.0
        return (self.of_residuals() - 1.0 / self.size) / (1.0 - 1.0 / self.size)

    def _bounded(self, squares: Squares) -> float:
        if squares.each <= 0.0:
            return 1.0
        return min(1.0, max(1.0 / self.size, squares.mean / squares.each))


def _mixed(old: Squares, new: Squares, weight: float) -> Squares:
    return Squares(old.mean + weight * (new.mean - old.mean), old.each + weight * (new.each - old.each))


def is_due(step: int) -> bool:
    """Returns whether ranks that measure their alignment do so in this step."""
    return step < _OFTEN_UNTIL or step % _EVERY == 0


@lru_cache(maxsize=64)
def sample_positions(layout: BucketLayout, step: int) -> torch.Tensor:
    """Returns the positions to compare in a step: int64, at most `SAMPLE`, ascending, the same on all ranks.

    They differ from step to step. So the running means are over many more elements than one sample has: a few large
    elements make up most of a residual's squares, and a sample holds too few of them.
    """
    if layout.numel <= SAMPLE:
        return torch.arange(layout.numel, dtype=torch.int64)
    generator = torch.Generator().manual_seed((1_000_003 * layout.hash + step) % 2**63)
    return torch.randint(layout.numel, (SAMPLE,), generator=generator).sort().values
