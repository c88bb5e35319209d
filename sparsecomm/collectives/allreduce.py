"""The dense allreduce: the algorithm that is expected to be fastest for this size, number of ranks and kind of link."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from sparsecomm.collectives.allreduce_costs import DenseAlgorithm, choose_dense, ring_segment
from sparsecomm.collectives.doubling import doubling_allreduce
from sparsecomm.collectives.halving import halving_allreduce
from sparsecomm.collectives.ring import ring_allreduce
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps
from sparsecomm.types import ValueCodec

__all__ = ["dense_allreduce"]


def dense_allreduce(
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

    Args:
        channel: the ranks.
        work: float32, shape (n,), contiguous, n the same on all ranks. Mutated: the sum over ranks, times scale.
        arena: gives the buffers.
        key: names them.
        wire: FP32, FP16 or BF16: how values travel; sums are float32.
        scale: factor on the sum, positive.
        error: float32, shape (n,), or None. Overwritten with what this rank rounded off, before scaling, so that
            sum over ranks of `work` before = work after / scale + sum over ranks of `error`, to rounding of float32.

    Raises:
        KernelError: for another wire codec or an unfit vector.
        ConfigError: for a scale that is not positive or an error of another shape.
    """
    algorithm = choose_dense(work.numel(), channel.size, wire, one_host=channel.one_host)
    if algorithm == DenseAlgorithm.RING:
        segment = ring_segment(one_host=channel.one_host)
        return ring_allreduce(channel, work, arena, key, wire=wire, scale=scale, error=error, segment=segment)
    run = doubling_allreduce if algorithm == DenseAlgorithm.DOUBLING else halving_allreduce
    return run(channel, work, arena, key, wire=wire, scale=scale, error=error)
