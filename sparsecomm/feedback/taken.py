"""The elements that leave the memory of a bucket in one step. Each class can commit or undo the step.

    SelectedTaken   some elements, at positions that this rank selected
    PlacesTaken     the elements at places that all ranks find together
    WholeTaken      the whole residual
    GradientTaken   no elements of the memory: the gradient itself is summed, and the residual is zero

The caller must call exactly one of `commit` and `undo`, once.
"""

from __future__ import annotations

import abc
from functools import cache

import torch

from sparsecomm import kernels
from sparsecomm.compress.places import Places
from sparsecomm.feedback.added import Added
from sparsecomm.feedback.memory import Empty
from sparsecomm.types import Pairs

__all__ = ["GradientTaken", "PlacesTaken", "SelectedTaken", "Taken", "WholeTaken"]


class Taken(abc.ABC):
    """The elements that leave the memory of a bucket in one step.

    Attributes:
        added: the gradient that was added to the memory in this step.
        clears_all: whether all ranks know that nothing waits on any of them after this step; set by the method.
    """

    def __init__(self, added: Added) -> None:
        self.added = added
        self.clears_all = False

    @property
    def nonfinite(self) -> int:
        """Number of elements that were NaN or infinite."""
        return self.added.nonfinite

    @property
    @abc.abstractmethod
    def nnz(self) -> int:
        """Number of elements that this rank sends."""

    @property
    def leaves_nothing(self) -> bool:
        """Whether nothing waits on this rank once the step is final."""
        return False

    @abc.abstractmethod
    def commit(self) -> None:
        """Makes the step final, after the exchange has succeeded."""

    def undo(self) -> None:
        """Restores residual and moments from before the step, exactly if there are copies, otherwise to rounding."""
        self.added.undo(None)

    def _mask(self, indices: torch.Tensor) -> None:
        """Zeroes the momentum at these positions (uint32), if the correction uses DGC's factor masking."""
        velocity = self.added.memory.velocity
        if self.added.masking and velocity is not None and indices.numel():
            velocity[indices.to(torch.int64)] = 0.0


class SelectedTaken(Taken):
    """Some elements, at positions that this rank selected. The residual is zero there.

    Attributes:
        indices: uint32, shape (nnz,), positions of the elements, ascending.
        values: float32, shape (nnz,), the elements.
        capacity: largest number of elements that the compressor may take from this bucket in a step.
    """

    def __init__(self, added: Added, pairs: Pairs | None = None, capacity: int = 0) -> None:
        super().__init__(added)
        self.indices, self.values = _nothing(added.incoming.grad.device) if pairs is None else pairs
        self.capacity = capacity
        self._given: Pairs | None = None

    def give(self, positions: torch.Tensor, values: torch.Tensor) -> None:
        """Subtracts elements that the average holds, although this rank did not send them, from the residual.

        Args:
            positions: int64, shape (m,), distinct.
            values: float32, shape (m,).
        """
        residual = self.added.memory.residual
        if residual is not None:
            residual[positions] -= values
            self._given = (positions, values)

    @property
    def nnz(self) -> int:
        """Number of selected elements."""
        return self.values.numel()

    def commit(self) -> None:
        """Zeroes the momentum of the selected elements if needed, and restores the memory of unused parameters."""
        self._mask(self.indices)
        if self.added.memory.watch is not None:
            self.added.memory.watch.keep()
        self.added.finish()

    def undo(self) -> None:
        """Returns the selected and the given elements to the residual and undoes the addition of the gradient."""
        residual = self.added.memory.residual
        if self._given is not None and residual is not None:
            residual[self._given[0]] += self._given[1]
        self.added.undo((self.indices, self.values))

    def as_places(self) -> tuple[PlacesTaken, torch.Tensor]:
        """Returns the selected elements to the residual, as if only the gradient had been added.

        Returns:
            An object to use instead of this one, and the selected positions: uint32, shape (nnz,), ascending.
        """
        residual = self.added.memory.residual
        if residual is not None:
            kernels.scatter_add(residual, self.indices, self.values)
        return PlacesTaken(self.added), self.indices


class PlacesTaken(Taken):
    """The elements at places that all ranks find together. They leave the residual when the step is final.

    Attributes:
        places: the places; None before they are found.
        rounding: float32, shape (places.count,), errors of the values that this rank rounded; None if it rounded none.
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
        """Replaces the residual at the places by the rounding, and zeroes the momentum there if needed."""
        memory, places = self.added.memory, self.places
        assert places is not None, "places are found before a step is final"
        if memory.residual is not None:
            if memory.watch is not None:
                memory.watch.look_before()
            if self.rounding is None:
                places.fill(memory.residual, 0.0)
            else:
                places.put(self.rounding, memory.residual)
            if memory.watch is not None:
                memory.watch.look(self.added.hidden)
                memory.watch.keep()
        if self.added.masking and memory.velocity is not None:
            places.fill(memory.velocity, 0.0)
        self.added.finish()


class WholeTaken(Taken):
    """The whole residual, which keeps its content until the step is final.

    Attributes:
        rest: float32, shape (n,), the residual after the step: rounding, or a part that was not sent. None for zero.
        masked: uint32, ascending, positions at which momentum is zeroed; None for none.
    """

    def __init__(self, added: Added) -> None:
        super().__init__(added)
        self.rest: torch.Tensor | None = None
        self.masked: torch.Tensor | None = None

    @property
    def nnz(self) -> int:
        """Number of all elements."""
        return self.added.incoming.grad.numel()

    @property
    def leaves_nothing(self) -> bool:
        """Whether nothing waits on this rank once the step is final."""
        return self.rest is None and not self.added.set_aside_is_nonzero()

    def commit(self) -> None:
        """Replaces the residual by `rest`, and zeroes the momentum at `masked`."""
        memory = self.added.memory
        if memory.residual is not None:
            memory.residual.zero_() if self.rest is None else memory.residual.copy_(self.rest)
            memory.empty = Empty.HERE if self.leaves_nothing else Empty.UNKNOWN
            if memory.watch is not None:
                memory.watch.keep_whole(rest=self.rest is not None)
        if self.clears_all:
            memory.empty = Empty.EVERYWHERE
        if self.masked is not None:
            self._mask(self.masked)
        self.added.finish()


class GradientTaken(Taken):
    """No elements of the memory: the gradient itself is summed, and the residual stays zero."""

    @property
    def nnz(self) -> int:
        """Number of all elements of the gradient."""
        return self.added.incoming.grad.numel()

    @property
    def leaves_nothing(self) -> bool:
        """True: the residual is zero before and after the step."""
        return True

    def commit(self) -> None:
        """Notes whether nothing waits on any rank. Nothing else has changed."""
        if self.clears_all:
            self.added.memory.empty = Empty.EVERYWHERE

    def undo(self) -> None:
        """Does nothing, since the memory was not changed."""


@cache
def _nothing(device: torch.device) -> Pairs:
    return torch.empty(0, dtype=torch.uint32, device=device), torch.empty(0, device=device, dtype=torch.float32)
