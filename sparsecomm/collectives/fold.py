"""Folds surplus ranks, so that algorithms for powers of two work for any number of ranks (Thakur et al. 2005).

Among the first 2 x surplus ranks, each odd one gives its vector to the even one before it and gets the result at the
end.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Core"]


@dataclass(frozen=True, slots=True)
class Core:
    """The ranks that remain when the surplus ranks are folded.

    Attributes:
        size: Number of these ranks, the largest power of two that does not exceed the number of ranks.
        surplus: Number of folded ranks.
        rank: This rank.
    """

    size: int
    surplus: int
    rank: int

    @classmethod
    def of(cls, rank: int, size: int) -> Core:
        """Returns the core of `size` ranks, as seen from one of them."""
        core = 1 << (size.bit_length() - 1)
        return cls(core, size - core, rank)

    @property
    def giver(self) -> bool:
        """Whether this rank is folded, i.e. gives its vector to its partner."""
        return self.rank < 2 * self.surplus and self.rank % 2 == 1

    @property
    def partner(self) -> int | None:
        """The other rank of this rank's pair, or None if this rank is in no pair."""
        return self.rank ^ 1 if self.rank < 2 * self.surplus else None

    @property
    def index(self) -> int:
        """Number of this rank in the core."""
        return self.rank // 2 if self.rank < 2 * self.surplus else self.rank - self.surplus

    def rank_of(self, index: int) -> int:
        """Returns the rank with a number in the core."""
        return 2 * index if index < self.surplus else index + self.surplus
