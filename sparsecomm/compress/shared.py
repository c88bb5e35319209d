"""Positions that all ranks share: drawn from a common seed, or chosen by one rank for all."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from sparsecomm import kernels
from sparsecomm.compress.base import Accumulated, Selection, SelectionBuffers, SelectorMemory, SparsifyingCompressor
from sparsecomm.compress.sample import sample
from sparsecomm.compress.topk import TopK
from sparsecomm.errors import ConfigError

__all__ = ["CyclicTopK", "RandomK", "SharedPositions"]

_MOST_SEED = 2**32 - 2


class SharedPositions(SparsifyingCompressor, abc.ABC):
    """Base class of compressors whose positions are the same on all ranks. The "shared_index" collective needs one."""

    collectives: ClassVar[tuple[str, ...]] = ("shared_index",)

    @property
    @abc.abstractmethod
    def tag(self) -> int:
        """A number in [0, 2**32) that ranks must share: 0 if one rank selects for all, else 1 + the seed."""

    @abc.abstractmethod
    def leader(self, step: int, size: int) -> int | None:
        """Returns the rank whose selection all ranks use, or None if all compute `positions`.

        Args:
            step: training step.
            size: world size.
        """

    @abc.abstractmethod
    def positions(self, k: int, step: int, layout_hash: int, marks: torch.Tensor) -> torch.Tensor:
        """Returns the positions to send. Called if `leader` returns None.

        Args:
            k: number of positions.
            step: training step.
            layout_hash: hash of the bucket's layout.
            marks: work space, uint8, shape (n,) for a bucket of n elements. Mutated.

        Returns:
            int64, shape (k,), ascending.
        """


@dataclass(frozen=True)
class RandomK(SharedPositions):
    """Random-k: positions from a hash of seed, step and bucket, so that no positions are sent.

    The choice ignores magnitudes. It is cheap, and each element waits 1 / density steps on average. With error feedback
    it converges, but more slowly than top-k.

    Attributes:
        density: k / n: a number in (0, 1], a schedule, or a callable from step to density.
        seed: seed of the positions; must be the same on all ranks.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= _MOST_SEED:
            raise ConfigError(f"RandomK.seed must be an int in 0 .. {_MOST_SEED}, got {self.seed!r}")

    @property
    @override
    def tag(self) -> int:
        return 1 + self.seed

    @override
    def leader(self, step: int, size: int) -> None:
        return None

    @override
    def positions(self, k: int, step: int, layout_hash: int, marks: torch.Tensor) -> torch.Tensor:
        return sample(marks, k, self.seed, step, layout_hash)

    @override
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
        """Selects at sampled positions; `memory.age` counts the steps, since no step number is given here."""
        before = residual.clone()
        nonfinite = kernels.accumulate_dense(grad, residual, scale=scale)
        marks = torch.empty(residual.numel(), dtype=torch.uint8)
        positions = self.positions(min(k, residual.numel()), memory.age, 0, marks)
        memory.age += 1
        return Accumulated(grad, scale, before, residual, nonfinite).take_out(positions, out)


@dataclass(frozen=True)
class CyclicTopK(TopK, SharedPositions):
    """Top-k of one rank for all, in turns: CLT-k (ScaleCom, Chen et al. 2020).

    Rank ``step mod P`` selects the k largest elements of its accumulated gradient, and all ranks send their values at
    these positions. Only one set of positions is sent, and sums have no more nonzeros than one rank's selection. The
    method relies on residuals being similar on all ranks.

    Attributes:
        density: k / n: a number in (0, 1], a schedule, or a callable from step to density.
    """

    @property
    @override
    def tag(self) -> int:
        return 0

    @override
    def leader(self, step: int, size: int) -> int:
        return step % size

    @override
    def positions(self, k: int, step: int, layout_hash: int, marks: torch.Tensor) -> torch.Tensor:
        """Raises AssertionError: a leader selects, so this is never called."""
        raise AssertionError("the leader selects")
