"""Options of PowerSGD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from sparsecomm.compress.signs import WholeBucket
from sparsecomm.errors import ConfigError

__all__ = ["PowerSGD"]


@dataclass(frozen=True)
class PowerSGD(WholeBucket):
    """Low-rank approximation with error feedback (Vogels et al. 2019).

    Attributes:
        rank: rank of the approximation, at least 1. A matrix of m rows and n columns takes rank * (m + n) values.
            Parameters that this does not make smaller are sent uncompressed.

    Raises:
        ConfigError: if the rank is not a whole number >= 1.
    """

    rank: int = 1
    collectives: ClassVar[tuple[str, ...]] = ("powersgd",)

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank must be a whole number >= 1, got {self.rank!r}")

    @override
    def k_for(self, numel: int, step: int) -> int:
        """Assumes that the bucket is one square matrix, because the shapes in it are not known here."""
        side = math.isqrt(numel)
        return min(numel, self.rank * (side + -(-numel // max(side, 1))))
