"""Modelled times and bytes of the dense allreduce algorithms, and the choice among them.

Every rank computes the same answer from the same numbers, so the ranks need no message to agree on an algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sparsecomm.collectives.ring import SEGMENT, ring_blocks
from sparsecomm.types import ValueCodec

__all__ = [
    "DenseAlgorithm",
    "choose_dense",
    "dense_allreduce_bytes",
    "dense_ring_bytes",
    "dense_seconds",
    "ring_segment",
]


class DenseAlgorithm(Enum):
    """Algorithms for the sum of a dense vector over ranks."""

    DOUBLING = "recursive doubling"
    HALVING = "recursive halving and doubling"
    RING = "pipelined ring"


@dataclass(frozen=True, slots=True)
class _Link:
    """Costs of messages and additions for a rank.

    Attributes:
        alpha: Seconds that a round takes beyond its bytes, for the messages' way through Python, MPI and the link.
        beta: Seconds per byte, sent and received at the same time.
        gamma: Seconds per byte that is added while no message moves.
        segment: Most elements of a ring's segment.
        hides: Whether additions overlap with messages. They do not where the processor itself moves the bytes.
        turning: Factor on the time per byte where the same two ranks send to each other, as in halving.
        crossing: Factor on alpha in a round of a ring, in which a rank sends to one rank and waits for another.
    """

    alpha: float
    beta: float
    gamma: float
    segment: int
    hides: bool = True
    turning: float = 1.0
    crossing: float = 1.0


# One host: measured between two ranks that share memory (`bench collectives --algorithms ring,halving,doubling`).
# Network: 1 Gbit/s Ethernet, where the choice matters most. On a faster network the same rule loses at most the
# difference of a few rounds. The network's gamma covers more than the addition: after every long message the link is
# idle until both sides have turned round.
_SHARED_MEMORY = _Link(alpha=20e-6, beta=0.06e-9, gamma=0.05e-9, segment=SEGMENT, hides=False)
_NETWORK = _Link(alpha=100e-6, beta=8e-9, gamma=1e-9, segment=SEGMENT // 4, turning=1.15, crossing=2.5)


def _link(one_host: bool) -> _Link:
    return _SHARED_MEMORY if one_host else _NETWORK


def ring_segment(*, one_host: bool) -> int:
    """Returns the most elements that a segment of a ring should have."""
    return _link(one_host).segment


def choose_dense(numel: int, size: int, wire: ValueCodec, *, one_host: bool) -> DenseAlgorithm:
    """Returns the algorithm with the lowest modelled time; in a tie the one with the fewest rounds.

    Args:
        numel: Elements of the vector.
        size: Number of ranks.
        wire: Codec of the values on the wire: FP32, FP16 or BF16.
        one_host: Whether all ranks share memory.
    """
    seconds = _dense_times(numel, size, wire, _link(one_host))
    return min(seconds, key=seconds.__getitem__)


def dense_seconds(numel: int, size: int, wire: ValueCodec, *, alpha: float, beta: float, add: float) -> float:
    """Returns the modelled seconds of a dense allreduce by the best algorithm.

    Args:
        numel: Elements of the vector.
        size: Number of ranks.
        wire: Codec of the values on the wire: FP32, FP16 or BF16.
        alpha: Seconds that a round of messages takes beyond its bytes.
        beta: Seconds per byte, sent and received at the same time.
        add: Seconds per element that is added.
    """
    if size == 1:
        return 0.0
    return min(_dense_times(numel, size, wire, _Link(alpha, beta, add / 4, SEGMENT)).values())


def _dense_times(numel: int, size: int, wire: ValueCodec, link: _Link) -> dict[DenseAlgorithm, float]:
    full = 4 * numel
    moved = full if wire == ValueCodec.FP32 else full // 2
    rounds = size.bit_length() - 1  # among the ranks that remain when the surplus ranks are folded
    folding = 0 if size == 1 << rounds else 2
    share = (size - 1) / size
    blocks = ring_blocks(numel, size, link.segment)
    fold = folding * (link.alpha + moved * link.beta) + (full * link.gamma if folding else 0.0)
    adding = share * full * link.gamma
    moving = 2 * share * moved * link.beta
    return {
        DenseAlgorithm.DOUBLING: (rounds + folding) * (link.alpha + full * link.beta) + rounds * full * link.gamma,
        DenseAlgorithm.HALVING: fold + 2 * rounds * link.alpha + moving * link.turning + adding,
        # With several blocks additions overlap with messages, and each block costs a full set of messages.
        DenseAlgorithm.RING: 2 * (size - 1) * link.alpha * link.crossing * blocks
        + moving
        + adding / (blocks if link.hides else 1),
    }


def dense_ring_bytes(numel: int, size: int, codec: ValueCodec = ValueCodec.FP32) -> int:
    """Returns the bytes that a rank sends in a ring allreduce of `numel` values of 32 or 16 bits over `size` ranks."""
    return 2 * (4 if codec == ValueCodec.FP32 else 2) * numel * (size - 1) // size


def dense_allreduce_bytes(numel: int, size: int, wire: ValueCodec) -> int:
    """Returns the bytes that the busiest rank sends in a dense allreduce between hosts.

    Args:
        numel: Elements of the vector.
        size: Number of ranks.
        wire: Codec of the values on the wire: FP32, FP16 or BF16.
    """
    algorithm = choose_dense(numel, size, wire, one_host=False)
    if algorithm == DenseAlgorithm.RING or size == 1:
        return dense_ring_bytes(numel, size, wire)
    rounds = size.bit_length() - 1
    core = 1 << rounds
    folded = 1 if size > core else 0  # a rank that took the vector of a surplus rank sends it the result
    if algorithm == DenseAlgorithm.DOUBLING:
        return 4 * numel * (rounds + folded)
    moved = (4 if wire == ValueCodec.FP32 else 2) * numel
    return 2 * moved * (core - 1) // core + folded * moved
