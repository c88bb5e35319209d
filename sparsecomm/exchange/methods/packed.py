"""Exchanges whose positions every rank knows: what is there is packed, summed densely, and unpacked."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch

from sparsecomm.collectives import DenseSum, dense_allreduce, dense_seconds
from sparsecomm.compress import Places
from sparsecomm.exchange.agree import Agreement
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import Strategy, dense_wire
from sparsecomm.feedback import Taken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import IndexCodec, ValueCodec

__all__ = ["Packed"]


class Packed(Strategy, abc.ABC):
    """What these strategies share; they differ in `take` and `find`.

        1 accumulate   the gradient is added to the residual, which stays whole until the end
        2 find         all ranks find out the same places
        3 sum          what is there is packed and summed densely; who rounds, notes what that drops
        4 apply        the average is unpacked, everything else is zero; at the places the residual becomes what this
                       rank's rounding has dropped

    So a failure at any point before the last has changed nothing but what step 1 added.
    """

    special: ClassVar[bool] = True

    _taken: Taken
    _places: Places
    _packed: torch.Tensor

    @classmethod
    def estimate(
        cls, costs: Costs, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> Estimate:
        """See `Strategy.estimate`: one pass to accumulate, one to write; a dense sum of k, and finding the places."""
        wire = dense_wire(value_codec)
        link = dense_seconds(k, size, wire, alpha=costs.alpha, beta=costs.beta, add=costs.add)
        finding = costs.alpha * 3 * (size - 1).bit_length()
        compute = costs.exchange + (costs.add + 2 * costs.fill) * numel + 4 * costs.fill * k
        return Estimate(link + finding, compute)

    @abc.abstractmethod
    def tag(self) -> int:
        """Returns what must be the same on all ranks for them to find the same places, as the header's `plan`."""

    @abc.abstractmethod
    def find(self) -> CollectiveSteps[Places]:
        """Finds the places, the same on all ranks. Collective."""

    def encode(self, taken: Taken) -> None:
        """Makes the header, which is all that goes ahead."""
        self._taken = taken
        self.header = self.job.header()
        self.header.value_codec = dense_wire(self.job.plan.value_codec)
        self.header.nnz = self.job.plan.k
        self.header.plan = self.tag()
        self.bare_payload()

    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        """See `Strategy.communicate`."""
        job, key, wire = self.job, self.job.bucket.index, self.header.value_codec
        residual = job.bucket.residual
        assert residual is not None, "a sparse exchange needs a residual"
        places = self._places = yield from self.find()
        packed = self._packed = job.arena.get((key, "packed"), places.count, torch.float32, reserve=job.plan.k)
        places.gather(residual, packed)
        left = None
        if wire != ValueCodec.FP32:
            left = job.arena.get((key, "left"), places.count, torch.float32, reserve=job.plan.k)
        scale = job.plan.grad_scale / job.channel.size
        yield from dense_allreduce(job.channel, DenseSum(packed, wire, scale, left), job.arena, key)
        job.report.nnz = places.count
        self._taken.places, self._taken.left = places, left
        return bool(torch.isfinite(packed).all())

    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """See `Strategy.write_average`. The owners have scaled already, before they rounded."""
        out.zero_()
        self._places.put(self._packed, out)
