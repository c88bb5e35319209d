"""Native: the allreduce of torch.distributed itself (Gloo, NCCL), as in plain DDP.

`sparsecomm.ddp` starts it straight from the hook, without this package's engine, headers or messages, once all ranks
know that nothing waits in the bucket on any of them. What is here is the exchange before that, a dense sum in float32.
It sends what waits, and its headers tell all ranks whether something still waits on some rank afterwards.
"""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import override

from sparsecomm.collectives import dense_seconds
from sparsecomm.errors import WireError
from sparsecomm.exchange.agree import Agreement
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import register
from sparsecomm.exchange.methods.dense import Dense
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import Sizes, ValueCodec
from sparsecomm.wire import Header, HeaderRules, check_bare

__all__ = ["Native"]


def _check(h: Header) -> None:
    """Checks a header of this method."""
    check_bare(h)
    if h.tag > 1:
        raise WireError("tag", h.tag, "NATIVE has only 0 and 1")


@register
class Native(Dense):
    """Sums what waits on all ranks, so that the process group can sum the gradients from the next step on."""

    name = "native"
    number = 14

    @classmethod
    @override
    def bytes_sent(cls, sizes: Sizes) -> int:
        return super().bytes_sent(replace(sizes, values=ValueCodec.FP32))

    @classmethod
    @override
    def seconds(cls, sizes: Sizes, costs: Costs) -> Estimate:
        """The process group is taken to be as fast as `dense_allreduce`, but needs no agreement and one more pass."""
        n = sizes.numel
        link = dense_seconds(n, sizes.ranks, ValueCodec.FP32, alpha=costs.alpha, beta=costs.beta, add=costs.add)
        return Estimate(link, costs.fill * n)

    @classmethod
    @override
    def header_rules(cls) -> HeaderRules:
        """The tag of a header is 1 if nothing waits on its rank after this exchange, else 0."""
        return HeaderRules(cls.number, cls.name.upper(), _check, True, cls.must_match, cls.show)

    @property
    @override
    def wire(self) -> ValueCodec:
        return ValueCodec.FP32

    @override
    def encode(self) -> None:
        self.header = self.exchange.header()
        self.header.tag = int(self._taken.leaves_nothing)
        self.make_bare_payload()

    @override
    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        self._taken.clears_all = agreement.same_tag
        return (yield from super().communicate(agreement))
