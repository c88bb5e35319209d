"""Which collective to use for a bucket, and which algorithm for a dense allreduce.

Every rank computes the same answer from the same numbers, so nothing is exchanged to agree on it.
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
    """How a dense vector is summed over ranks."""

    DOUBLING = "recursive doubling"
    HALVING = "recursive halving and doubling"
    RING = "pipelined ring"


@dataclass(frozen=True, slots=True)
class _Link:
    """What moving and adding costs a rank.

    Attributes:
        alpha: seconds a round takes beyond its bytes: the messages' way through Python, MPI and the link.
        beta: seconds a byte, sent and received at the same time.
        gamma: seconds a byte that is added while nothing moves.
        segment: elements of a ring's segments.
        hides: whether adding can hide behind moving; not where moving is the processor's work, too.
        turning: times longer that bytes take where the same two ranks send to each other, as in halving.
        crossing: times alpha that a round of a ring takes, in which a rank sends to one and waits for another.
    """

    alpha: float
    beta: float
    gamma: float
    segment: int
    hides: bool = True
    turning: float = 1.0
    crossing: float = 1.0


# One host: measured between two ranks that share memory (`bench collectives --algorithms ring,halving,doubling`).
# Network: 1 Gbit/s Ethernet, where choosing matters most; on a faster one the same rule loses at most the difference of
# a few rounds. Its gamma stands for more than the adder: at the end of every long message the link runs dry until both
# sides have turned round.
_SHARED_MEMORY = _Link(alpha=20e-6, beta=0.06e-9, gamma=0.05e-9, segment=SEGMENT, hides=False)
_NETWORK = _Link(alpha=100e-6, beta=8e-9, gamma=1e-9, segment=SEGMENT // 4, turning=1.15, crossing=2.5)


def _link(one_host: bool) -> _Link:
    return _SHARED_MEMORY if one_host else _NETWORK


def ring_segment(*, one_host: bool) -> int:
    """Returns how many elements a segment of a ring should have at most."""
    return _link(one_host).segment


def choose_dense(numel: int, size: int, wire: ValueCodec, *, one_host: bool) -> DenseAlgorithm:
    """Returns the algorithm with the lowest modelled time; in a tie the one with the fewest rounds.

    Args:
        numel: elements of the vector.
        size: number of ranks.
        wire: FP32, FP16 or BF16: how values travel.
        one_host: whether all ranks share memory.
    """
    seconds = _dense_times(numel, size, wire, _link(one_host))
    return min(seconds, key=seconds.__getitem__)


def dense_seconds(numel: int, size: int, wire: ValueCodec, *, alpha: float, beta: float, add: float) -> float:
    """Returns the modelled time of a dense allreduce by the best algorithm.

    Args:
        numel: elements of the vector.
        size: number of ranks.
        wire: FP32, FP16 or BF16: how values travel.
        alpha: seconds a round of messages takes beyond its bytes.
        beta: seconds a byte, sent and received at the same time.
        add: seconds an element that is added.
    """
    if size == 1:
        return 0.0
    return min(_dense_times(numel, size, wire, _Link(alpha, beta, add / 4, SEGMENT)).values())


def _dense_times(numel: int, size: int, wire: ValueCodec, link: _Link) -> dict[DenseAlgorithm, float]:
    full = 4 * numel
    moved = full if wire == ValueCodec.FP32 else full // 2
    rounds = size.bit_length() - 1  # among the ranks that remain when the surplus is folded away
    folding = 0 if size == 1 << rounds else 2
    share = (size - 1) / size
    blocks = ring_blocks(numel, size, link.segment)
    fold = folding * (link.alpha + moved * link.beta) + (full * link.gamma if folding else 0.0)
    adding = share * full * link.gamma
    moving = 2 * share * moved * link.beta
    return {
        DenseAlgorithm.DOUBLING: (rounds + folding) * (link.alpha + full * link.beta) + rounds * full * link.gamma,
        DenseAlgorithm.HALVING: fold + 2 * rounds * link.alpha + moving * link.turning + adding,
        # With several blocks adding hides behind moving, and each block costs its messages again.
        DenseAlgorithm.RING: 2 * (size - 1) * link.alpha * link.crossing * blocks
        + moving
        + adding / (blocks if link.hides else 1),
    }


def dense_ring_bytes(numel: int, size: int, codec: ValueCodec = ValueCodec.FP32) -> int:
    """Returns the bytes one rank sends in a ring allreduce of `numel` values over `size` ranks, 32 or 16 bits each."""
    return 2 * (4 if codec == ValueCodec.FP32 else 2) * numel * (size - 1) // size


def dense_allreduce_bytes(numel: int, size: int, wire: ValueCodec) -> int:
    """Returns the bytes that the busiest rank sends in a dense allreduce between hosts.

    Args:
        numel: elements of the vector.
        size: number of ranks.
        wire: FP32, FP16 or BF16.
    """
    algorithm = choose_dense(numel, size, wire, one_host=False)
    if algorithm == DenseAlgorithm.RING or size == 1:
        return dense_ring_bytes(numel, size, wire)
    rounds = size.bit_length() - 1
    core = 1 << rounds
    folded = 1 if size > core else 0  # a rank that has taken another's vector sends it the result
    if algorithm == DenseAlgorithm.DOUBLING:
        return 4 * numel * (rounds + folded)
    moved = (4 if wire == ValueCodec.FP32 else 2) * numel
    return 2 * moved * (core - 1) // core + folded * moved
