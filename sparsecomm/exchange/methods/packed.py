"""Base of the methods in which all ranks know the same positions: values are packed, summed densely and unpacked.

No positions travel with the values, there is no fill-in, and nothing is decoded. The residual stays whole until the
step is final, so a step can be undone without knowing the sent values.
"""

from __future__ import annotations

import abc

import torch
from typing_extensions import override

from sparsecomm.collectives import DenseSum, dense_allreduce, dense_seconds
from sparsecomm.compress import Places
from sparsecomm.exchange.agree import Agreement
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import Method, Scope
from sparsecomm.exchange.plan import codec_for_sums
from sparsecomm.feedback import PlacesTaken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import Sizes, ValueCodec

__all__ = ["Packed"]


class Packed(Method, abc.ABC):
    """The steps that these methods share. Subclasses define `take`, `tag` and `find`.

        1 accumulate   add the gradient to the residual, which stays whole until the end
        2 find         find the places, the same on all ranks
        3 sum          pack the values at the places and sum them densely; the rank that rounds keeps the rounding
        4 apply        unpack the average and zero everything else; at the places the residual becomes the rounding

    A failure before step 4 is undone by subtracting the gradient from the residual.
    """

    has_body = False
    scope = Scope.OWN

    _taken: PlacesTaken
    _places: Places
    _packed: torch.Tensor

    @classmethod
    @override
    def seconds(cls, sizes: Sizes, costs: Costs) -> Estimate:
        """One pass accumulates, one writes, and k elements are summed densely. Finding places takes further rounds."""
        link = dense_seconds(
            sizes.k, sizes.ranks, codec_for_sums(sizes.values), alpha=costs.alpha, beta=costs.beta, add=costs.add
        )
        finding = costs.alpha * 3 * (sizes.ranks - 1).bit_length()
        compute = costs.exchange + (costs.add + 2 * costs.fill) * sizes.numel + 4 * costs.fill * sizes.k
        return Estimate(link + finding, compute)

    @abc.abstractmethod
    def tag(self) -> int:
        """Returns the tag of the header: a number on which the places depend, so ranks must share it."""

    @abc.abstractmethod
    def find(self) -> CollectiveSteps[Places]:
        """Finds the places, the same on all ranks. Collective."""

    @override
    def encode(self) -> None:
        self.header = self.exchange.header()
        self.header.value_codec = codec_for_sums(self.exchange.plan.value_codec)
        self.header.nnz = self.exchange.plan.k
        self.header.tag = self.tag()
        self.make_bare_payload()

    @override
    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        exchange, key, wire = self.exchange, self.exchange.memory.index, self.header.value_codec
        residual, arena, k = exchange.memory.residual, exchange.arena, exchange.plan.k
        assert residual is not None, "a sparse exchange needs a residual"
        places = self._places = yield from self.find()
        packed = self._packed = arena.get((key, "packed"), places.count, torch.float32, reserve=k)
        places.gather(residual, packed)
        rounding = None
        if wire != ValueCodec.FP32:
            rounding = arena.get((key, "rest"), places.count, torch.float32, reserve=k)
        scale = exchange.plan.grad_scale / exchange.channel.size
        yield from dense_allreduce(exchange.channel, DenseSum(packed, wire, scale, rounding), arena, key)
        exchange.report.nnz = places.count
        self._taken.places, self._taken.rounding = places, rounding
        return bool(torch.isfinite(packed).all())

    @override
    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """Ignores `scale`: the owners scaled the sum before they rounded it."""
        out.zero_()
        self._places.put(self._packed, out)
