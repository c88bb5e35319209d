"""What a compressor is: frozen options and one method that selects."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from sparsecomm.compress.schedule import Density, check_density, density_at

__all__ = ["Compressor", "Selection", "SelectionBuffers", "SelectorMemory", "SparsifyingCompressor", "take_out"]


@dataclass(slots=True)
class SelectionBuffers:
    """Where a selection is written; owned by the caller and reused from step to step.

    Attributes:
        indices: uint32, shape (capacity,).
        values: float32, shape (capacity,).
    """

    indices: torch.Tensor
    values: torch.Tensor


@dataclass(slots=True)
class SelectorMemory:
    """What a compressor remembers of one bucket from step to step.

    Attributes:
        threshold: last threshold in use; NaN if there is none.
        age: steps since the threshold was exact.
        k: the k it was made for.
    """

    threshold: float = math.nan
    age: int = 0
    k: int = 0


@dataclass(frozen=True, slots=True)
class Selection:
    """What was selected from one bucket.

    Attributes:
        nnz: number of pairs at the front of the buffers.
        nonfinite: number of accumulated elements that were NaN or infinite (never selected).
    """

    nnz: int
    nonfinite: int


def take_out(
    positions: torch.Tensor,
    before: torch.Tensor,
    grad: torch.Tensor,
    residual: torch.Tensor,
    nonfinite: int,
    out: SelectionBuffers,
    *,
    scale: float = 1.0,
) -> Selection:
    """Takes what was accumulated at some positions out of the residual, but for sums that were not finite.

    Args:
        positions: int64, ascending.
        before: float32, shape (n,): the residual before the gradient was added.
        grad: shape (n,), what was added to it.
        residual: float32, shape (n,). Mutated.
        nonfinite: how many sums were not finite; the residual was left alone there.
        out: filled with the selection.
        scale: factor on the gradient.
    """
    if nonfinite:
        positions = positions[torch.isfinite(before[positions] + grad[positions].float() * scale)]
    nnz = positions.numel()
    out.indices[:nnz] = positions.to(torch.uint32)
    out.values[:nnz] = residual[positions]
    residual[positions] = 0.0
    return Selection(nnz, nonfinite)


class Compressor(abc.ABC):
    """Base of all compressors. Instances are frozen options; per-bucket memory is passed in.

    Attributes:
        collectives: names of the only collectives that can exchange what it makes, the one that "auto" takes first;
            empty if it makes indices and values, which any collective that is not special can exchange.
    """

    collectives: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def density_at(self, step: int) -> float:
        """Returns the fraction of elements to send at this step, in (0, 1]."""

    @property
    def is_dense(self) -> bool:
        """True if every element is sent and no residual is needed."""
        return False

    def k_for(self, numel: int, step: int) -> int:
        """Returns how many of `numel` elements to send at this step: at least one, density * numel rounded."""
        return min(numel, max(1, round(self.density_at(step) * numel))) if numel else 0

    def capacity(self, k: int, numel: int) -> int:
        """Returns the length the output buffers need to select about k of numel elements."""
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
        """Adds the gradient to the residual and takes out about k of the largest magnitudes.

        NaN and infinite sums are never selected, and leave the residual as it was there. `sparsecomm.testing` checks
        all that is said here.

        Args:
            grad: shape (n,), float32, float16 or bfloat16.
            residual: shape (n,), float32. Mutated: zero where something is selected, the sum elsewhere.
            k: how many elements to select.
            memory: this bucket's memory. Mutated.
            out: filled with the selection, indices ascending.
            scale: factor on the gradient.
        """


@dataclass(frozen=True)
class SparsifyingCompressor(Compressor):
    """Shared options of compressors with a density."""

    density: Density = field(default=0.01)

    def __post_init__(self) -> None:
        if not callable(self.density):
            object.__setattr__(self, "density", check_density(self.density))

    def density_at(self, step: int) -> float:
        """Returns the scheduled density."""
        return density_at(self.density, step)
