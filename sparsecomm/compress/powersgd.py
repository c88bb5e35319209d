"""Options of PowerSGD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from sparsecomm.compress.signs import WholeBucket
from sparsecomm.errors import ConfigError

__all__ = ["PowerSGD"]


@dataclass(frozen=True)
class PowerSGD(WholeBucket):
    """Low-rank approximation with error feedback (Vogels et al. 2019).

    Attributes:
        rank: of the approximation, at least 1. A matrix of m rows and n columns takes rank (m + n) values; parameters
            of which that is not less travel as they are.

    Raises:
        ConfigError: if the rank is not a whole number >= 1.
    """

    rank: int = 1
    collectives: ClassVar[tuple[str, ...]] = ("powersgd",)

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank must be a whole number >= 1, got {self.rank!r}")

    def k_for(self, numel: int, step: int) -> int:
        """Returns how many values are sent of a bucket that is one square matrix: shapes are not known here."""
        side = math.isqrt(numel)
        return min(numel, self.rank * (side + -(-numel // max(side, 1))))
