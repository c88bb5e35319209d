"""Global top-k along a tree (gTop-k, Shi et al. 2019): pairs of ranks merge what they have and keep k of it.

    1 up     in round j a rank whose number has bit j as its lowest sends what it has to the rank without that bit,
             which adds it up and keeps the k largest: rank 0 has the result after ceil(log2 P) rounds, for any P
    2 down   rank 0's result to all, along the same tree backwards; everybody decodes the same bytes, rank 0 too

Cost: 2 ceil(log2 P) rounds of two messages; rank 0 sends ceil(log2 P) times k nonzeros and receives as many. A power of
two is not needed, so no surplus of ranks is folded away.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from sparsecomm.arena import Arena
from sparsecomm.collectives.parts import Codecs, Pairs
from sparsecomm.collectives.payloads import Vector, read_vector, receive_payload, send_payload, write_vector
from sparsecomm.kernels import dispatch as kernels
from sparsecomm.transport import Channel, CollectiveSteps
from sparsecomm.types import ValueCodec
from sparsecomm.wire import FLAG_NONFINITE, Header

__all__ = ["Tree"]


@dataclass(slots=True)
class Tree:
    """One rank's part in a global top-k.

    Attributes:
        channel: the ranks.
        arena: gives the buffers.
        bucket: bucket number, names them.
        k: how many nonzeros to keep, the same on all ranks.
        header: of this rank's exchange.
        codecs: how to write what this rank sends.
        dropped: pairs that this rank has to keep for all: sums that were not among the k largest, and what rounding
            dropped. In buffers that hold until the bucket's next exchange.
    """

    channel: Channel
    arena: Arena
    bucket: int
    k: int
    header: Header
    codecs: Codecs
    dropped: list[Pairs] = field(default_factory=list)

    def reduce(self, mine: Pairs) -> CollectiveSteps[Pairs | None]:
        """Sums the selections of all ranks, keeping k of the sums at most. Collective.

        Args:
            mine: what this rank has selected. Must stay until the next exchange.

        Returns:
            The same bits on all ranks; None if a sum was not finite. They hold until the bucket's next exchange.

        Raises:
            WireError: if what came here is damaged; names its author and the bucket.
        """
        channel, arena, rank, size = self.channel, self.arena, self.channel.rank, self.channel.size
        have: Pairs | None = mine
        bit = 1
        while bit < size and not rank & bit:
            if rank + bit < size:
                key = (self.bucket, "up", bit)
                header, payload = yield from receive_payload(channel, rank + bit, self.header, arena, key)
                theirs = None if header.flags & FLAG_NONFINITE else read_vector(header, payload, arena, key)
                have = None if have is None or theirs is None else self._merge(have, theirs, bit)
            bit *= 2
        vector = self._write(have)
        header, payload = vector.header, vector.payload
        if rank:
            yield send_payload(channel, payload, rank - bit)
            key = (self.bucket, "down", 0)
            header, payload = yield from receive_payload(channel, rank - bit, self.header, arena, key, author=0)
        below = [rank + (bit >> i) for i in range(1, bit.bit_length()) if rank + (bit >> i) < size]
        if below:
            yield [r for dest in below for r in send_payload(channel, payload, dest)]
        if header.flags & FLAG_NONFINITE:
            return None
        return read_vector(header, payload, arena, (self.bucket, "tree result"))

    def _write(self, pairs: Pairs | None) -> Vector:
        """Writes what this rank has, and notes what that rounds off."""
        vector = write_vector(self.header, pairs, self.codecs, self.arena, (self.bucket, "tree"))
        if pairs is not None and self.codecs.values != ValueCodec.FP32:
            self.dropped.append((pairs[0], vector.error))
        return vector

    def _merge(self, ours: Pairs, theirs: Pairs, bit: int) -> Pairs | None:
        """Adds two sparse vectors up and keeps the k largest sums; None if one is not finite. Mutates dropped."""
        indices = np.concatenate([ours[0].numpy(), theirs[0].numpy()])
        values = np.concatenate([ours[1].numpy(), theirs[1].numpy()])
        order = np.argsort(indices, kind="stable")  # both are ascending, which this makes use of
        indices, values = indices[order], values[order]
        first = np.flatnonzero(np.diff(indices, prepend=indices[:1] + np.uint32(1)))
        with np.errstate(over="ignore"):  # noticed below
            sums = torch.from_numpy(np.add.reduceat(values, first) if len(first) else values)
        places = torch.from_numpy(indices[first])
        room = min(self.k, sums.numel())
        where = self.arena.get((self.bucket, "kept places"), room, torch.uint32, reserve=self.k)
        kept = self.arena.get((self.bucket, "kept values", bit), room, torch.float32, reserve=self.k)
        result = kernels.exact_topk(None, sums, room, where, kept)
        if result.nonfinite:
            return None
        self.dropped.append((places, sums))  # zero where a sum was kept
        at = torch.from_numpy(where[: result.stored].numpy().astype(np.int64))
        return places[at], kept[: result.stored]
