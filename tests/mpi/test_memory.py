"""The hook's path from gradient to average: once warm, nothing that grows with n is allocated on any thread."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import sparsecomm as sc
from sparsecomm import kernels
from sparsecomm.transport import Channel, CollectiveSteps

N = 100_000


def memory_profile() -> profile:
    """Records torch's allocations on the thread that enters it."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def on_engine_thread(world: sc.World, action: Callable[[], object]) -> None:
    """Runs something on the thread that communicates."""

    def steps(channel: Channel) -> CollectiveSteps[None]:
        action()
        yield []

    world.engine.call("an action", steps)


class Steps:
    """Hands one flat gradient after another to a state, as DDP's hook does."""

    def __init__(self, world: sc.World, compressor: sc.Compressor, dtype: torch.dtype) -> None:
        self.model = nn.Linear(N, 1, bias=False, dtype=torch.float32)
        collective = "dense" if compressor == sc.Dense() else "allgather"
        self.state = sc.SparseState(compressor, collective=collective, model=self.model)
        g = torch.Generator().manual_seed(world.rank)
        self.grads = [torch.randn(N, generator=g, dtype=torch.float32).to(dtype) for _ in range(40)]

    def take(self, count: int) -> None:
        for _ in range(count):
            self.state.start(0, [self.model.weight], self.grads.pop(), last=True).wait()


def test_the_profile_sees_what_the_engine_thread_allocates(world: sc.World) -> None:
    """Else the next test would prove nothing."""
    profiler = memory_profile()
    on_engine_thread(world, profiler.__enter__)
    on_engine_thread(world, lambda: torch.empty(N, dtype=torch.float32))
    on_engine_thread(world, lambda: profiler.__exit__(None, None, None))
    assert max(e.cpu_memory_usage for e in profiler.events()) == 4 * N


@pytest.mark.parametrize("compressor", [sc.TopK(0.01), sc.ThresholdTopK(0.01), sc.Dense()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_warm_step_allocates_nothing_that_grows_with_n(
    world: sc.World, compressor: sc.Compressor, dtype: torch.dtype
) -> None:
    if kernels.current_path() == "reference":
        pytest.skip("the reference kernels may allocate")
    steps = Steps(world, compressor, dtype)
    steps.take(8)
    warm = steps.state.arena.allocations
    steps.take(20)
    assert steps.state.arena.allocations == warm
    with memory_profile() as here:
        steps.take(2)
    there = memory_profile()
    on_engine_thread(world, there.__enter__)
    steps.take(2)
    on_engine_thread(world, lambda: there.__exit__(None, None, None))
    for where, profiler in (("handing over", here), ("exchanging", there)):
        largest = max((e.cpu_memory_usage for e in profiler.events()), default=0)
        assert largest < N // 10, f"torch allocated {largest} bytes in one operation while {where}"
    tracemalloc.start()
    try:
        steps.take(2)
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        steps.take(1)
        peak = tracemalloc.get_traced_memory()[1] - held
    finally:
        tracemalloc.stop()
    assert peak < N, f"python and numpy allocated {peak} bytes in one step"
