"""Measured costs of communication and computation, and the predicted seconds of an exchange."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Costs", "Estimate"]


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs measured by `sparsecomm.exchange.auto`, the same on all ranks. Every figure is that of the slowest rank.

    Attributes:
        alpha: seconds per round of messages, whatever their length.
        beta: seconds per byte that every rank sends while it receives one.
        exchange: seconds per exchange that the package's own code takes.
        select: seconds per element to accumulate and select.
        fill: seconds per element to write.
        encode: seconds per nonzero to encode.
        decode: seconds per nonzero to decode and add.
        add: seconds per element to add.
        nodes: number of nodes.
        beside: number of ranks on the largest node.
        inner_alpha: `alpha` between ranks of one node.
        inner_beta: `beta` between ranks of one node.
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
        """Whether there are several nodes and some node has several ranks."""
        return self.nodes > 1 and self.beside > 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predicted seconds of an exchange.

    Attributes:
        link: seconds of waiting for messages.
        compute: seconds of everything else.
    """

    link: float
    compute: float

    @property
    def seconds(self) -> float:
        """Predicted seconds in total."""
        return self.link + self.compute
