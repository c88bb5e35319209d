"""PowerSGD: each matrix as two thin factors, which dense sums can add up (Vogels et al. 2019). For comparison.

    1 accumulate   the gradient is added to the residual, which stays whole until the end: M
    2 project      P = M Q, with the orthonormal Q that the last step's factor gives, summed over ranks
    3 approximate  P made orthonormal, Q = M^T P, summed over ranks together with what travels as it is
    4 apply        the average is P Q^T / ranks; M - P Q^T with this rank's own Q stays in the residual

All ranks make P orthonormal from the same sum, by operations that give the same bits on any machine. The two sums are
steps of one generator, so that any number of buckets may be in flight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from sparsecomm import kernels
from sparsecomm.collectives import DenseSum, dense_allreduce, dense_allreduce_bytes
from sparsecomm.compress import Compressor, PowerSGD
from sparsecomm.exchange.agree import Agreement, agreement_bytes
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import Strategy, dense_wire, register
from sparsecomm.exchange.methods.powersgd.factors import Matrix, matrices_of, orthonormal, random_factor
from sparsecomm.feedback import Taken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import CollectiveKind

__all__ = ["Factors", "LowRank"]


@dataclass(slots=True)
class Factors:
    """What a bucket remembers: where the next step's iteration starts.

    Attributes:
        rank: of the approximation.
        right: float32, the sums of all matrices' right factors, one after the other, each of shape (rank, columns).
        tag: of these bits; not 0.
    """

    rank: int
    right: torch.Tensor
    tag: int


@register
class LowRank(Strategy):
    """Sums low-rank factors densely, in 32 or 16 bits; what 16 bits round off goes back to the residual."""

    name = "powersgd"
    kind = CollectiveKind.POWERSGD
    special: ClassVar[bool] = True

    _taken: Taken
    _rank: int
    _matrices: list[Matrix]
    _rest: list[tuple[int, int]]
    _left_factor: torch.Tensor
    _second: torch.Tensor  # the right factors, and all else

    @classmethod
    def estimate_bytes(
        cls, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> int:
        """See `Strategy.estimate_bytes`: of k values, half in each sum. Shapes say how many there really are."""
        wire = dense_wire(value_codec)
        return agreement_bytes(size) + sum(dense_allreduce_bytes(n, size, wire) for n in (k // 2, k - k // 2))

    @classmethod
    def compressor_at(cls, density: float) -> Compressor:
        """See `Strategy.compressor_at`. The density follows from the shapes."""
        return PowerSGD()

    @classmethod
    def rounds(cls, size: int) -> int:
        """See `Strategy.rounds`: agreement and two short sums."""
        return 5 * (size - 1).bit_length()

    @classmethod
    def estimate(
        cls, costs: Costs, k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
    ) -> Estimate:
        """See `Strategy.estimate`: the matrix is read for each factor, for what is left, and written once."""
        sent = cls.estimate_bytes(k, numel, size, value_codec, index_codec)
        compute = 3 * costs.exchange + (4 * costs.add + 2 * costs.fill) * numel
        return Estimate(costs.alpha * cls.rounds(size) + costs.beta * sent, compute)

    def take(self) -> Taken:
        """See `Strategy.take`."""
        return self.job.take_all()

    def encode(self, taken: Taken) -> None:
        """Makes the header, which is all that goes ahead."""
        job, compressor = self.job, self.job.plan.compressor
        # Others may be benched over this collective: it has to know no more than a rank.
        self._rank = compressor.rank if isinstance(compressor, PowerSGD) else 1
        self._taken = taken
        self._matrices, self._rest = matrices_of(job.bucket.layout, self._rank)
        self.header = job.header()
        self.header.nnz = min(self._rank, job.grad.numel())
        self.header.value_codec = dense_wire(job.plan.value_codec)
        known = self._known()
        self.header.plan = 0 if known is None else known.tag
        self.bare_payload()

    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        """See `Strategy.communicate`."""
        job, key, wire = self.job, self.job.bucket.index, self.header.value_codec
        residual = job.bucket.residual
        assert residual is not None, "PowerSGD needs a residual"
        known = self._known() if agreement.same_plan else None
        rank, matrices = self._rank, self._matrices
        first = self._buffer("left factors", sum(rank * m.rows for m in matrices))
        rights = sum(rank * m.cols for m in matrices)
        second = self._second = self._buffer("right factors", rights + sum(end - start for start, end in self._rest))
        mine = self._buffer("own right factors", rights)
        right = second[:rights]
        if known is not None:
            right.copy_(known.right)
        for m, p, q in self._factors(first, right):
            start = partial(random_factor, m.name, rank, m.cols)
            if known is None:
                q.copy_(start())
            orthonormal(q, start)
            torch.mm(q, m.of(residual).t(), out=p)
        if matrices:
            yield from dense_allreduce(job.channel, DenseSum(first, wire), job.arena, (key, "left"))
            if not bool(torch.isfinite(first).all()):
                return False
        for m, p, q in self._factors(first, right):
            orthonormal(p)
            torch.mm(p, m.of(residual), out=q)
        mine.copy_(right)
        offset = rights
        for begin, end in self._rest:
            second[offset : offset + end - begin] = residual[begin:end]
            offset += end - begin
        error = self._buffer("rounded", second.numel()) if wire != ValueCodec.FP32 else None
        scale = job.plan.grad_scale / job.channel.size
        yield from dense_allreduce(job.channel, DenseSum(second, wire, scale, error), job.arena, (key, "right"))
        self._left_factor = first
        if not bool(torch.isfinite(second).all()):
            return False
        self._keep(residual, first, mine, error)
        return True

    def _keep(
        self, residual: torch.Tensor, first: torch.Tensor, mine: torch.Tensor, error: torch.Tensor | None
    ) -> None:
        """Finds out what this rank has not told the others: to be its residual."""
        left = self._taken.left = self._buffer("left", residual.numel())
        left.copy_(residual)
        rights = mine.numel()
        if error is not None:
            mine.sub_(error[:rights])
        for m, p, q in self._factors(first, mine):
            m.of(left).addmm_(p.t(), q, alpha=-1.0)
        offset = rights
        for begin, end in self._rest:
            if error is None:
                left[begin:end] = 0.0
            else:
                left[begin:end] = error[offset : offset + end - begin]
            offset += end - begin

    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """See `Strategy.write_average`. The owners have scaled already, before they rounded.

        Products and sums are elementwise, since a matrix product may differ from one machine to another.
        """
        full = out if out.dtype == torch.float32 else self.job.arena.get("low rank", out.numel(), torch.float32)
        rights = sum(self._rank * m.cols for m in self._matrices)
        for m, p, q in self._factors(self._left_factor, self._second[:rights]):
            target = m.of(full)
            torch.mul(p[0].unsqueeze(1), q[0], out=target)
            if self._rank > 1:
                more = self.job.arena.get("low rank term", m.rows * m.cols, torch.float32).view(m.rows, m.cols)
                for i in range(1, self._rank):
                    target.add_(torch.mul(p[i].unsqueeze(1), q[i], out=more))
        offset = rights
        for begin, end in self._rest:
            full[begin:end] = self._second[offset : offset + end - begin]
            offset += end - begin
        if full is not out:
            out.copy_(full)

    def settle(self) -> None:
        """Remembers the right factors."""
        right = self._second[: sum(self._rank * m.cols for m in self._matrices)]
        known = self._known()
        kept = right.clone() if known is None else known.right.copy_(right)
        tag = kernels.crc32c(kept.view(torch.uint8)) or 1
        self.job.bucket.shared = Factors(self._rank, kept, tag)

    def _known(self) -> Factors | None:
        known = self.job.bucket.shared
        return known if isinstance(known, Factors) and known.rank == self._rank else None

    def _buffer(self, name: str, numel: int) -> torch.Tensor:
        return self.job.arena.get((self.job.bucket.index, name), numel, torch.float32)

    def _factors(self, first: torch.Tensor, right: torch.Tensor) -> list[tuple[Matrix, torch.Tensor, torch.Tensor]]:
        """Returns every matrix with views of its factors, of shapes (rank, rows) and (rank, columns)."""
        found, p, q, rank = [], 0, 0, self._rank
        for m in self._matrices:
            left = first[p : p + rank * m.rows].view(rank, m.rows)
            found.append((m, left, right[q : q + rank * m.cols].view(rank, m.cols)))
            p, q = p + rank * m.rows, q + rank * m.cols
        return found
