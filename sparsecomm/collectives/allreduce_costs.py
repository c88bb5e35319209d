"""Modelled times and bytes of the dense allreduce algorithms, and the choice among them.

Every rank computes the same answer from the same numbers, so the ranks need no message to agree on an algorithm. Where
the link between hosts is measured (link.py), its figures are the same on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sparsecomm.collectives.ring import SEGMENT, ring_blocks
from sparsecomm.transport import Link
from sparsecomm.types import ValueCodec

__all__ = [
    "UNMEASURED",
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


UNMEASURED = 1 << 11
"""Most elements of a dense sum that takes its algorithm from constants. Its bytes are too few for the link to matter:
recursive doubling is the fastest, or loses less than a measurement costs."""

_ANSWERED = 1 << 16
"""Least bytes of a message that an MPI over TCP sends only after the receiver has answered. The answer waits behind the
data that already goes the other way, if there are any."""


@dataclass(frozen=True, slots=True)
class _Costs:
    """Costs of messages and additions for a rank.

    Attributes:
        alpha: Seconds that a round takes beyond its bytes, for the messages' way through Python, MPI and the link.
        beta: Seconds per byte, sent and received at the same time.
        gamma: Seconds per byte that is added while no message moves.
        segment: Most elements of a ring's segment.
        hides: Whether additions overlap with messages. They do not where the processor itself moves the bytes.
        turning: Factor on the time per byte of long messages where the same two ranks send to each other, as in
            halving, in rounds that they do not start together.
        crossing: Factor on alpha in a round of a ring, in which a rank sends to one rank and waits for another.
        answering: Factor on alpha in a round of long messages, which the receiver has to answer first.
    """

    alpha: float
    beta: float
    gamma: float
    segment: int
    hides: bool = True
    turning: float = 1.0
    crossing: float = 1.0
    answering: float = 1.0

    def round(self, nbytes: float) -> float:
        """Returns the seconds that a round of messages takes beyond its bytes."""
        return self.alpha * (self.answering if nbytes >= _ANSWERED else 1.0)

    def waiting(self, longest: float, nbytes: float) -> float:
        """Returns the seconds for which answers wait behind data that go the other way.

        Args:
            longest: Bytes of the longest message.
            nbytes: Bytes of all messages in rounds that two ranks do not start together.
        """
        return nbytes * self.beta * (self.turning - 1.0) if longest >= _ANSWERED else 0.0


# One host: measured between two ranks that share memory (`bench collectives --algorithms ring,halving,doubling`).
# Network: 1 Gbit/s Ethernet, for ranks that have not measured their link.
_SHARED_MEMORY = _Costs(alpha=20e-6, beta=0.06e-9, gamma=0.05e-9, segment=SEGMENT, hides=False)
_ETHERNET = Link(alpha=100e-6, beta=8e-9)
_PROCESSOR = 5e-9  # seconds per byte, 1.6 Gbit/s; on a faster link the processor that moves the bytes is the limit


def _network(link: Link) -> _Costs:
    """Returns the costs between hosts.

    Measured between two to four hosts, `turning` is 2 at 100 Mbit/s, 1.5 to 2.4 at 1 Gbit/s and 1.0 to 1.3 at
    10 Gbit/s. There the processor that moves the bytes is the limit: neither answers nor additions hide behind the
    link. `crossing` is 1.0 to 1.8 for short messages, and `answering` is about 2.
    """
    slow = link.beta > _PROCESSOR
    turning = 2.0 if slow else 1.2
    return _Costs(link.alpha, link.beta, 0.1e-9, SEGMENT // 4, hides=slow, turning=turning, crossing=1.5, answering=2.0)


def _costs(one_host: bool, numel: int, link: Link | None) -> _Costs:
    if one_host:
        return _SHARED_MEMORY
    return _network(_ETHERNET if link is None or numel <= UNMEASURED else link)


def ring_segment(*, one_host: bool) -> int:
    """Returns the most elements that a segment of a ring should have."""
    return _costs(one_host, 0, None).segment


def choose_dense(
    numel: int, size: int, wire: ValueCodec, *, one_host: bool, link: Link | None = None
) -> DenseAlgorithm:
    """Returns the algorithm with the lowest modelled time; in a tie the one with the fewest rounds.

    Args:
        numel: Elements of the vector.
        size: Number of ranks.
        wire: Codec of the values on the wire: FP32, FP16 or BF16.
        one_host: Whether all ranks share memory.
        link: Measured link between the hosts of the ranks, the same on all of them. None takes that of 1 Gbit/s. Not
            used for at most `UNMEASURED` elements, nor on one host.
    """
    seconds = _dense_times(numel, size, wire, _costs(one_host, numel, link))
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
    return min(_dense_times(numel, size, wire, _Costs(alpha, beta, add / 4, SEGMENT)).values())


def _dense_times(numel: int, size: int, wire: ValueCodec, costs: _Costs) -> dict[DenseAlgorithm, float]:
    if size == 1:
        return dict.fromkeys(DenseAlgorithm, 0.0)
    full = 4 * numel
    moved = full if wire == ValueCodec.FP32 else full // 2
    rounds = size.bit_length() - 1  # among the ranks that remain when the surplus ranks are folded
    folding = 0 if size == 1 << rounds else 2
    share = (size - 1) / size
    blocks = ring_blocks(numel, size, costs.segment)
    fold = folding * (costs.round(moved) + moved * costs.beta) + (full * costs.gamma if folding else 0.0)
    adding = share * full * costs.gamma
    moving = 2 * share * moved
    # With several blocks, steps of different blocks share a time slot, and additions overlap with messages. Where the
    # processor is the limit, each block costs a full set of messages.
    overlap = costs.hides and blocks > 1
    slots = blocks + 4 * size - 6 if overlap else 2 * (size - 1) * blocks
    half, piece = moved / 2, moved / (size * blocks)
    together = 0 if folding else 1  # ranks that have taken part in folding do not start the first round together
    return {
        DenseAlgorithm.DOUBLING: (rounds + folding) * (costs.round(full) + full * costs.beta)
        + costs.waiting(full, (rounds - together) * full)
        + rounds * full * costs.gamma,
        DenseAlgorithm.HALVING: fold
        + 2 * sum(costs.round(moved / 2**i) for i in range(1, rounds + 1))
        + moving * costs.beta
        + costs.waiting(half, moving - together * half)
        + adding,
        DenseAlgorithm.RING: slots * costs.round(piece) * costs.crossing
        + moving * costs.beta
        + (costs.waiting(piece, moving - piece) if size == 2 else 0.0)
        + adding / (blocks if overlap else 1),
    }


def dense_ring_bytes(numel: int, size: int, codec: ValueCodec = ValueCodec.FP32) -> int:
    """Returns the bytes that a rank sends in a ring allreduce of `numel` values of 32 or 16 bits over `size` ranks."""
    return 2 * (4 if codec == ValueCodec.FP32 else 2) * numel * (size - 1) // size


def dense_allreduce_bytes(numel: int, size: int, wire: ValueCodec, *, link: Link | None = None) -> int:
    """Returns the bytes that the busiest rank sends in a dense allreduce between hosts.

    Halving and a ring send the same bytes where the number of ranks is a power of two. Recursive doubling sends more.

    Args:
        numel: Elements of the vector.
        size: Number of ranks.
        wire: Codec of the values on the wire: FP32, FP16 or BF16.
        link: Link that the ranks have measured; None for ranks that have not measured one.
    """
    algorithm = choose_dense(numel, size, wire, one_host=False, link=link)
    if algorithm == DenseAlgorithm.RING or size == 1:
        return dense_ring_bytes(numel, size, wire)
    rounds = size.bit_length() - 1
    core = 1 << rounds
    folded = 1 if size > core else 0  # a rank that took the vector of a surplus rank sends it the result
    if algorithm == DenseAlgorithm.DOUBLING:
        return 4 * numel * (rounds + folded)
    moved = (4 if wire == ValueCodec.FP32 else 2) * numel
    return 2 * moved * (core - 1) // core + folded * moved
