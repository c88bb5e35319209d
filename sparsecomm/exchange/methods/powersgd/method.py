"""PowerSGD: dense sums of two thin factors of each matrix (Vogels et al. 2019). For comparison.

    1 accumulate   add the gradient to the residual M, which stays whole until the end
    2 project      sum P = M Q over the ranks, with Q made orthonormal from the right factor of the last step
    3 approximate  make P orthonormal, sum Q = M^T P over the ranks, together with the elements of all other parameters
    4 apply        the average is P Q^T / ranks; M - P Q^T with this rank's Q stays in the residual

All ranks make P orthonormal from the same sum, by operations that give the same bits on any machine. Both sums are
steps of one generator, so any number of buckets may be in flight. The residual uses the rank's Q before the sum, minus
its 16-bit rounding. So the residuals of all ranks add up to exactly the part that the average lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from typing_extensions import override

from sparsecomm import kernels
from sparsecomm.collectives import DenseSum, dense_allreduce, dense_allreduce_bytes
from sparsecomm.compress import PowerSGD
from sparsecomm.exchange.agree import Agreement, agreement_bytes
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.method import Method, Scope, register
from sparsecomm.exchange.methods.powersgd.factors import Matrix, matrices_of, orthonormal, random_factor
from sparsecomm.exchange.plan import codec_for_sums
from sparsecomm.feedback import WholeTaken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import Sizes, Span, ValueCodec

__all__ = ["Factors", "LowRank"]


@dataclass(slots=True)
class Factors:
    """The factors that a bucket remembers, from which the next step starts.

    Attributes:
        rank: rank of the approximation.
        right: float32, the summed right factors of all matrices, one after the other, each of shape (rank, columns).
        tag: checksum of `right`, never 0.
    """

    rank: int
    right: torch.Tensor
    tag: int


@register
class LowRank(Method):
    """Sums low-rank factors densely, in 32 or 16 bits; the rounding goes back to the residual."""

    name = "powersgd"
    number = 8
    has_body = False
    must_match: ClassVar = {"nnz": "rank of the matrices", "value_codec": "value_codec"}
    scope = Scope.OWN

    _taken: WholeTaken
    _rank: int
    _matrices: list[Matrix]
    _others: list[Span]
    _left_factor: torch.Tensor
    _second: torch.Tensor  # the right factors, then the elements of all other parameters

    @classmethod
    @override
    def bytes_sent(cls, sizes: Sizes) -> int:
        """Assumes k values, half in each sum; the true number depends on the shapes of parameters."""
        wire, k = codec_for_sums(sizes.values), sizes.k
        sums = (dense_allreduce_bytes(n, sizes.ranks, wire) for n in (k // 2, k - k // 2))
        return agreement_bytes(sizes.ranks) + sum(sums)

    @classmethod
    @override
    def rounds(cls, ranks: int) -> int:
        """The agreement takes log2 P rounds, each of the two short sums twice as many."""
        return 5 * (ranks - 1).bit_length()

    @classmethod
    @override
    def seconds(cls, sizes: Sizes, costs: Costs) -> Estimate:
        """Every matrix is read for each factor and for the residual, and written once."""
        compute = 3 * costs.exchange + (4 * costs.add + 2 * costs.fill) * sizes.numel
        return Estimate(costs.alpha * cls.rounds(sizes.ranks) + costs.beta * cls.bytes_sent(sizes), compute)

    @override
    def take(self) -> WholeTaken:
        self._taken = self.exchange.take_whole()
        return self._taken

    @override
    def encode(self) -> None:
        exchange, compressor = self.exchange, self.exchange.plan.compressor
        # Benchmarks also run this method with compressors that have no rank.
        self._rank = compressor.rank if isinstance(compressor, PowerSGD) else 1
        self._matrices, self._others = matrices_of(exchange.memory.layout, self._rank)
        self.header = exchange.header()
        self.header.nnz = min(self._rank, exchange.grad.numel())
        self.header.value_codec = codec_for_sums(exchange.plan.value_codec)
        known = self._known()
        self.header.tag = 0 if known is None else known.tag
        self.make_bare_payload()

    @override
    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        exchange, key, wire = self.exchange, self.exchange.memory.index, self.header.value_codec
        residual = exchange.memory.residual
        assert residual is not None, "PowerSGD needs a residual"
        known = self._known() if agreement.same_tag else None
        rank, matrices = self._rank, self._matrices
        first = self._buffer("left factors", sum(rank * m.rows for m in matrices))
        rights = sum(rank * m.cols for m in matrices)
        second = self._second = self._buffer("right factors", rights + sum(end - start for start, end in self._others))
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
            yield from dense_allreduce(exchange.channel, DenseSum(first, wire), exchange.arena, (key, "left"))
            if not bool(torch.isfinite(first).all()):
                return False
        for m, p, q in self._factors(first, right):
            orthonormal(p)
            torch.mm(p, m.of(residual), out=q)
        mine.copy_(right)
        offset = rights
        for begin, end in self._others:
            second[offset : offset + end - begin] = residual[begin:end]
            offset += end - begin
        error = self._buffer("rounded", second.numel()) if wire != ValueCodec.FP32 else None
        scale = exchange.plan.grad_scale / exchange.channel.size
        yield from dense_allreduce(
            exchange.channel, DenseSum(second, wire, scale, error), exchange.arena, (key, "right")
        )
        self._left_factor = first
        if not bool(torch.isfinite(second).all()):
            return False
        self._keep(residual, first, mine, error)
        return True

    def _keep(
        self, residual: torch.Tensor, first: torch.Tensor, mine: torch.Tensor, error: torch.Tensor | None
    ) -> None:
        """Computes the next residual: the part of M that this rank's factors lack, and the rounding."""
        rest = self._taken.rest = self._buffer("rest", residual.numel())
        rest.copy_(residual)
        rights = mine.numel()
        if error is not None:
            mine.sub_(error[:rights])
        for m, p, q in self._factors(first, mine):
            m.of(rest).addmm_(p.t(), q, alpha=-1.0)
        offset = rights
        for begin, end in self._others:
            if error is None:
                rest[begin:end] = 0.0
            else:
                rest[begin:end] = error[offset : offset + end - begin]
            offset += end - begin

    @override
    def write_average(self, out: torch.Tensor, scale: float) -> None:
        """Multiplies the factors. Ignores `scale`: the owners scaled the sum before they rounded it.

        Products and sums are elementwise, since the bits of a matrix product may differ between machines.
        """
        full = out if out.dtype == torch.float32 else self.exchange.arena.get("low rank", out.numel(), torch.float32)
        rights = sum(self._rank * m.cols for m in self._matrices)
        for m, p, q in self._factors(self._left_factor, self._second[:rights]):
            target = m.of(full)
            torch.mul(p[0].unsqueeze(1), q[0], out=target)
            if self._rank > 1:
                more = self.exchange.arena.get("low rank term", m.rows * m.cols, torch.float32).view(m.rows, m.cols)
                for i in range(1, self._rank):
                    target.add_(torch.mul(p[i].unsqueeze(1), q[i], out=more))
        offset = rights
        for begin, end in self._others:
            full[begin:end] = self._second[offset : offset + end - begin]
            offset += end - begin
        if full is not out:
            out.copy_(full)

    @override
    def finish(self) -> None:
        """Stores the right factors for the next step."""
        right = self._second[: sum(self._rank * m.cols for m in self._matrices)]
        known = self._known()
        kept = right.clone() if known is None else known.right.copy_(right)
        tag = kernels.crc32c(kept.view(torch.uint8)) or 1
        self.exchange.memory.shared = Factors(self._rank, kept, tag)

    def _known(self) -> Factors | None:
        known = self.exchange.memory.shared
        return known if isinstance(known, Factors) and known.rank == self._rank else None

    def _buffer(self, name: str, numel: int) -> torch.Tensor:
        return self.exchange.arena.get((self.exchange.memory.index, name), numel, torch.float32)

    def _factors(self, first: torch.Tensor, right: torch.Tensor) -> list[tuple[Matrix, torch.Tensor, torch.Tensor]]:
        """Returns each matrix with views of its factors, of shapes (rank, rows) and (rank, columns)."""
        found, p, q, rank = [], 0, 0, self._rank
        for m in self._matrices:
            left = first[p : p + rank * m.rows].view(rank, m.rows)
            found.append((m, left, right[q : q + rank * m.cols].view(rank, m.cols)))
            p, q = p + rank * m.rows, q + rank * m.cols
        return found
