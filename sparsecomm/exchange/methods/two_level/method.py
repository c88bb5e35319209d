"""Two levels: a dense sum inside each node, the sparse sum between the nodes' leaders, its result shared in the node.

    1 sum       the ranks of a node add what they have accumulated at their lowest rank, the leader, in rank order
    2 exchange  the leader selects from the node's sum and exchanges with the other leaders, by the sparse allgather or
                split-reduce: the whole pipeline of a bucket again, on a channel of the leaders
    3 share     the leader sends the sparse result to the ranks of its node

The part of a node's sum that is not selected stays in the leader's residual; those of the other ranks are empty
afterwards. If all ranks are on one node nothing is compressed: a dense allreduce, which leaves nothing over.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import ClassVar

import torch
from typing_extensions import override

from sparsecomm import kernels
from sparsecomm.collectives import dense_allreduce, dense_ring_bytes, node_sum
from sparsecomm.exchange.agree import Agreement, agreement_bytes
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import Method, Scope, register
from sparsecomm.exchange.methods.allgather import Allgather
from sparsecomm.exchange.methods.split_reduce import SplitReduce
from sparsecomm.exchange.methods.two_level.leaders import Outcome, follow, lead, leaders_method
from sparsecomm.feedback import WholeTaken
from sparsecomm.transport import CollectiveSteps, GroupSum
from sparsecomm.types import Codecs, Sizes, ValueCodec
from sparsecomm.wire import HEADER_BYTES, body_bytes

__all__ = ["TwoLevel", "two_level_bytes"]


@register
class TwoLevel(Method):
    """Sums densely where memory is shared, sparsely between nodes."""

    name = "two_level"
    number = 10
    has_body = False
    must_match: ClassVar = {"nnz": "k", "value_codec": "value_codec", "tag": "nodes"}
    scope = Scope.NODES

    _taken: WholeTaken
    _nodes: dict[int, list[int]]
    _turn: GroupSum | None = None
    _dense: torch.Tensor | None = None
    _outcome: Outcome | None = None

    @classmethod
    @override
    def bytes_sent(cls, sizes: Sizes) -> int:
        """For a leader whose node has no other ranks, since nothing here tells nodes.

        `two_level_bytes` is told them. The other ranks of a node send 4 bytes an element, in shared memory.
        """
        return two_level_bytes(sizes, range(sizes.ranks))

    @classmethod
    @override
    def rounds(cls, ranks: int) -> int:
        """The agreement, the exchange between leaders, the sum in the node and its result."""
        return 3 * (ranks - 1).bit_length() + 3 * min(1, ranks - 1)

    @classmethod
    @override
    def seconds(cls, sizes: Sizes, costs: Costs) -> Estimate:
        """For a leader. A link that all ranks of a node shared is the leader's alone."""
        k, n, others, nodes = sizes.k, sizes.numel, costs.beside - 1, costs.nodes
        between = two_level_bytes(sizes, range(nodes))
        shared = two_level_bytes(sizes, [0, *range(nodes)]) - between
        rounds = 2 * (nodes - 1).bit_length() + (sizes.ranks - 1).bit_length()
        link = costs.alpha * rounds + costs.beta * between / costs.beside
        inside = 2 * costs.inner_alpha + costs.inner_beta * others * (4 * n + shared)
        summing = costs.add * others * n + 2 * costs.fill * n
        nonzeros = costs.encode * k + costs.decode * k * (nodes + others)
        compute = 3 * costs.exchange + (costs.select + costs.fill) * n + summing + nonzeros
        return Estimate(link + inside, compute)

    @property
    def _node(self) -> list[int]:
        """The ranks of this node, ascending; the first leads."""
        return self._nodes[self.exchange.channel.nodes[self.exchange.channel.rank]]

    @override
    def take(self) -> WholeTaken:
        """Takes all of it; the leader selects from the node's sum."""
        self._taken = self.exchange.take_whole()
        return self._taken

    @override
    def encode(self) -> None:
        """Makes the header, which is all that goes ahead, and queues up for the inner process group."""
        exchange, plan, channel = self.exchange, self.exchange.plan, self.exchange.channel
        self._nodes = {}
        for rank, node in enumerate(channel.nodes):
            self._nodes.setdefault(node, []).append(rank)
        self.header = exchange.header()
        self.header.nnz = plan.k
        self.header.value_codec = plan.value_codec
        options = (channel.nodes, plan.masking, plan.inner_group is not None)
        self.header.tag = zlib.crc32(repr(options).encode())
        self.make_bare_payload()
        if plan.inner_group is not None and len(self._nodes) > 1:
            members = [channel.world_rank(r) for r in self._node]
            self._turn = GroupSum(plan.inner_group, members[0], members, blocking=channel.blocking)

    @override
    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        exchange, channel, key = self.exchange, self.exchange.channel, self.exchange.memory.index
        residual = exchange.memory.residual
        assert residual is not None, "a sparse exchange needs a residual"
        total = exchange.arena.get((key, "node sum"), residual.numel(), torch.float32)
        total.copy_(residual)
        if len(self._nodes) == 1:
            yield from dense_allreduce(channel, total, exchange.arena, key)
            self._dense = total
            return bool(torch.isfinite(total).all())
        if self._turn is None:
            yield from node_sum(channel, total, self._node, exchange.arena, key)
        else:
            yield [self._turn]
            yield [self._turn.start(total)]
        if channel.rank == self._node[0]:
            leaders = sorted(ranks[0] for ranks in self._nodes.values())
            self._outcome = yield from lead(exchange, self.header, total, leaders, self._node)
            self._taken.rest = self._outcome.rest
        else:
            self._outcome = yield from follow(exchange, self.header, self._node[0], masked=exchange.plan.masking)
        return self._outcome.pairs is not None

    @override
    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """The leaders have divided by their number already."""
        if self._dense is not None:
            out.copy_(self._dense.mul_(scale))
            return
        pairs = None if self._outcome is None else self._outcome.pairs
        assert pairs is not None, "nothing was exchanged"
        kernels.scatter_reduce(out, [pairs], scale=scale * len(self._nodes))

    @override
    def finish(self) -> None:
        """Remembers what the leaders do, and where momentum is to be zeroed."""
        self.exchange.memory.shared = None if self._outcome is None else self._outcome.shared
        self._taken.masked = None if self._outcome is None else self._outcome.chosen

    @override
    def give_up(self, *, agreed: bool) -> None:
        """Lets the next exchange have the inner process group."""
        if self._turn is not None:
            self._turn.leave()


def two_level_bytes(sizes: Sizes, nodes: Sequence[int]) -> int:
    """Returns the bytes that the busiest leader of a node sends, for uniform positions.

    Args:
        sizes: of the bucket; `k` nonzeros are selected by a leader. `ranks` is not used.
        nodes: the node of every rank.
    """
    counts = [nodes.count(n) for n in set(nodes)]
    if len(counts) == 1:
        return agreement_bytes(len(nodes)) + dense_ring_bytes(sizes.numel, len(nodes))
    leaders = Sizes(sizes.k, sizes.numel, len(counts), sizes.values, sizes.indices)
    between = min(Allgather.bytes_sent(leaders), SplitReduce.bytes_sent(leaders))
    kept = sizes.k
    if leaders_method(leaders) is Allgather and sizes.k < sizes.numel:
        kept = round(sizes.numel * -math.expm1(len(counts) * math.log1p(-sizes.k / sizes.numel)))
    result = HEADER_BYTES + body_bytes(kept, sizes.numel, Codecs(ValueCodec.FP32))
    return agreement_bytes(len(nodes)) + between + (max(counts) - 1) * result
