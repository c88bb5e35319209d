"""Global top-k along a tree: of the sum of all selections the k largest, found by merging pairs. For comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from sparsecomm import kernels
from sparsecomm.exchange.agree import Agreement, agreement_bytes
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.messages import receive_payload, send_payload
from sparsecomm.exchange.method import Strategy, register
from sparsecomm.feedback import Taken
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps
from sparsecomm.types import Codecs, IndexCodec, Pairs, ValueCodec
from sparsecomm.wire import FLAG_NONFINITE, HEADER_BYTES, CollectiveKind, Header
from sparsecomm.wire.pairs import body_bytes
from sparsecomm.wire.vector import Vector, read_vector, write_vector

__all__ = ["GlobalTopK", "Tree", "tree_bytes"]


@register
class GlobalTopK(Strategy):
    """gTop-k (Shi et al. 2019). What a merge drops goes to the residual of the rank that merges, for all ranks."""

    name = "tree"
    kind = CollectiveKind.TREE
    competes: ClassVar[bool] = False  # split-reduce keeps about the same and moves less

    _tree: Tree
    _own: Pairs
    _pairs: Pairs | None = None

    @classmethod
    def estimate_bytes(
        cls, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> int:
        """See `Strategy.estimate_bytes`: of rank 0, which sends most."""
        return tree_bytes(k, numel, size, value_codec, index_codec)

    @classmethod
    def rounds(cls, size: int) -> int:
        """See `Strategy.rounds`: agreement; up and down the tree, header and body in each round."""
        return 5 * (size - 1).bit_length()

    @classmethod
    def estimate(
        cls, costs: Costs, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> Estimate:
        """See `Strategy.estimate`: one round after the other moves, decodes and merges k nonzeros."""
        sent = cls.estimate_bytes(k, numel, size, value_codec, index_codec)
        rounds = (size - 1).bit_length()
        nonzeros = (costs.encode + costs.decode) * k * (rounds + 1)
        compute = costs.exchange + (costs.select + costs.fill) * numel + nonzeros
        return Estimate(costs.alpha * cls.rounds(size) + 2 * costs.beta * sent, compute)

    def take(self) -> Taken:
        """See `Strategy.take`."""
        return self.job.take_some()

    def encode(self, taken: Taken) -> None:
        """Makes the header, which is all that goes ahead."""
        job, plan = self.job, self.job.plan
        self._own = (taken.indices, taken.values)
        self.header = job.header()
        self.header.nnz = plan.k
        codecs = Codecs(plan.value_codec, plan.index_codec)
        self._tree = Tree(job.channel, job.arena, job.bucket.index, plan.k, self.header, codecs)
        self.bare_payload()

    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        """See `Strategy.communicate`."""
        self._pairs = yield from self._tree.reduce(self._own)
        return self._pairs is not None

    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """See `Strategy.write_average`."""
        assert self._pairs is not None, "nothing was reduced"
        kernels.scatter_reduce(out, [self._pairs], scale=scale)

    def settle(self) -> None:
        """Gives the residual what this rank dropped of sums, and rounded off what it sent."""
        residual = self.job.bucket.residual
        assert residual is not None, "a sparse exchange needs a residual"
        for indices, values in self._tree.dropped:
            kernels.scatter_add(residual, indices, values)


@dataclass(slots=True)
class Tree:
    """One rank's part in a global top-k.

    Attributes:
        channel: the ranks.
        arena: gives the buffers.
        bucket: bucket number, names them.
        k: how many nonzeros to keep, the same on all ranks.
        header: of this rank's exchange.
        codecs: how to write what this rank sends.
        dropped: pairs that this rank has to keep for all: sums that were not among the k largest, and what rounding
            dropped. In buffers that hold until the bucket's next exchange.
    """

    channel: Channel
    arena: Arena
    bucket: int
    k: int
    header: Header
    codecs: Codecs
    dropped: list[Pairs] = field(default_factory=list)

    def reduce(self, mine: Pairs) -> CollectiveSteps[Pairs | None]:
        """Sums the selections of all ranks, keeping k of the sums at most. Collective.

        Args:
            mine: what this rank has selected. Must stay until the next exchange.

        Returns:
            The same bits on all ranks; None if a sum was not finite. They hold until the bucket's next exchange.

        Raises:
            WireError: if what came here is damaged; names its author and the bucket.
        """
        channel, arena, rank, size = self.channel, self.arena, self.channel.rank, self.channel.size
        have: Pairs | None = mine
        bit = 1
        while bit < size and not rank & bit:
            if rank + bit < size:
                key = (self.bucket, "up", bit)
                header, payload = yield from receive_payload(channel, rank + bit, self.header, arena, key)
                theirs = None if header.flags & FLAG_NONFINITE else read_vector(header, payload, arena, key)
                have = None if have is None or theirs is None else self._merge(have, theirs, bit)
            bit *= 2
        vector = self._write(have)
        header, payload = vector.header, vector.payload
        if rank:
            yield send_payload(channel, payload, rank - bit)
            key = (self.bucket, "down", 0)
            header, payload = yield from receive_payload(channel, rank - bit, self.header, arena, key, author=0)
        below = [rank + (bit >> i) for i in range(1, bit.bit_length()) if rank + (bit >> i) < size]
        if below:
            yield [r for dest in below for r in send_payload(channel, payload, dest)]
        if header.flags & FLAG_NONFINITE:
            return None
        return read_vector(header, payload, arena, (self.bucket, "tree result"))

    def _write(self, pairs: Pairs | None) -> Vector:
        """Writes what this rank has, and notes what that rounds off."""
        vector = write_vector(self.header, pairs, self.codecs, self.arena, (self.bucket, "tree"))
        if pairs is not None and self.codecs.values != ValueCodec.FP32:
            self.dropped.append((pairs[0], vector.error))
        return vector

    def _merge(self, ours: Pairs, theirs: Pairs, bit: int) -> Pairs | None:
        """Adds two sparse vectors up and keeps the k largest sums; None if one is not finite. Mutates dropped."""
        indices = np.concatenate([ours[0].numpy(), theirs[0].numpy()])
        values = np.concatenate([ours[1].numpy(), theirs[1].numpy()])
        order = np.argsort(indices, kind="stable")  # both are ascending, which this makes use of
        indices, values = indices[order], values[order]
        first = np.flatnonzero(np.diff(indices, prepend=indices[:1] + np.uint32(1)))
        with np.errstate(over="ignore"):  # noticed below
            sums = torch.from_numpy(np.add.reduceat(values, first) if len(first) else values)
        places = torch.from_numpy(indices[first])
        room = min(self.k, sums.numel())
        where = self.arena.get((self.bucket, "kept places"), room, torch.uint32, reserve=self.k)
        kept = self.arena.get((self.bucket, "kept values", bit), room, torch.float32, reserve=self.k)
        result = kernels.exact_topk(None, sums, room, where, kept)
        if result.nonfinite:
            return None
        self.dropped.append((places, sums))  # zero where a sum was kept
        at = torch.from_numpy(where[: result.stored].numpy().astype(np.int64))
        return places[at], kept[: result.stored]


def tree_bytes(k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None) -> int:
    """Returns the bytes that the busiest rank of a tree is expected to send: the root, which starts the broadcast."""
    payload = HEADER_BYTES + body_bytes(k, numel, value_codec, index_codec)
    return agreement_bytes(size) + (size - 1).bit_length() * payload
