"""Two levels: a dense sum inside each node, then a sparse exchange between the leaders of the nodes.

    1 sum       sum the residuals of a node at its lowest rank, the leader, in rank order
    2 exchange  the leader selects from the sum and exchanges with the other leaders, by sparse allgather or
                split-reduce; this runs the whole pipeline of a bucket again, on a channel of the leaders
    3 share     the leader sends the sparse result to the ranks of its node

The part of a node's sum that is not selected stays in the residual of the leader. The residuals of the other ranks are
zero afterwards. If all ranks are on one node, nothing is compressed: a dense allreduce sums the residuals.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import ClassVar

import torch
from typing_extensions import override

from sparsecomm import kernels
from sparsecomm.collectives import DenseSum, dense_allreduce, dense_ring_bytes, reduce
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
    """Sums densely inside a node and sparsely between nodes."""

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
        """Assumes one rank per node, since `sizes` does not tell nodes; `two_level_bytes` takes nodes.

        The other ranks of a node send 4 bytes per element, in shared memory.
        """
        return two_level_bytes(sizes, range(sizes.ranks))

    @classmethod
    @override
    def rounds(cls, ranks: int) -> int:
        """Counts the agreement, the exchange between leaders, the sum inside the node and the sharing of the result."""
        return 3 * (ranks - 1).bit_length() + 3 * min(1, ranks - 1)

    @classmethod
    @override
    def seconds(cls, sizes: Sizes, costs: Costs) -> Estimate:
        """Predicts the seconds of a leader, which has the link of its node to itself."""
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
        """Ranks of this node, ascending; the first is the leader."""
        return self._nodes[self.exchange.channel.nodes[self.exchange.channel.rank]]

    @override
    def take(self) -> WholeTaken:
        """Takes the whole residual, since the leader selects only after the sum."""
        self._taken = self.exchange.take_whole()
        return self._taken

    @override
    def encode(self) -> None:
        """Writes the header and queues up for the inner process group."""
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
            yield from dense_allreduce(channel, DenseSum(total), exchange.arena, key)
            self._dense = total
            return bool(torch.isfinite(total).all())
        if self._turn is None:
            yield from reduce(channel, total, self._node, exchange.arena, key)
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
        """Scales by the number of nodes, since the leaders computed an average over nodes."""
        if self._dense is not None:
            out.copy_(self._dense.mul_(scale))
            return
        pairs = None if self._outcome is None else self._outcome.pairs
        assert pairs is not None, "nothing was exchanged"
        kernels.scatter_reduce(out, [pairs], scale=scale * len(self._nodes))

    @override
    def finish(self) -> None:
        """Stores the state of the leaders' method, and the positions at which momentum is zeroed."""
        self.exchange.memory.shared = None if self._outcome is None else self._outcome.shared
        self._taken.masked = None if self._outcome is None else self._outcome.chosen

    @override
    def give_up(self, *, together: bool) -> None:
        """Leaves the queue for the inner process group."""
        if self._turn is not None:
            self._turn.leave()


def two_level_bytes(sizes: Sizes, nodes: Sequence[int]) -> int:
    """Returns the bytes that the busiest leader sends, if positions are uniform.

    Args:
        sizes: sizes of the bucket; `k` is the selection of a leader, and `ranks` is ignored.
        nodes: node of each rank.
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
