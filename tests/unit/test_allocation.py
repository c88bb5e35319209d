"""Buffers are reused: after warm-up a step allocates nothing that grows with n."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from helpers import Cluster, gradient, plan
from torch.profiler import ProfilerActivity, profile

from sparsecomm import kernels
from sparsecomm.compress import ChunkTopK, Compressor, CyclicTopK, Dense, RandomK, ThresholdTopK, TopK
from sparsecomm.runtime.arena import Arena
from sparsecomm.types import ValueCodec

N = 20_000
COMPRESSORS = [TopK(0.01), ThresholdTopK(0.01), ThresholdTopK(0.01, interval=8), Dense()]
SHARED = [ChunkTopK(0.05, chunk=500), RandomK(0.01), CyclicTopK(0.01)]


def test_the_arena_hands_out_the_same_memory_again() -> None:
    arena = Arena()
    first = arena.get("a", 100, torch.float32)
    first.fill_(3.0)
    smaller = arena.get("a", 10, torch.float32)
    assert smaller.shape == (10,)
    assert bool((smaller == 3.0).all())
    assert smaller.data_ptr() == first.data_ptr()
    assert arena.allocations == 1


def test_the_arena_grows_with_headroom_and_counts_bytes() -> None:
    arena = Arena()
    arena.get("a", 1000, torch.float32)
    assert arena.allocations == 1
    assert arena.allocated_bytes >= 4 * 1000
    arena.get("a", 1200, torch.float32)
    assert arena.allocations == 1, "a little more must fit"
    arena.get("a", 10_000, torch.float32)
    arena.get("b", 10, torch.uint8)
    assert arena.allocations == 3
    assert 40_010 <= arena.allocated_bytes <= 2 * 40_010
    arena.clear()
    assert arena.allocated_bytes == 0


def test_keys_and_dtypes_do_not_share_memory() -> None:
    arena = Arena()
    buffers = [arena.get("a", 4, torch.float32), arena.get("a", 4, torch.uint8), arena.get(("a", 1), 4, torch.float32)]
    assert len({b.data_ptr() for b in buffers}) == 3


def test_the_arena_gives_empty_tensors() -> None:
    assert Arena().get("none", 0, torch.uint32).numel() == 0


@pytest.mark.parametrize(
    ("compressor", "collective"),
    [
        *((c, "allgather") for c in COMPRESSORS),
        (TopK(0.01), "split_reduce"),
        (TopK(0.01), "ssar"),
        *((c, c.collectives[0]) for c in SHARED),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 3])
def test_the_arena_stops_growing_after_warm_up(compressor: Compressor, collective: str, size: int) -> None:
    cluster = Cluster(size, N)
    warm_up = 10 if collective == "allgather" else 20  # parts vary from step to step

    def step(number: int) -> None:
        grads = [gradient("normal", N, torch.float32, 100 * number + r) * (1 + r) for r in range(size)]
        how = {"dense": compressor.is_dense, "collective": collective, "value_codec": ValueCodec.FP16}
        cluster.step(grads, plan(N, compressor=compressor, step=number, **how))

    for number in range(warm_up):
        step(number)
    warm = [a.allocations for a in cluster.arenas]
    for number in range(warm_up, 60):
        step(number)
    assert [a.allocations for a in cluster.arenas] == warm


def test_the_arena_stops_growing_even_if_payloads_vary_as_much_as_the_compressor_allows() -> None:
    """The count of a reused threshold may drift up to the cut at 4k/3; buffers must have been sized for that."""
    cluster = Cluster(2, N)
    how = ThresholdTopK(0.05, interval=1000)
    scale, sent = 1.0, []
    warm: list[int] = []
    for number in range(60):
        scale *= 0.9 if number < 10 else 1.05
        grads = [gradient("normal", N, torch.float32, 100 * number + r) * scale for r in range(2)]
        reports = cluster.step(grads, plan(N, compressor=how, step=number, value_codec=ValueCodec.FP16))
        sent.append(reports[0].nnz)
        if number == 9:
            warm = [a.allocations for a in cluster.arenas]
    assert max(sent[10:]) > 1.3 * max(sent[:10]), "the test must make payloads grow"
    assert [a.allocations for a in cluster.arenas] == warm


@pytest.mark.parametrize(
    ("compressor", "collective"), [*((c, "allgather") for c in COMPRESSORS), (TopK(0.01), "split_reduce")], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_warm_step_takes_no_memory_from_torch_or_python_that_grows_with_n(
    compressor: Compressor, collective: str, dtype: torch.dtype
) -> None:
    """Everything but the simulated network's copies: a world of one, through the whole of `exchange`."""
    if kernels.current_path() == "reference":
        pytest.skip("the reference kernels may allocate")
    cluster = Cluster(1, N)
    grads = [gradient("normal", N, dtype, step) for step in range(10)]

    def step(number: int) -> None:
        how = {"dense": compressor.is_dense, "collective": collective}
        cluster.step([grads[number]], plan(N, compressor=compressor, step=number, **how))

    for number in range(4):
        step(number)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(4)
        step(5)
    largest = max((e.cpu_memory_usage for e in profiler.events()), default=0)
    assert largest < N // 10, f"torch allocated {largest} bytes in one operation"
    tracemalloc.start()
    try:
        step(6)
        peaks = []
        for number in range(7, 10):
            tracemalloc.reset_peak()
            held = tracemalloc.get_traced_memory()[0]
            step(number)
            peaks.append(tracemalloc.get_traced_memory()[1] - held)
    finally:
        tracemalloc.stop()
    # The least, since threads of earlier tests may allocate in between.
    assert min(peaks) < N, f"python and numpy allocated {peaks} bytes in a step each"


def test_a_warm_split_reduce_takes_no_memory_that_grows_with_n_either() -> None:
    """Two ranks, so that parts and blocks travel: the network's copies are of messages, far smaller than the bucket."""
    if kernels.current_path() == "reference":
        pytest.skip("the reference kernels may allocate")
    n = 10 * N
    cluster = Cluster(2, n)
    grads = [[gradient("normal", n, torch.float32, 10 * step + r) for r in range(2)] for step in range(8)]

    def step(number: int) -> None:
        cluster.step(grads[number], plan(n, density=0.001, collective="split_reduce", step=number))

    for number in range(6):
        step(number)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(6)
    largest = max((e.cpu_memory_usage for e in profiler.events()), default=0)
    assert largest < n // 10, f"torch allocated {largest} bytes in one operation"
    tracemalloc.start()
    try:
        step(7)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < n, f"python and numpy allocated {peak} bytes in one step"
