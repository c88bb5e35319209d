"""Any number of ranks for algorithms that need a power of two: the surplus is folded away first (Thakur et al. 2005).

Of the first 2 x surplus ranks each odd one gives its vector to the even one before it, and gets the result at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Core"]


@dataclass(frozen=True, slots=True)
class Core:
    """The ranks that remain when the surplus is folded away.

    Attributes:
        size: how many: the largest power of two that is not above the world size.
        surplus: how many ranks were folded away.
        rank: this rank's number in the world.
    """

    size: int
    surplus: int
    rank: int

    @classmethod
    def of(cls, rank: int, size: int) -> Core:
        """Returns the core of a world, seen from one of its ranks."""
        core = 1 << (size.bit_length() - 1)
        return cls(core, size - core, rank)

    @property
    def giver(self) -> bool:
        """Whether this rank gives its vector away."""
        return self.rank < 2 * self.surplus and self.rank % 2 == 1

    @property
    def partner(self) -> int | None:
        """The rank that this one folds with, if it does."""
        return self.rank ^ 1 if self.rank < 2 * self.surplus else None

    @property
    def index(self) -> int:
        """This rank's number in the core."""
        return self.rank // 2 if self.rank < 2 * self.surplus else self.rank - self.surplus

    def rank_of(self, index: int) -> int:
        """The rank that has a number in the core."""
        return 2 * index if index < self.surplus else index + self.surplus
