"""Two levels: a dense sum inside each node, the sparse sum between the nodes' leaders, its result shared in the node.

    1 sum       the ranks of a node add what they have accumulated up at their lowest rank, the leader, in rank order
    2 exchange  the leader selects from the node's sum and exchanges with the other leaders, by the sparse allgather or
                split-reduce: the whole pipeline of a bucket again, on a channel of the leaders
    3 share     the leader sends the sparse result to the ranks of its node

What is not selected of a node's sum stays in the leader's residual; those of the other ranks are empty afterwards. If
all ranks are on one node nothing is compressed: a dense allreduce, which leaves nothing over.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from sparsecomm import kernels
from sparsecomm.collectives import DenseSum, dense_allreduce, dense_ring_bytes, node_sum
from sparsecomm.compress import Compressor, Selection, SelectionBuffers
from sparsecomm.compress.base import SelectorMemory
from sparsecomm.errors import CollectiveMismatch, RemoteError, WireError
from sparsecomm.exchange.agree import Agreement, agreement_bytes
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.messages import receive_payload, send_payload
from sparsecomm.exchange.method import Strategy, register
from sparsecomm.exchange.methods.allgather import allgather_bytes
from sparsecomm.exchange.methods.split_reduce.method import split_reduce_bytes
from sparsecomm.feedback import BucketMemory, ErrorFeedback, Taken
from sparsecomm.runtime.metrics import BucketReport
from sparsecomm.transport import AgreedError, CollectiveSteps, GroupSum
from sparsecomm.types import Codecs, IndexCodec, Pairs, ValueCodec
from sparsecomm.wire import (
    FLAG_ERROR,
    FLAG_NONFINITE,
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    CollectiveKind,
    Header,
    check_body,
    encode_error,
    read_vector,
    vector_header,
    write_vector,
)
from sparsecomm.wire.pairs import body_bytes

__all__ = ["TwoLevel", "choose_leaders_collective", "two_level_bytes"]


@register
class TwoLevel(Strategy):
    """Sums densely where memory is shared, sparsely between nodes."""

    name = "two_level"
    kind = CollectiveKind.TWO_LEVEL
    layered: ClassVar[bool] = True

    _taken: Taken
    _nodes: dict[int, list[int]]
    _turn: GroupSum | None = None
    _dense: torch.Tensor | None = None
    _pairs: Pairs
    _chosen: torch.Tensor | None = None  # what the node's leader selected
    _shared: object = None

    @classmethod
    def estimate_bytes(
        cls, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> int:
        """See `Strategy.estimate_bytes`: of a leader whose node has no other ranks, since nothing here tells nodes.

        `two_level_bytes` is told them. The other ranks of a node send 4 bytes an element, in shared memory.
        """
        return two_level_bytes(k, numel, range(size), value_codec, index_codec)

    @classmethod
    def rounds(cls, size: int) -> int:
        """See `Strategy.rounds`: also the sum in the node and its result."""
        return 3 * (size - 1).bit_length() + 3 * min(1, size - 1)

    @classmethod
    def estimate(
        cls, costs: Costs, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> Estimate:
        """See `Strategy.estimate`: of a leader. A link that all ranks of a node shared is the leader's alone."""
        others, nodes = costs.beside - 1, costs.nodes
        between = two_level_bytes(k, numel, range(nodes), value_codec, index_codec)
        shared = two_level_bytes(k, numel, [0, *range(nodes)], value_codec, index_codec) - between
        rounds = 2 * (nodes - 1).bit_length() + (size - 1).bit_length()
        link = costs.alpha * rounds + costs.beta * between / costs.beside
        inside = 2 * costs.inner_alpha + costs.inner_beta * others * (4 * numel + shared)
        summing = costs.add * others * numel + 2 * costs.fill * numel
        nonzeros = costs.encode * k + costs.decode * k * (nodes + others)
        compute = 3 * costs.exchange + (costs.select + costs.fill) * numel + summing + nonzeros
        return Estimate(link + inside, compute)

    @property
    def _node(self) -> list[int]:
        """The ranks of this node, ascending; the first leads."""
        return self._nodes[self.job.channel.nodes[self.job.channel.rank]]

    @property
    def _leaders(self) -> list[int]:
        return sorted(ranks[0] for ranks in self._nodes.values())

    @property
    def _masking(self) -> bool:
        """Whether momentum is zeroed where something was selected."""
        return bool(getattr(self.job.plan.feedback, "masking", False))

    def take(self) -> Taken:
        """See `Strategy.take`. What is sent of it is found out from the node's sum."""
        return self.job.take_all()

    def encode(self, taken: Taken) -> None:
        """Makes the header, which is all that goes ahead, and queues up for the inner process group."""
        job, plan, channel = self.job, self.job.plan, self.job.channel
        self._taken = taken
        self._nodes = {}
        for rank, node in enumerate(channel.nodes):
            self._nodes.setdefault(node, []).append(rank)
        self.header = job.header()
        self.header.nnz = plan.k
        self.header.value_codec = plan.value_codec
        options = (channel.nodes, self._masking, plan.inner_group is not None)
        self.header.plan = zlib.crc32(repr(options).encode())
        self.bare_payload()
        if plan.inner_group is not None and len(self._nodes) > 1:
            members = [channel.world_rank(r) for r in self._node]
            self._turn = GroupSum(plan.inner_group, members[0], members, blocking=channel.blocking)

    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        """See `Strategy.communicate`."""
        job, channel, key = self.job, self.job.channel, self.job.bucket.index
        residual = job.bucket.residual
        assert residual is not None, "a sparse exchange needs a residual"
        total = job.arena.get((key, "node sum"), residual.numel(), torch.float32)
        total.copy_(residual)
        if len(self._nodes) == 1:
            yield from dense_allreduce(channel, DenseSum(total), job.arena, key)
            self._dense = total
            return bool(torch.isfinite(total).all())
        if self._turn is None:
            yield from node_sum(channel, total, self._node, job.arena, key)
        else:
            yield [self._turn]
            yield [self._turn.start(total)]
        if channel.rank == self._node[0]:
            return (yield from self._lead(total))
        return (yield from self._follow())

    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """See `Strategy.write_average`. The leaders have divided by their number already."""
        if self._dense is not None:
            out.copy_(self._dense.mul_(scale))
        else:
            kernels.scatter_reduce(out, [self._pairs], scale=scale * len(self._nodes))

    def settle(self) -> None:
        """Remembers what the leaders do, and where momentum is to be zeroed."""
        self.job.bucket.shared = self._shared
        if self._chosen is not None:
            self._taken.indices, self._taken.values = self._chosen, torch.empty(self._chosen.numel())

    def skipped(self) -> None:
        """See `Strategy.skipped`."""
        self.interrupted()

    def interrupted(self) -> None:
        """Lets the next exchange have the inner process group."""
        if self._turn is not None:
            self._turn.leave()

    # --- leaders ------------------------------------------------------------------------------------------------

    def _lead(self, total: torch.Tensor) -> CollectiveSteps[bool]:
        """Selects from the node's sum, exchanges with the other leaders, shares the result or the failure."""
        job, plan, numel = self.job, self.job.plan, total.numel()
        rest = job.arena.get((job.bucket.index, "left"), numel, torch.float32).zero_()
        leaders = self._leaders
        noting = _Noting(plan.compressor)
        inner = BucketMemory(job.bucket.index, job.bucket.layout, rest, job.bucket.memory, shared=job.bucket.shared)
        how = replace(
            plan,
            collective=choose_leaders_collective(plan.k, numel, len(leaders), plan.value_codec, plan.index_codec),
            compressor=noting,
            feedback=ErrorFeedback(),
            grad_scale=1.0,
            held=(),
            clip_norm=None,
            inner_group=None,
        )
        try:
            report = yield from job.exchange(job.channel.among(leaders), inner, total, how, job.arena)
        except AgreedError as error:
            cause = _named(error.cause, leaders)
            yield from self._share_failure(cause)
            raise AgreedError(cause) from error
        except WireError as error:
            if error.rank is not None:
                raise error.at(rank=leaders[error.rank]) from error
            raise
        _add_times(job.report, report)
        self._shared, self._taken.left = inner.shared, rest
        finite = not report.skipped and bool(torch.isfinite(total).all())  # alike on all leaders
        if finite:
            self._pairs = self._nonzeros(total)
            job.report.nnz = report.nnz
            if self._masking:
                self._chosen = noting.chosen
        yield from self._share(finite)
        return finite

    def _nonzeros(self, total: torch.Tensor) -> Pairs:
        """Takes what is not zero out of a dense vector; a full one keeps its zeros, and so needs no positions."""
        numel, arena = total.numel(), self.job.arena
        nnz = int(torch.count_nonzero(total))
        if 32 * nnz + numel > 32 * numel:
            indices = arena.get("shared indices", numel, torch.uint32)
            indices.numpy()[:] = np.arange(numel, dtype=np.uint32)
            return indices, total
        indices = arena.get((self.job.bucket.index, "shared indices"), nnz, torch.uint32, reserve=2 * nnz)
        values = arena.get((self.job.bucket.index, "shared values"), nnz, torch.float32, reserve=2 * nnz)
        kernels.exact_topk(None, total, nnz, indices, values)
        return indices, values

    def _share(self, finite: bool) -> CollectiveSteps[None]:
        """Sends the result to the ranks of the node, with the leader's selection if they need it."""
        followers = self._node[1:]
        if not followers:
            return
        if not finite:
            payloads = [self._written(None, ValueCodec.FP32, "result")]
        else:
            payloads = [self._written(self._pairs, ValueCodec.FP32, "result")]
            if self._chosen is not None:
                # The positions are all that matters; a payload without values there is not.
                blank = torch.zeros(self._chosen.numel())
                payloads.append(self._written((self._chosen, blank), ValueCodec.INT8, "mask"))
        yield [r for f in followers for p in payloads for r in send_payload(self.job.channel, p, f)]

    def _share_failure(self, cause: BaseException) -> CollectiveSteps[None]:
        """Tells the ranks of the node that the leaders have failed."""
        followers = self._node[1:]
        if not followers:
            return
        payload = self.job.arena.get((self.job.bucket.index, "flag"), HEADER_BYTES + MAX_ERROR_BYTES, torch.uint8)
        header = vector_header(self.header)
        text = str(cause) if isinstance(cause, (RemoteError, CollectiveMismatch)) else _failed(self.header, cause)
        encode_error(header, text, payload)
        whole = payload[: HEADER_BYTES + header.body_bytes]
        yield [r for f in followers for r in send_payload(self.job.channel, whole, f)]

    def _written(self, pairs: Pairs | None, codec: ValueCodec, name: str) -> torch.Tensor:
        key = (self.job.bucket.index, name)
        return write_vector(self.header, pairs, Codecs(codec, None), self.job.arena, key).payload

    # --- the others ---------------------------------------------------------------------------------------------

    def _follow(self) -> CollectiveSteps[bool]:
        """Receives the result from the leader."""
        job = self.job
        header, payload = yield from self._receive("result")
        body = payload[HEADER_BYTES:]
        if header.flags & FLAG_ERROR:
            check_body(header, body)
            raise AgreedError(RemoteError(bytes(body.numpy()).decode("utf-8", "replace")))
        if header.flags & FLAG_NONFINITE:
            return False
        key = job.bucket.index
        self._pairs = read_vector(header, payload, job.arena, (key, "result"))
        if self._masking:
            header, payload = yield from self._receive("mask")
            self._chosen, _ = read_vector(header, payload, job.arena, (key, "mask"))
        return True

    def _receive(self, name: str) -> CollectiveSteps[tuple[Header, torch.Tensor]]:
        job = self.job
        return receive_payload(job.channel, self._node[0], self.header, job.arena, (job.bucket.index, name))


class _Noting(Compressor):
    """Another compressor, whose last selection is noted: its positions hold until the bucket's next exchange."""

    def __init__(self, other: Compressor) -> None:
        self._other = other
        self.chosen = torch.empty(0, dtype=torch.uint32)

    def density_at(self, step: int) -> float:
        """See `Compressor.density_at`."""
        return self._other.density_at(step)

    def capacity(self, k: int, numel: int) -> int:
        """See `Compressor.capacity`."""
        return self._other.capacity(k, numel)

    def select(
        self,
        grad: torch.Tensor,
        residual: torch.Tensor,
        k: int,
        memory: SelectorMemory,
        out: SelectionBuffers,
        *,
        scale: float = 1.0,
    ) -> Selection:
        """See `Compressor.select`."""
        selection = self._other.select(grad, residual, k, memory, out, scale=scale)
        self.chosen = out.indices[: selection.nnz]
        return selection


def _failed(header: Header, cause: BaseException) -> str:
    kind = type(cause).__name__
    return f"rank {header.rank} failed in bucket {header.bucket} of step {header.step}: {kind}: {cause}"


def _named(cause: BaseException, leaders: Sequence[int]) -> BaseException:
    """Returns an agreed failure of the leaders with a word on how its message numbers ranks."""
    if isinstance(cause, (RemoteError, CollectiveMismatch)):
        return type(cause)(f"between the leaders of nodes, ranks {list(leaders)}, there numbered from 0: {cause}")
    return cause


def _add_times(whole: BucketReport, part: BucketReport) -> None:
    """Counts the leaders' stages as such, not as waiting, which they are a part of."""
    for name in ("select_seconds", "encode_seconds", "apply_seconds"):
        seconds = getattr(part, name)
        setattr(whole, name, getattr(whole, name) + seconds)
        whole.wait_seconds -= seconds


def two_level_bytes(
    k: int, numel: int, nodes: Sequence[int], value_codec: ValueCodec, index_codec: IndexCodec | None
) -> int:
    """Returns the bytes that the busiest leader of a node is expected to send, of uniform positions.

    Args:
        k: nonzeros that a leader selects.
        numel: elements of the bucket.
        nodes: the node of every rank.
        value_codec: how values are written between leaders.
        index_codec: how indices are written between leaders; None for the smallest.
    """
    sizes = [nodes.count(n) for n in set(nodes)]
    if len(sizes) == 1:
        return agreement_bytes(len(nodes)) + dense_ring_bytes(numel, len(nodes))
    between = min(f(k, numel, len(sizes), value_codec, index_codec) for f in (allgather_bytes, split_reduce_bytes))
    kept = k
    inner = choose_leaders_collective(k, numel, len(sizes), value_codec, index_codec)
    if inner == CollectiveKind.ALLGATHER and k < numel:
        kept = round(numel * -math.expm1(len(sizes) * math.log1p(-k / numel)))
    result = HEADER_BYTES + body_bytes(kept, numel, ValueCodec.FP32, None)
    return agreement_bytes(len(nodes)) + between + (max(sizes) - 1) * result


def choose_leaders_collective(
    k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
) -> CollectiveKind:
    """Returns the sparse collective with the fewest bytes for the leaders of nodes. Arguments as above."""
    gather = allgather_bytes(k, numel, size, value_codec, index_codec)
    split = split_reduce_bytes(k, numel, size, value_codec, index_codec)
    return CollectiveKind.ALLGATHER if gather <= split else CollectiveKind.SPLIT_REDUCE
