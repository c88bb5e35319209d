"""Global top-k along a tree: of the sum of all selections the k largest, found by merging pairs. For comparison."""

from __future__ import annotations

from typing import ClassVar

import torch

from sparsecomm.collectives import Agreement, Codecs, Pairs, Tree, tree_bytes
from sparsecomm.compress import Taken
from sparsecomm.kernels import dispatch as kernels
from sparsecomm.strategies.base import Strategy, register
from sparsecomm.strategies.costs import Costs, Estimate
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import CollectiveKind

__all__ = ["GlobalTopK"]


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
