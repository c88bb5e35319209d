"""Positions that all ranks share without choosing them together: drawn from a seed, or chosen by one rank for all."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsecomm import kernels
from sparsecomm.compress.base import Selection, SelectionBuffers, SelectorMemory, SparsifyingCompressor, take_out
from sparsecomm.compress.sample import sample
from sparsecomm.compress.topk import TopK
from sparsecomm.errors import ConfigError

__all__ = ["CyclicTopK", "RandomK", "SharedPositions"]

_MOST_SEED = 2**32 - 2


class SharedPositions(SparsifyingCompressor, abc.ABC):
    """A compressor whose positions are the same on all ranks; what the "shared_index" collective needs."""

    collectives: ClassVar[tuple[str, ...]] = ("shared_index",)

    @property
    @abc.abstractmethod
    def tag(self) -> int:
        """A number in [0, 2**32) that must be the same on all ranks: 0 if a rank leads, else 1 + its seed."""

    @abc.abstractmethod
    def leader(self, step: int, size: int) -> int | None:
        """Returns the rank of `size` whose selection all take; None if every rank works the positions out."""

    @abc.abstractmethod
    def positions(self, k: int, step: int, layout_hash: int, marks: torch.Tensor) -> torch.Tensor:
        """Returns the positions where no rank leads.

        Args:
            k: how many.
            step: training step.
            layout_hash: of the bucket.
            marks: uint8, shape (n,), n the bucket's elements: work space. Mutated.

        Returns:
            int64, shape (k,), ascending.
        """


@dataclass(frozen=True)
class RandomK(SharedPositions):
    """Random-k: positions from a hash of seed, step and bucket, so that none travel.

    Without regard to magnitude: cheap, and every coordinate waits 1 / density steps; with error feedback it converges,
    more slowly than top-k.

    Attributes:
        density: k / n, a number in (0, 1], a schedule, or a callable from step to density.
        seed: the same on all ranks.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= _MOST_SEED:
            raise ConfigError(f"RandomK.seed must be an int in 0 .. {_MOST_SEED}, got {self.seed!r}")

    @property
    def tag(self) -> int:
        """See `SharedPositions.tag`."""
        return 1 + self.seed

    def leader(self, step: int, size: int) -> None:
        """Nobody leads."""

    def positions(self, k: int, step: int, layout_hash: int, marks: torch.Tensor) -> torch.Tensor:
        """See `SharedPositions.positions`."""
        return sample(marks, k, self.seed, step, layout_hash)

    def select(
        self,
        grad: torch.Tensor,
        residual: torch.Tensor,
        k: int,
        memory: SelectorMemory,
        out: SelectionBuffers,
        *,
        scale: float = 1.0,
    ) -> Selection:
        """See `Compressor.select`. Outside an exchange `memory.age` counts the steps."""
        before = residual.clone()
        nonfinite = kernels.accumulate_dense(grad, residual, scale=scale)
        marks = torch.empty(residual.numel(), dtype=torch.uint8)
        positions = self.positions(min(k, residual.numel()), memory.age, 0, marks)
        memory.age += 1
        return take_out(positions, before, grad, residual, nonfinite, out, scale=scale)


@dataclass(frozen=True)
class CyclicTopK(TopK, SharedPositions):
    """Top-k of one rank for all, a turn each: CLT-k (ScaleCom, Chen et al. 2020).

    Rank ``step mod P`` selects the k largest of its own accumulated gradient, and all send what they have there: one
    set of positions travels, and sums do not fill in. It lives from ranks' residuals being alike.

    Attributes:
        density: k / n, a number in (0, 1], a schedule, or a callable from step to density.
    """

    @property
    def tag(self) -> int:
        """See `SharedPositions.tag`."""
        return 0

    def leader(self, step: int, size: int) -> int:
        """Everybody in turn."""
        return step % size

    def positions(self, k: int, step: int, layout_hash: int, marks: torch.Tensor) -> torch.Tensor:
        """Never asked for: a rank leads."""
        raise AssertionError("the leader selects")
