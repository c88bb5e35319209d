"""Whole exchanges with a compressor between simulated ranks: the code of training, in one process."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from sparsecomm.compress import Compressor
from sparsecomm.exchange import Plan, exchange
from sparsecomm.feedback import BucketLayout, BucketMemory
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.metrics import BucketReport
from sparsecomm.testing.errors import attempt, refuse
from sparsecomm.testing.gradients import gradient
from sparsecomm.transport import AgreedError, Channel, CollectiveSteps, SimulatedWorld
from sparsecomm.types import ValueCodec

__all__ = ["check_exchange"]

_EPS = torch.finfo(torch.float32).eps


class _World:
    """Simulated ranks. Each has one bucket and its residual."""

    def __init__(self, compressor: Compressor, collective: str, size: int, numel: int) -> None:
        layout = BucketLayout(("weight",), ((numel,),), ((1,),))
        self.compressor, self.collective, self.numel = compressor, collective, numel
        self.world = SimulatedWorld(size)
        self.residuals = [torch.zeros(numel, dtype=torch.float32) for _ in range(size)]
        self.buckets = [BucketMemory(0, layout, residual) for residual in self.residuals]
        self.arenas = [Arena() for _ in range(size)]

    def step(self, grads: Sequence[torch.Tensor], step: int, codec: ValueCodec) -> list[BucketReport]:
        """Averages the ranks' gradients, in place. Returns one report per rank."""
        k = self.compressor.k_for(self.numel, step)
        plan = Plan(step, self.collective, self.compressor, k, value_codec=codec)

        def make(channel: Channel) -> CollectiveSteps[BucketReport]:
            r = channel.rank
            return exchange(channel, self.buckets[r], grads[r], plan, self.arenas[r])

        try:
            return self.world.run(make)
        except AgreedError as agreed:
            raise agreed.cause from None


def check_exchange(compressor: Compressor, size: int, numel: int, steps: int, seed: int) -> None:
    """Checks exchanges between ranks: conservation, equal replicas, and undoing on all ranks after a NaN on one.

    Args:
        compressor: the compressor to check.
        size: world size.
        numel: elements of the bucket.
        steps: number of steps; one more follows, with a NaN.
        seed: seed of the gradients.

    Raises:
        ContractError: if a check fails, or the exchange does.
    """
    collectives = compressor.collectives or (("dense",) if compressor.is_dense else ("allgather", "split_reduce"))
    for collective in collectives:
        for codec in (ValueCodec.FP32, ValueCodec.FP16):
            world = _World(compressor, collective, size, numel)
            for step in range(steps):
                case = f"{size} ranks, {collective}, {codec.name.lower()}, {numel} elements, step {step}"
                kinds = ("normal", "wide", "zeros")
                grads = [
                    gradient(kinds[(r + step) % 3], numel, torch.float32, seed + 100 * step + r) for r in range(size)
                ]
                _check_step(world, grads, step, codec, case)
            if numel:
                case = f"{size} ranks, {collective}, {numel} elements, step {steps}"
                _check_nan(world, steps, codec, seed, case, whole=collective != "dense")


def _check_step(world: _World, grads: list[torch.Tensor], step: int, codec: ValueCodec, case: str) -> None:
    before = [r.clone() for r in world.residuals]
    averages = [g.clone() for g in grads]
    attempt("an exchange", functools.partial(world.step, averages, step, codec), case)
    size = len(grads)
    for rank, average in enumerate(averages[1:], start=1):
        if not torch.equal(average.view(torch.uint8), averages[0].view(torch.uint8)):
            refuse(f"ranks 0 and {rank} have different averages: their models would drift apart ({case})")
    everything = torch.stack([t.double() for t in (*grads, *before)])
    out = size * averages[0].double() + torch.stack([r.double() for r in world.residuals]).sum(0)
    allowed = (size + 8) * (_EPS * everything.abs().sum(0) + size * 2.0**-149) + size * _EPS * averages[
        0
    ].double().abs()
    wrong = ~((everything.sum(0) - out).abs() <= allowed)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        refuse(
            f"not conserved over ranks at position {i}: {float(everything.sum(0)[i]):.9g} came in, P * average + "
            f"residuals is {float(out[i]):.9g} ({case})"
        )


def _check_nan(world: _World, step: int, codec: ValueCodec, seed: int, case: str, *, whole: bool) -> None:
    """Checks a step with a NaN on the last rank.

    Args:
        world: the ranks.
        step: training step.
        codec: codec of the values.
        seed: seed of the gradients.
        case: describes the input, for messages.
        whole: whether the whole bucket must become NaN; after a dense sum only the NaN's position must.
    """
    size = len(world.residuals)
    before = [r.clone() for r in world.residuals]
    grads = [gradient("normal", world.numel, torch.float32, seed + r) for r in range(size)]
    steps = [g.abs() for g in grads]
    grads[-1][world.numel // 2] = torch.nan
    attempt("an exchange with a NaN", functools.partial(world.step, grads, step, codec), case)
    if not all(bool((g if whole else g[world.numel // 2]).isnan().all()) for g in grads):
        refuse(f"a NaN on rank {size - 1} did not make the bucket NaN on all ranks: models would drift apart ({case})")
    for rank, (now, then, moved) in enumerate(zip(world.residuals, before, steps, strict=True)):
        wrong = ~((now - then).abs() <= 4 * _EPS * (then.abs() + moved))
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            refuse(
                f"a NaN on rank {size - 1} changed the residual of rank {rank} at position {i} from "
                f"{float(then[i]):.9g} to {float(now[i]):.9g}: the step could not be undone ({case})"
            )
