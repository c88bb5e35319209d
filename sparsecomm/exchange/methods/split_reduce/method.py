"""Split-reduce: the sum of all selections, of which about k are kept ("split_reduce") or all ("ssar")."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch

from sparsecomm import kernels
from sparsecomm.exchange.agree import Agreement, agreement_bytes
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import Strategy, register
from sparsecomm.exchange.methods.split_reduce.regions import LIFETIME, Regions, samples_of
from sparsecomm.exchange.methods.split_reduce.split import Split
from sparsecomm.exchange.methods.split_reduce.steps import ANNOUNCEMENT_BYTES, Reduced, split_reduce
from sparsecomm.feedback import Taken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import Codecs, IndexCodec, ValueCodec
from sparsecomm.wire import PART_HEADER_BYTES, CollectiveKind
from sparsecomm.wire.pairs import body_bytes

__all__ = ["SplitReduce", "Ssar", "split_reduce_bytes"]


@register
class SplitReduce(Strategy):
    """Ok-Topk's allreduce: its cost does not grow with the number of ranks.

    What an owner drops of the sums, and what rounding drops of them, goes to the owner's residual, for all ranks.
    """

    name = "split_reduce"
    kind = CollectiveKind.SPLIT_REDUCE
    keep_all: ClassVar[bool] = False

    _split: Split
    _regions: Regions | None = None
    _reduced: Reduced | None = None

    @classmethod
    def estimate_bytes(
        cls, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> int:
        """See `Strategy.estimate_bytes`."""
        return split_reduce_bytes(k, numel, size, value_codec, index_codec, keep_all=cls.keep_all)

    @classmethod
    def rounds(cls, size: int) -> int:
        """See `Strategy.rounds`: agreement, parts and their headers, announcements, the last leg."""
        return 3 * (size - 1).bit_length() + 2 * min(1, size - 1)

    @classmethod
    def estimate(
        cls, costs: Costs, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> Estimate:
        """See `Strategy.estimate`: a rank encodes its own nonzeros, decodes about k that it owns and those kept."""
        sent = cls.estimate_bytes(k, numel, size, value_codec, index_codec)
        kept = min(numel, k * size) if cls.keep_all else k
        nonzeros = costs.encode * (k + kept / size) + costs.decode * (k + kept)
        compute = 2 * costs.exchange + (costs.select + costs.fill) * numel + nonzeros
        return Estimate(costs.alpha * cls.rounds(size) + costs.beta * sent, compute)

    def take(self) -> Taken:
        """See `Strategy.take`."""
        return self.job.take_some()

    def encode(self, taken: Taken) -> None:
        """Makes the header and, if there are regions from the last step, every owner's part."""
        job, plan, numel = self.job, self.job.plan, self.job.grad.numel()
        self._split = Split(
            channel=job.channel,
            arena=job.arena,
            bucket=job.bucket.index,
            step=plan.step,
            numel=numel,
            pairs=(taken.indices, taken.values),
            capacity=taken.capacity,
            k=plan.k,
            codecs=Codecs(plan.value_codec, plan.index_codec),
            keep_all=self.keep_all,
        )
        known = job.bucket.shared
        if isinstance(known, Regions) and known.fit(job.channel.size, numel, plan.k, plan.step):
            self._regions = known
            self._split.encode(known)
        self.header = job.header()
        self.header.nnz = plan.k
        self.header.plan = 0 if self._regions is None else self._regions.tag
        self.bare_payload()

    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        """See `Strategy.communicate`."""
        if not agreement.same_plan:
            self._regions = self._split.regions = None
        self._reduced = yield from split_reduce(self._split)
        return self._reduced is not None

    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """See `Strategy.write_average`."""
        assert self._reduced is not None, "nothing was reduced"
        kernels.scatter_reduce(out, [self._reduced.pairs], scale=scale)

    def settle(self) -> None:
        """Gives the residual what this rank's rounding lost as a sender, and what it dropped and lost as an owner."""
        split, reduced, residual = self._split, self._reduced, self.job.bucket.residual
        assert reduced is not None, "nothing was reduced"
        assert residual is not None, "a sparse exchange needs a residual"
        region = residual[reduced.start : reduced.start + reduced.span]
        if split.wanted is not None:
            kernels.scatter_add(region, *reduced.dropped)
        if split.codecs.values != ValueCodec.FP32:
            kernels.scatter_add(residual, split.pairs[0], split.error)
            kernels.scatter_add(region, reduced.indices, reduced.error)
        self.job.bucket.shared = reduced.regions

    def skipped(self) -> None:
        """The regions stay good for the next step; a threshold that was on its way is forgotten."""
        known = self._regions
        self.job.bucket.shared = None if known is None else replace(known, used=self.job.plan.step)


@register
class Ssar(SplitReduce):
    """SparCML's static sparse allreduce: whatever is reduced is kept, its last leg dense where that is smaller."""

    name = "ssar"
    kind = CollectiveKind.SSAR
    keep_all = True


def split_reduce_bytes(
    k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None, *, keep_all: bool = False
) -> int:
    """Returns the bytes one rank is expected to send in a split-reduce of uniform positions.

    Making regions is spread over the steps that they serve.

    Args:
        k: nonzeros a rank expects to send.
        numel: elements of the bucket.
        size: number of ranks.
        value_codec: how values are written.
        index_codec: how indices are written; None for the smallest.
        keep_all: whether all sums are kept, of selections that are independent of each other.
    """
    region = -(-numel // size)
    sent = min(region, round(k / size))
    kept = round(region * -math.expm1(size * math.log1p(-k / numel))) if keep_all and k < numel else sent
    parts = sum(PART_HEADER_BYTES + body_bytes(n, region, value_codec, index_codec) for n in (sent, kept))
    samples = (1 if keep_all else 2) * 4 * (samples_of(size) + 4) // LIFETIME
    return agreement_bytes(size) + (size - 1) * (parts + ANNOUNCEMENT_BYTES + samples)
