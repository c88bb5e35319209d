"""Dense: a dense sum of the residual plus the gradient. The rounding of 16-bit codecs goes back to the residual.

Cost: `collectives.dense_allreduce` of n elements, and the agreement.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from typing_extensions import override

from sparsecomm.collectives import DenseSum, dense_allreduce, dense_ring_bytes, dense_seconds
from sparsecomm.exchange.agree import Agreement, agreement_bytes
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import Method, register
from sparsecomm.exchange.plan import codec_for_sums
from sparsecomm.feedback import GradientTaken, WholeTaken
from sparsecomm.runtime.device import side_of
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import Sizes, ValueCodec
from sparsecomm.wire import HeaderRules, check_empty

__all__ = ["Dense"]


@register
class Dense(Method):
    """Sums the residuals, or the gradients of a bucket whose residual is missing or zero."""

    name = "dense"
    number = 2
    has_body = False
    must_match: ClassVar = {"value_codec": "value_codec"}
    needs_residual = False
    compresses = False
    on_device = True

    _work: torch.Tensor | None = None
    _taken: WholeTaken | GradientTaken

    @classmethod
    @override
    def bytes_sent(cls, sizes: Sizes) -> int:
        values = dense_ring_bytes(sizes.numel, sizes.ranks, codec_for_sums(sizes.values))
        return values + agreement_bytes(sizes.ranks)

    @classmethod
    @override
    def seconds(cls, sizes: Sizes, costs: Costs) -> Estimate:
        """In float32 the gradient is summed in place; in 16 bits the residual is updated as well."""
        wire, n = codec_for_sums(sizes.values), sizes.numel
        link = dense_seconds(n, sizes.ranks, wire, alpha=costs.alpha, beta=costs.beta, add=costs.add)
        agreement = costs.alpha * (sizes.ranks - 1).bit_length()
        around = 0.0 if wire == ValueCodec.FP32 else costs.add + 2 * costs.fill
        return Estimate(link + agreement, costs.exchange + around * n)

    @classmethod
    @override
    def header_rules(cls) -> HeaderRules:
        """Headers have neither k nor a tag."""
        return HeaderRules(cls.number, cls.name.upper(), check_empty, must_match=cls.must_match, show=cls.show)

    @property
    def wire(self) -> ValueCodec:
        """Codec of the values on the wire."""
        return codec_for_sums(self.exchange.plan.value_codec)

    @override
    def take(self) -> WholeTaken | GradientTaken:
        self._taken = self.exchange.take_all(exact=self.wire == ValueCodec.FP32)
        return self._taken

    @override
    def encode(self) -> None:
        self.header = self.exchange.header()
        self.header.value_codec = self.wire
        self.make_bare_payload()

    @override
    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        exchange, grad, key = self.exchange, self.exchange.grad, self.exchange.memory.index
        taken = self._taken
        residual = exchange.memory.residual if isinstance(taken, WholeTaken) else None
        work, wire, error = grad, self.header.value_codec, None
        if residual is not None or grad.dtype != torch.float32 or not grad.is_cpu:
            # A copy is summed, so that the gradient is intact if the exchange fails. All of it is copied to the host,
            # since all of it is sent.
            work = exchange.arena.get((key, "work"), grad.numel(), torch.float32)
            side_of(grad.device).fetch(grad if residual is None else residual, work)
        if isinstance(taken, WholeTaken) and residual is not None and wire != ValueCodec.FP32:
            error = taken.rest = exchange.arena.get((key, "rest"), grad.numel(), torch.float32)
        self._work = work
        # Some ranks may sum a residual and others a gradient, since each knows only its own residual. So all sum in the
        # units of gradients, and all judge the sum in the same way.
        units = exchange.plan.grad_scale if residual is not None else 1.0
        if units != 1.0:
            work.mul_(units)
        dense = DenseSum(work, wire, 1.0 / exchange.channel.size, error)
        yield from dense_allreduce(exchange.channel, dense, exchange.arena, key)
        if error is not None and units != 1.0:
            error.div_(units)
        # NaN and infinity matter only if the step is not final, since other buckets are then undone with this one.
        return exchange.plan.final or _is_finite(work)

    @override
    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """Ignores `scale`: the owners scaled the sum before they rounded it."""
        assert self._work is not None, "nothing was summed"
        if self._work is not out:
            out.copy_(self._work, non_blocking=True)

    @override
    def give_up(self, *, together: bool) -> None:
        """Fills a gradient that holds a partial sum with NaN, so that nobody mistakes it for a gradient."""
        if not together and self._work is self.exchange.grad:
            self.exchange.grad.fill_(math.nan)


def _is_finite(vector: torch.Tensor) -> bool:
    return not vector.numel() or bool(torch.stack(torch.aminmax(vector)).isfinite().all())
