"""Modes of training: how far workers may run apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsecomm.errors import ConfigError

__all__ = ["Asynchronous", "Mode", "StaleSynchronous", "Synchronous"]


@dataclass(frozen=True)
class Synchronous:
    """Bulk-synchronous: each update is the average of one push of every living worker, and all wait for the slowest."""

    rounds: ClassVar[bool] = True
    lead: ClassVar[int | None] = 0


@dataclass(frozen=True)
class StaleSynchronous:
    """Stale-synchronous (Ho et al. 2013): each push is an update, and no worker runs ahead by more than `bound`.

    Attributes:
        bound: Number of pushes that a worker may be ahead of the slowest living one when it pulls.
    """

    bound: int = 3

    rounds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.bound, bool) or not isinstance(self.bound, int) or self.bound < 0:
            raise ConfigError(f"StaleSynchronous.bound must be a whole number >= 0, got {self.bound!r}")

    @property
    def lead(self) -> int | None:
        """Number of pushes that a worker may be ahead of the slowest."""
        return self.bound


@dataclass(frozen=True)
class Asynchronous:
    """Asynchronous: each push is an update, and no worker waits for another."""

    rounds: ClassVar[bool] = False
    lead: ClassVar[int | None] = None


Mode = Synchronous | StaleSynchronous | Asynchronous
"""Any of the three modes. `rounds`: whether updates average a round of pushes; `lead`: pushes a worker may be ahead."""
