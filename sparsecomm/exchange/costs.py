"""What moving and computing costs a rank, and what an exchange is expected to take."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Costs", "Estimate"]


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured by `sparsecomm.exchange.auto`; every figure the slowest rank's, the same on all ranks.

    Attributes:
        alpha: seconds a round of messages takes beyond its bytes.
        beta: seconds a byte that every rank sends while it receives as much.
        exchange: seconds an exchange takes beyond all else: our own code.
        select: seconds an element of the bucket: accumulate and select.
        fill: seconds an element that is written.
        encode: seconds a nonzero.
        decode: seconds a nonzero: decode and add.
        add: seconds an element that is added to another.
        nodes: how many nodes the ranks are on.
        beside: ranks of the largest node.
        inner_alpha: as alpha, between ranks of one node.
        inner_beta: as beta, between ranks of one node.
    """

    alpha: float
    beta: float
    exchange: float
    select: float
    fill: float
    encode: float
    decode: float
    add: float
    nodes: int = field(default=1, kw_only=True)
    beside: int = field(default=1, kw_only=True)
    inner_alpha: float = field(default=0.0, kw_only=True)
    inner_beta: float = field(default=0.0, kw_only=True)

    @property
    def layered(self) -> bool:
        """Whether there are several nodes, and several ranks on one: what two levels are for."""
        return self.nodes > 1 and self.beside > 1


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
