"""Split-reduce: sums all selections and keeps about k of the sums ("split_reduce") or all of them ("ssar")."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from typing_extensions import override

from sparsecomm import kernels
from sparsecomm.exchange.agree import Agreement, agreement_bytes
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import Method, register
from sparsecomm.exchange.methods.split_reduce.regions import LIFETIME, Regions, samples_of
from sparsecomm.exchange.methods.split_reduce.split import Split
from sparsecomm.exchange.methods.split_reduce.steps import ANNOUNCEMENT_BYTES, Reduced, split_reduce
from sparsecomm.feedback import SelectedTaken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import Codecs, Sizes, ValueCodec
from sparsecomm.wire import PART_HEADER_BYTES, body_bytes

__all__ = ["SplitReduce", "Ssar"]


@register
class SplitReduce(Method):
    """Ok-Topk's allreduce, whose bytes do not grow with the number of ranks.

    The owner of a region adds the sums that it drops, and the rounding of the kept sums, to its residual.

    Attributes:
        keep_all: whether all sums are kept, not about k of them.
    """

    name = "split_reduce"
    number = 3
    has_body = False
    must_match: ClassVar = {"nnz": "k"}
    keep_all: ClassVar[bool] = False

    _taken: SelectedTaken
    _split: Split
    _regions: Regions | None = None
    _reduced: Reduced | None = None

    @classmethod
    @override
    def bytes_sent(cls, sizes: Sizes) -> int:
        """Spreads the cost of making regions over their lifetime. With `keep_all`, assumes independent selections."""
        k, n, ranks, codecs = sizes.k, sizes.numel, sizes.ranks, Codecs(sizes.values, sizes.indices)
        region = -(-n // ranks)
        sent = kept = min(region, round(k / ranks))
        if cls.keep_all and k < n:
            kept = round(region * -math.expm1(ranks * math.log1p(-k / n)))
        parts = sum(PART_HEADER_BYTES + body_bytes(count, region, codecs) for count in (sent, kept))
        samples = (1 if cls.keep_all else 2) * 4 * (samples_of(ranks) + 4) // LIFETIME
        return agreement_bytes(ranks) + (ranks - 1) * (parts + ANNOUNCEMENT_BYTES + samples)

    @classmethod
    @override
    def rounds(cls, ranks: int) -> int:
        """Counts the agreement, the headers and bodies of parts, the announcements and the final gather."""
        return 3 * (ranks - 1).bit_length() + 2 * min(1, ranks - 1)

    @classmethod
    @override
    def seconds(cls, sizes: Sizes, costs: Costs) -> Estimate:
        """A rank encodes its selection and its kept sums; it decodes the parts of its region and all kept sums."""
        k, ranks = sizes.k, sizes.ranks
        kept = min(sizes.numel, k * ranks) if cls.keep_all else k
        nonzeros = costs.encode * (k + kept / ranks) + costs.decode * (k + kept)
        compute = 2 * costs.exchange + (costs.select + costs.fill) * sizes.numel + nonzeros
        return Estimate(costs.alpha * cls.rounds(ranks) + costs.beta * cls.bytes_sent(sizes), compute)

    @override
    def take(self) -> SelectedTaken:
        self._taken = self.exchange.take_some()
        return self._taken

    @override
    def encode(self) -> None:
        """Writes the header. If the regions of the last step fit, also encodes a part for each owner."""
        exchange, plan, taken = self.exchange, self.exchange.plan, self._taken
        numel = exchange.grad.numel()
        self._split = Split(
            channel=exchange.channel,
            arena=exchange.arena,
            bucket=exchange.memory.index,
            step=plan.step,
            numel=numel,
            pairs=(taken.indices, taken.values),
            capacity=taken.capacity,
            k=plan.k,
            codecs=plan.codecs,
            keep_all=self.keep_all,
        )
        known = exchange.memory.shared
        if isinstance(known, Regions) and known.fit(exchange.channel.size, numel, plan.k, plan.step):
            self._regions = known
            self._split.encode(known)
        self.header = exchange.header()
        self.header.nnz = plan.k
        self.header.tag = 0 if self._regions is None else self._regions.tag
        self.make_bare_payload()

    @override
    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        if not agreement.same_tag:
            self._regions = self._split.regions = None
        self._reduced = yield from split_reduce(self._split)
        return self._reduced is not None

    @override
    def write_average(self, out: torch.Tensor, scale: float) -> None:
        assert self._reduced is not None, "nothing was reduced"
        kernels.scatter_reduce(out, [self._reduced.pairs], scale=scale)

    @override
    def finish(self) -> None:
        """Adds this rank's rounding as a sender, and its dropped sums and rounding as an owner, to the residual."""
        split, reduced, residual = self._split, self._reduced, self.exchange.memory.residual
        assert reduced is not None, "nothing was reduced"
        assert residual is not None, "a sparse exchange needs a residual"
        region = residual[reduced.start : reduced.start + reduced.span]
        if split.wanted is not None:
            kernels.scatter_add(region, *reduced.dropped)
        if split.codecs.values != ValueCodec.FP32:
            kernels.scatter_add(residual, split.pairs[0], split.error)
            kernels.scatter_add(region, reduced.indices, reduced.error)
        self.exchange.memory.shared = reduced.regions

    @override
    def give_up(self, *, together: bool) -> None:
        """If all ranks skip the step, keeps its regions for the next step, with the threshold from before."""
        if together:
            known = self._regions
            self.exchange.memory.shared = None if known is None else replace(known, used=self.exchange.plan.step)


@register
class Ssar(SplitReduce):
    """SparCML's static sparse allreduce: keeps all sums, and gathers a region densely where that is smaller.

    Without rounding, the result equals that of the allgather bit for bit, since every owner adds in rank order.
    """

    name = "ssar"
    number = 4
    keep_all = True
