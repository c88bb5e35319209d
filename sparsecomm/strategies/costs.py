"""What moving and computing costs a rank, and what an exchange is expected to take."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Costs", "Estimate"]


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured by `sparsecomm.choose`; every figure the slowest rank's, the same on all ranks.

    Attributes:
        alpha: seconds a round of messages takes beyond its bytes.
        beta: seconds a byte that every rank sends while it receives as much.
        exchange: seconds an exchange takes beyond all else: our own code.
        select: seconds an element of the bucket: accumulate and select.
        fill: seconds an element that is written.
        encode: seconds a nonzero.
        decode: seconds a nonzero: decode and add.
        add: seconds an element that is added to another.
    """

    alpha: float
    beta: float
    exchange: float
    select: float
    fill: float
    encode: float
    decode: float
    add: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected seconds of an exchange.

    Attributes:
        link: waiting for messages.
        compute: everything else.
    """

    link: float
    compute: float

    @property
    def seconds(self) -> float:
        """Both."""
        return self.link + self.compute
