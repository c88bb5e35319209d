"""Dense allreduce by recursive doubling: the fewest rounds, for vectors so short that bytes do not count.

Cost: ceil(log2 P) alpha and n log2 P words sent by every rank; two rounds more where P is not a power of two.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from sparsecomm.collectives.fold import Core
from sparsecomm.collectives.partial_sums import DenseSum
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps
from sparsecomm.types import ValueCodec

__all__ = ["doubling_allreduce"]


def doubling_allreduce(
    channel: Channel,
    work: torch.Tensor,
    arena: Arena,
    key: Hashable,
    *,
    wire: ValueCodec = ValueCodec.FP32,
    scale: float = 1.0,
    error: torch.Tensor | None = None,
) -> CollectiveSteps[None]:
    """Sums a vector over all ranks, in place, with results that are bitwise equal on all ranks. Collective.

    In round j ranks that differ in bit j exchange their sums and add them. Both add the same two numbers, and
    a + b = b + a in floating point too (but for which NaN two NaNs give).

    Args:
        channel: the ranks.
        work: float32, shape (n,), contiguous. Mutated: becomes the sum over ranks, times scale.
        arena: gives a receive buffer of n elements.
        key: names it.
        wire: FP32, FP16 or BF16. Where this algorithm is chosen bytes do not count, so float32 travels anyway.
        scale: factor on the sum.
        error: float32, shape (n,), or None. Becomes zero: nothing is rounded.
    """
    dense = DenseSum(work, wire, scale, error)
    core = Core.of(channel.rank, channel.size)
    n = work.numel()
    if n and channel.size > 1:
        octets = work.view(torch.uint8)
        spare = arena.get((key, "doubling"), 4 * n, torch.uint8)
        if core.giver:
            assert core.partner is not None
            yield [channel.isend(octets, core.partner)]
            yield [channel.irecv(octets, core.partner)]
            if error is not None:
                error.zero_()
            return
        if core.partner is not None:
            yield [channel.irecv(spare, core.partner)]
            work.add_(spare.view(torch.float32))
        distance = 1
        while distance < core.size:
            peer = core.rank_of(core.index ^ distance)
            yield [channel.irecv(spare, peer), channel.isend(octets, peer)]
            work.add_(spare.view(torch.float32))
            distance *= 2
    dense.finish_exactly()
    if n and core.partner is not None:
        yield [channel.isend(octets, core.partner)]
