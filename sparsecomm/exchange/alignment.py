"""Measures how far the ranks agree in a bucket: one small sum over all ranks, after the bucket's own exchange."""

from __future__ import annotations

import math

import torch

from sparsecomm.collectives import DenseSum, dense_allreduce
from sparsecomm.exchange.plan import Plan
from sparsecomm.feedback import BucketMemory, Squares, sample_positions
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.device import side_of
from sparsecomm.transport import Channel, CollectiveSteps

__all__ = ["largest_sampled", "measure_alignment", "sampled"]


def sampled(vector: torch.Tensor | None, memory: BucketMemory, step: int) -> torch.Tensor:
    """Returns the elements of a bucket that are sampled in a step: float32 on the host; zeros for no vector."""
    positions = sample_positions(memory.layout, step)
    if vector is None:
        return torch.zeros(positions.numel(), dtype=torch.float32)
    found = vector[positions.to(vector.device)].to(torch.float32)
    return side_of(vector.device).fetch(found, torch.empty(found.shape, dtype=torch.float32))


def largest_sampled(average: torch.Tensor, memory: BucketMemory, plan: Plan) -> tuple[int, int, float] | None:
    """Returns step, position and unscaled value of the largest sampled element; None if all of them are 0."""
    found = sampled(average, memory, plan.step)
    i = int(found.abs().argmax()) if found.numel() else 0
    if not found.numel() or not math.isfinite(float(found[i])) or float(found[i]) == 0.0:
        return None
    return plan.step, int(sample_positions(memory.layout, plan.step)[i]), float(found[i]) / plan.grad_scale


def measure_alignment(
    channel: Channel, memory: BucketMemory, compared: tuple[torch.Tensor, torch.Tensor], arena: Arena
) -> CollectiveSteps[None]:
    """Adds one measurement to the alignment of a bucket. Collective.

    Args:
        channel: connection to the other ranks.
        memory: memory of the bucket. Its alignment is mutated, alike on all ranks; it stays as it is if the sum is not
            finite.
        compared: `sampled` elements of this rank's gradient and residual before the step.
        arena: allocates the buffers.
    """
    gradient, residual = compared
    m = gradient.numel()
    work = arena.get((memory.index, "alignment"), 2 * m + 2, torch.float32)
    work[:m], work[m : 2 * m] = gradient, residual
    work[2 * m], work[2 * m + 1] = gradient.square().sum(), residual.square().sum()
    yield from dense_allreduce(channel, DenseSum(work, scale=1.0 / channel.size), arena, (memory.index, "alignment"))
    means = [float(part.double().square().sum()) for part in (work[:m], work[m : 2 * m])]
    each = [float(x) for x in work[2 * m :]]
    if all(math.isfinite(x) for x in (*means, *each)):
        memory.alignment.size = channel.size
        memory.alignment.add(Squares(means[0] / m, each[0] / m), Squares(means[1] / m, each[1] / m))
