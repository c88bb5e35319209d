"""Global top-k along a binomial tree (gTop-k, Shi et al. 2019): ranks merge sparse vectors in pairs. For comparison.

    1 up     in round j, a rank whose lowest set bit is bit j sends its vector to the rank without that bit; that rank
             adds both vectors and keeps the k largest sums; rank 0 has the result after ceil(log2 P) rounds, for any P
             (for P = 4, round 0: 1 to 0 and 3 to 2; round 1: 2 to 0)
    2 down   rank 0 sends the result down the same tree; all ranks decode the same bytes, rank 0 included

Cost: 2 ceil(log2 P) rounds of two messages. Rank 0 sends k nonzeros ceil(log2 P) times and receives as many. P need not
be a power of two.

A rank keeps the sums that it drops in a merge and the rounding of the vectors that it sends. It adds them to its
residual only when the whole exchange has succeeded.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from typing_extensions import override

from sparsecomm import kernels
from sparsecomm.exchange.agree import Agreement, agreement_bytes
from sparsecomm.exchange.costs import Costs, Estimate
from sparsecomm.exchange.messages import receive_payload, send_payload
from sparsecomm.exchange.method import Method, Scope, register
from sparsecomm.feedback import SelectedTaken
from sparsecomm.transport import CollectiveSteps
from sparsecomm.types import Codecs, Pairs, Sizes, ValueCodec
from sparsecomm.wire import FLAG_NONFINITE, HEADER_BYTES, Vector, body_bytes, read_vector, write_vector

__all__ = ["GlobalTopK"]


@register
class GlobalTopK(Method):
    """Sums all selections and keeps at most k of the sums."""

    name = "tree"
    number = 7
    has_body = False
    must_match: ClassVar = {"nnz": "k"}
    scope = Scope.COMPARISON  # split-reduce keeps about the same sums and sends less

    _taken: SelectedTaken
    _pairs: Pairs | None = None
    _dropped: list[Pairs]

    @classmethod
    @override
    def bytes_sent(cls, sizes: Sizes) -> int:
        """Counts the bytes of rank 0, which sends most."""
        payload_bytes = HEADER_BYTES + body_bytes(sizes.k, sizes.numel, Codecs(sizes.values, sizes.indices))
        return agreement_bytes(sizes.ranks) + (sizes.ranks - 1).bit_length() * payload_bytes

    @classmethod
    @override
    def rounds(cls, ranks: int) -> int:
        """The agreement, then one wait for a header and one for a body in each round up and down the tree."""
        return 5 * (ranks - 1).bit_length()

    @classmethod
    @override
    def seconds(cls, sizes: Sizes, costs: Costs) -> Estimate:
        """In each round up the tree, k nonzeros are sent, decoded and merged."""
        rounds = (sizes.ranks - 1).bit_length()
        nonzeros = (costs.encode + costs.decode) * sizes.k * (rounds + 1)
        compute = costs.exchange + (costs.select + costs.fill) * sizes.numel + nonzeros
        return Estimate(costs.alpha * cls.rounds(sizes.ranks) + 2 * costs.beta * cls.bytes_sent(sizes), compute)

    @override
    def take(self) -> SelectedTaken:
        self._taken = self.exchange.take_some()
        return self._taken

    @override
    def encode(self) -> None:
        self._dropped = []
        self.header = self.exchange.header()
        self.header.nnz = self.exchange.plan.k
        self.make_bare_payload()

    @override
    def communicate(self, agreement: Agreement) -> CollectiveSteps[bool]:
        exchange, key = self.exchange, self.exchange.memory.index
        channel, arena, rank, size = exchange.channel, exchange.arena, exchange.channel.rank, exchange.channel.size
        have: Pairs | None = (self._taken.indices, self._taken.values)
        bit = 1
        while bit < size and not rank & bit:
            if rank + bit < size:
                up = (key, "up", bit)
                header, payload = yield from receive_payload(channel, rank + bit, self.header, arena, up)
                theirs = None if header.flags & FLAG_NONFINITE else read_vector(header, payload, arena, up)
                have = None if have is None or theirs is None else self._merge(have, theirs, bit)
            bit *= 2
        vector = self._write(have)
        header, payload = vector.header, vector.payload
        if rank:
            yield send_payload(channel, payload, rank - bit)
            down = (key, "down", 0)
            header, payload = yield from receive_payload(channel, rank - bit, self.header, arena, down, author=0)
        below = [rank + (bit >> i) for i in range(1, bit.bit_length()) if rank + (bit >> i) < size]
        if below:
            yield [r for dest in below for r in send_payload(channel, payload, dest)]
        if header.flags & FLAG_NONFINITE:
            return False
        self._pairs = read_vector(header, payload, arena, (key, "tree result"))
        return True

    def _write(self, pairs: Pairs | None) -> Vector:
        """Writes this rank's pairs as a payload and appends their rounding to `_dropped`."""
        exchange, codecs = self.exchange, self.exchange.plan.codecs
        vector = write_vector(self.header, pairs, codecs, exchange.arena, (exchange.memory.index, "tree"))
        if pairs is not None and codecs.values != ValueCodec.FP32:
            self._dropped.append((pairs[0], vector.error))
        return vector

    def _merge(self, ours: Pairs, theirs: Pairs, bit: int) -> Pairs | None:
        """Adds two sparse vectors and keeps the k largest sums. Appends the others to `_dropped`.

        Returns:
            The kept sums; None if a sum is not finite.
        """
        arena, key, k = self.exchange.arena, self.exchange.memory.index, self.exchange.plan.k
        indices = np.concatenate([ours[0].numpy(), theirs[0].numpy()])
        values = np.concatenate([ours[1].numpy(), theirs[1].numpy()])
        order = np.argsort(indices, kind="stable")  # a merge: fast, since both halves are ascending
        indices, values = indices[order], values[order]
        # The start of each run of equal indices; the prepended number differs from the first.
        first = np.flatnonzero(np.diff(indices, prepend=indices[:1] + np.uint32(1)))
        with np.errstate(over="ignore"):  # exact_topk counts infinite sums
            sums = torch.from_numpy(np.add.reduceat(values, first) if len(first) else values)
        places = torch.from_numpy(indices[first])
        room = min(k, sums.numel())
        chosen = arena.get((key, "kept places"), room, torch.uint32, reserve=k)
        kept = arena.get((key, "kept values", bit), room, torch.float32, reserve=k)
        result = kernels.exact_topk(None, sums, room, chosen, kept)
        if result.nonfinite:
            return None
        self._dropped.append((places, sums))  # exact_topk has zeroed the kept sums, so the others are left
        at = torch.from_numpy(chosen[: result.stored].numpy().astype(np.int64))
        return places[at], kept[: result.stored]

    @override
    def write_average(self, out: torch.Tensor, scale: float) -> None:
        assert self._pairs is not None, "nothing was reduced"
        kernels.scatter_reduce(out, [self._pairs], scale=scale)

    @override
    def finish(self) -> None:
        """Adds to the residual the sums that this rank dropped and the rounding of the vectors that it sent."""
        residual = self.exchange.memory.residual
        assert residual is not None, "a sparse exchange needs a residual"
        for indices, values in self._dropped:
            kernels.scatter_add(residual, indices, values)
