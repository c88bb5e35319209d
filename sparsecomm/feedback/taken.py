"""What left a bucket's memory for one step. Each case is a class that can make the step final or take it back.

    SelectedTaken   some elements, at positions that this rank has chosen
    PlacesTaken     the elements at places that all ranks find together
    WholeTaken      the whole residual
    NothingTaken    nothing: the gradient itself is summed, beside a residual that is zero

The caller calls exactly one of `commit` and `undo`, once.
"""

from __future__ import annotations

import abc
from functools import cache

import torch

from sparsecomm import kernels
from sparsecomm.compress.places import Places
from sparsecomm.feedback.added import Added
from sparsecomm.types import Pairs

__all__ = ["NothingTaken", "PlacesTaken", "SelectedTaken", "Taken", "WholeTaken"]


class Taken(abc.ABC):
    """What left a bucket's memory for one step.

    Attributes:
        added: the gradient that was added to the memory before.
    """

    def __init__(self, added: Added) -> None:
        self.added = added

    @property
    def nonfinite(self) -> int:
        """Elements that were NaN or infinite."""
        return self.added.nonfinite

    @property
    @abc.abstractmethod
    def nnz(self) -> int:
        """Number of elements that this rank sends."""

    @abc.abstractmethod
    def commit(self) -> None:
        """Makes the step final after the exchange has succeeded."""

    @abc.abstractmethod
    def undo(self) -> None:
        """Returns residual and moments to what they were before the step; to rounding, if no copy was kept."""

    def _mask(self, indices: torch.Tensor) -> None:
        """Zeroes the momentum at some positions (uint32), where the correction asks for that (DGC's factor masking)."""
        velocity = self.added.memory.velocity
        if self.added.masking and velocity is not None and indices.numel():
            velocity[indices.to(torch.int64)] = 0.0


class SelectedTaken(Taken):
    """Some elements, at positions that this rank has chosen. The residual is zero there.

    Attributes:
        indices: uint32, shape (nnz,), ascending.
        values: float32, shape (nnz,).
        capacity: most pairs that the compressor may take from this bucket in a step.
    """

    def __init__(self, added: Added, pairs: Pairs | None = None, capacity: int = 0) -> None:
        super().__init__(added)
        self.indices, self.values = _nothing(added.incoming.grad.device) if pairs is None else pairs
        self.capacity = capacity

    @property
    def nnz(self) -> int:
        """Number of selected elements."""
        return self.values.numel()

    def commit(self) -> None:
        """Zeroes the momentum of the selected elements, and returns what was put aside."""
        self._mask(self.indices)
        self.added.finish()

    def undo(self) -> None:
        """Returns the selected elements, then takes the gradient out of the memory again."""
        self.added.undo((self.indices, self.values))

    def put_back(self) -> tuple[PlacesTaken, torch.Tensor]:
        """Returns the selected elements to the residual, as if only the gradient had been added.

        Returns:
            What takes the place of this object, and the positions that were selected: uint32, shape (nnz,), ascending.
        """
        residual = self.added.memory.residual
        if residual is not None:
            kernels.scatter_add(residual, self.indices, self.values)
        return PlacesTaken(self.added), self.indices


class PlacesTaken(Taken):
    """The elements at places that all ranks find together. They leave the residual when the step is final.

    Attributes:
        places: the places, once they are found.
        rounding: float32, shape (places.count,): the part of the sent values that this rank rounded off; None for
            nothing.
    """

    def __init__(self, added: Added) -> None:
        super().__init__(added)
        self.places: Places | None = None
        self.rounding: torch.Tensor | None = None

    @property
    def nnz(self) -> int:
        """Number of elements at the places; 0 before they are found."""
        return 0 if self.places is None else self.places.count

    def commit(self) -> None:
        """Leaves nothing at the places but what was rounded off."""
        memory, places = self.added.memory, self.places
        assert places is not None, "places are found before a step is final"
        if memory.residual is not None:
            if self.rounding is None:
                places.fill(memory.residual, 0.0)
            else:
                places.put(self.rounding, memory.residual)
        if self.added.masking and memory.velocity is not None:
            places.fill(memory.velocity, 0.0)
        self.added.finish()

    def undo(self) -> None:
        """Takes the gradient out of the memory again."""
        self.added.undo(None)


class WholeTaken(Taken):
    """The whole residual, which keeps its content until the step is final.

    Attributes:
        rest: float32, shape (n,): what the residual is after the step (rounding, or a part that was not sent); None for
            zero.
        masked: uint32, ascending: positions at which momentum is zeroed; None for none.
    """

    def __init__(self, added: Added) -> None:
        super().__init__(added)
        self.rest: torch.Tensor | None = None
        self.masked: torch.Tensor | None = None

    @property
    def nnz(self) -> int:
        """All elements."""
        return self.added.incoming.grad.numel()

    def commit(self) -> None:
        """Replaces the residual by the rest."""
        memory = self.added.memory
        if memory.residual is not None:
            memory.residual.zero_() if self.rest is None else memory.residual.copy_(self.rest)
            memory.empty = self.rest is None and not self.added.holds_values()
        if self.masked is not None:
            self._mask(self.masked)
        self.added.finish()

    def undo(self) -> None:
        """Takes the gradient out of the memory again."""
        self.added.undo(None)


class NothingTaken(Taken):
    """Nothing: the gradient itself is summed, and the residual, which is zero, stays so."""

    @property
    def nnz(self) -> int:
        """All elements of the gradient."""
        return self.added.incoming.grad.numel()

    def commit(self) -> None:
        """Does nothing."""

    def undo(self) -> None:
        """Does nothing: the memory was not touched."""


@cache
def _nothing(device: torch.device) -> Pairs:
    return torch.empty(0, dtype=torch.uint32, device=device), torch.empty(0, device=device)
