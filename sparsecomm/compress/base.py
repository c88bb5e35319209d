"""The base class of compressors, which are frozen options and one method that selects."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from typing_extensions import override

from sparsecomm.compress.schedule import Density, check_density, density_at

__all__ = ["Accumulated", "Compressor", "Selection", "SelectionBuffers", "SelectorMemory", "SparsifyingCompressor"]


@dataclass(slots=True)
class SelectionBuffers:
    """Buffers that a selection is written to. The caller owns them and reuses them in every step.

    Attributes:
        indices: uint32, shape (capacity,).
        values: float32, shape (capacity,).
    """

    indices: torch.Tensor
    values: torch.Tensor


@dataclass(slots=True)
class SelectorMemory:
    """A compressor's memory of one bucket from step to step.

    Attributes:
        threshold: the threshold last used; NaN if there is none.
        age: steps since the threshold was exact.
        k: the k that the threshold was made for.
    """

    threshold: float = math.nan
    age: int = 0
    k: int = 0


@dataclass(frozen=True, slots=True)
class Selection:
    """The size of a selection from one bucket, whose pairs are in `SelectionBuffers`.

    Attributes:
        nnz: number of pairs at the front of the buffers.
        nonfinite: number of accumulated elements that were NaN or infinite; they are never selected.
    """

    nnz: int
    nonfinite: int


@dataclass(frozen=True, slots=True)
class Accumulated:
    """A residual after a gradient was added to it.

    Attributes:
        grad: the gradient, shape (n,).
        scale: factor on the gradient.
        before: float32, shape (n,): the residual before the gradient was added.
        residual: float32, shape (n,): the residual after it.
        nonfinite: number of sums that were NaN or infinite; the residual is unchanged at their positions.
    """

    grad: torch.Tensor
    scale: float
    before: torch.Tensor
    residual: torch.Tensor
    nonfinite: int

    def take_out(self, positions: torch.Tensor, out: SelectionBuffers) -> Selection:
        """Moves the values at some positions out of the residual, except where the sum was not finite.

        Mutates `residual`: it becomes zero where a value was taken.

        Args:
            positions: int64, ascending.
            out: receives the selection.
        """
        if self.nonfinite:
            sums = self.before[positions] + self.grad[positions].float() * self.scale
            positions = positions[torch.isfinite(sums)]
        nnz = positions.numel()
        out.indices[:nnz] = positions.to(torch.uint32)
        out.values[:nnz] = self.residual[positions]
        self.residual[positions] = 0.0
        return Selection(nnz, self.nonfinite)


class Compressor(abc.ABC):
    """Base class of all compressors. Instances are frozen options; callers pass in each bucket's memory.

    Attributes:
        collectives: names of the only collectives that can exchange this compressor's selections; "auto" takes the
            first. Empty if the selections are indices and values, which every collective exchanges unless it is made
            for certain compressors.
    """

    collectives: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def density_at(self, step: int) -> float:
        """Returns the fraction of elements to send in this step, in (0, 1]."""

    @property
    def is_dense(self) -> bool:
        """Whether every element is sent, so that no residual is needed."""
        return False

    def k_for(self, numel: int, step: int) -> int:
        """Returns the number of elements to send in this step: density * numel, rounded, and at least one."""
        return min(numel, max(1, round(self.density_at(step) * numel))) if numel else 0

    def capacity(self, k: int, numel: int) -> int:
        """Returns the length of the output buffers that selecting about k of numel elements needs."""
        return min(k, numel)

    @abc.abstractmethod
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
        """Adds the gradient to the residual and moves about k of the largest magnitudes out of it.

        NaN and infinite sums are never selected, and leave the residual unchanged at their positions.
        `sparsecomm.testing` checks this whole contract.

        Args:
            grad: shape (n,), float32, float16 or bfloat16.
            residual: shape (n,), float32. Mutated: zero where an element is selected, the sum elsewhere.
            k: number of elements to select.
            memory: this bucket's memory. Mutated.
            out: receives the selection, indices ascending.
            scale: factor on the gradient.
        """


@dataclass(frozen=True)
class SparsifyingCompressor(Compressor):
    """Base class of compressors with a density.

    Attributes:
        density: fraction of elements to send: a number in (0, 1], a schedule, or a callable from step to density.
    """

    density: Density = field(default=0.01)

    def __post_init__(self) -> None:
        if not callable(self.density):
            object.__setattr__(self, "density", check_density(self.density))

    @override
    def density_at(self, step: int) -> float:
        density = self.density
        return density_at(density, step) if callable(density) else density
