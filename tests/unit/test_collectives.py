"""The collectives by themselves, and what they cost in messages and bytes."""

from __future__ import annotations

import pytest
import torch
from helpers import Cluster, gradient, plan, same_bits, total
from hypothesis import given
from hypothesis import strategies as st

from sparsecomm import kernels
from sparsecomm.collectives import (
    DenseSum,
    allgather,
    allgatherv_direct,
    dense_allreduce,
    dense_ring_bytes,
    ring_allreduce,
)
from sparsecomm.exchange.auto.rule import choose_collective
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps, SimulatedWorld
from sparsecomm.types import Sizes, ValueCodec
from sparsecomm.wire import HEADER_BYTES

WORLDS = range(1, 17)


def rounds(size: int) -> int:
    """ceil(log2 P)."""
    return (size - 1).bit_length()


def ring_bytes_of(rank: int, size: int, numel: int) -> int:
    """Bytes a rank sends around the ring: every chunk once in each half, but for one."""
    chunks = [numel * (c + 1) // size - numel * c // size for c in range(size)]
    return 4 * (2 * numel - chunks[(rank + 1) % size] - chunks[(rank + 2) % size])


@pytest.mark.parametrize("size", WORLDS)
def test_fixed_blocks_reach_every_rank_in_log_rounds(size: int) -> None:
    world = SimulatedWorld(size)

    def make(channel: Channel) -> CollectiveSteps[list[torch.Tensor]]:
        mine = torch.full((5,), channel.rank + 1, dtype=torch.uint8)
        return allgather(channel, mine, Arena(), "key")

    for blocks in world.run(make):
        assert [b.tolist() for b in blocks] == [[r + 1] * 5 for r in range(size)]
    for traffic in world.traffic:
        assert traffic.messages_sent == traffic.messages_received == rounds(size)
        assert traffic.bytes_sent == traffic.bytes_received == 5 * (size - 1)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=16))
def test_bodies_of_any_length_reach_every_rank_and_empty_ones_are_not_sent(lengths: list[int]) -> None:
    size = len(lengths)
    world = SimulatedWorld(size)

    def make(channel: Channel) -> CollectiveSteps[list[torch.Tensor]]:
        mine = torch.full((lengths[channel.rank],), channel.rank, dtype=torch.uint8)
        return allgatherv_direct(channel, mine, lengths, Arena(), "key")

    for bodies in world.run(make):
        assert [b.tolist() for b in bodies] == [[r] * n for r, n in enumerate(lengths)]
    for traffic, length in zip(world.traffic, lengths, strict=True):
        assert traffic.messages_sent == (size - 1 if length else 0)
        assert traffic.bytes_sent == (size - 1) * length


@given(st.integers(1, 16), st.integers(0, 100), st.integers(0, 1000))
def test_the_ring_sums_alike_on_all_ranks_at_the_least_cost(size: int, numel: int, seed: int) -> None:
    world = SimulatedWorld(size)
    data = [gradient("normal", numel, torch.float32, seed + r) for r in range(size)]
    work = [d.clone() for d in data]
    world.run(lambda channel: ring_allreduce(channel, DenseSum(work[channel.rank]), Arena(), "key"))
    for w in work:
        assert same_bits(w, work[0])
        torch.testing.assert_close(w.double(), total(data), rtol=1e-5, atol=1e-5)
    for rank, traffic in enumerate(world.traffic):
        assert traffic.bytes_sent == ring_bytes_of(rank, size, numel)
        assert traffic.messages_sent <= 2 * (size - 1)
        assert abs(traffic.bytes_sent - dense_ring_bytes(numel, size)) <= 8


@pytest.mark.parametrize("size", WORLDS)
def test_a_sparse_exchange_costs_log_rounds_of_headers_and_one_body_to_each(size: int) -> None:
    numel = 2000
    cluster = Cluster(size, numel)
    grads = [gradient("normal", numel, torch.float32, r) for r in range(size)]
    reports = cluster.step(grads, plan(numel, density=0.05, value_codec=ValueCodec.FP16))
    bodies = [(r.bytes_sent - HEADER_BYTES * (size - 1)) / max(1, size - 1) for r in reports]
    for rank, traffic in enumerate(cluster.world.traffic):
        assert traffic.messages_sent == rounds(size) + size - 1
        assert traffic.bytes_sent == reports[rank].bytes_sent
        assert traffic.bytes_received == reports[rank].bytes_received
        if size > 1:
            assert bodies[rank] > 2 * 100  # 16-bit values and some index bits
            assert bodies[rank] <= 2 * 100 + kernels.max_index_bytes(2, 100, numel)
            received = sum(b for r, b in enumerate(bodies) if r != rank)
            assert traffic.bytes_received == HEADER_BYTES * (size - 1) + received


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("codec", [ValueCodec.FP32, ValueCodec.BF16])
def test_a_dense_exchange_costs_headers_and_the_allreduce(size: int, residual: bool, codec: ValueCodec) -> None:
    numel = 320
    bare = SimulatedWorld(size)
    bare.run(
        lambda channel: dense_allreduce(
            channel, DenseSum(torch.ones(numel, dtype=torch.float32), codec), Arena(), "key"
        )
    )
    cluster = Cluster(size, numel, residual=residual)
    reports = cluster.step(
        [torch.ones(numel, dtype=torch.float32) for _ in range(size)], plan(numel, dense=True, value_codec=codec)
    )
    for rank, (traffic, report) in enumerate(zip(cluster.world.traffic, reports, strict=True)):
        assert traffic.messages_sent == rounds(size) + bare.traffic[rank].messages_sent
        assert traffic.bytes_sent == HEADER_BYTES * (size - 1) + bare.traffic[rank].bytes_sent
        assert report.bytes_sent == traffic.bytes_sent
        assert report.nnz == report.numel == numel
        assert report.dense_bytes == 2 * 4 * numel * (size - 1) // size


@given(
    st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.integers(1, 64),
    st.sampled_from(ValueCodec),
)
def test_auto_never_picks_the_collective_that_sends_more(
    sizes: tuple[int, int], size: int, value_codec: ValueCodec
) -> None:
    numel, k = sizes
    kind = choose_collective(Sizes(k, numel, size, value_codec))
    floor = kernels.max_value_bytes(value_codec, k) * (size - 1)
    if kind == "allgather" and size > 1:
        assert floor <= dense_ring_bytes(numel, size)
    ceiling = (size - 1) * (kernels.max_value_bytes(value_codec, k) + -(-numel // 8) + HEADER_BYTES)
    if kind == "dense":
        assert ceiling >= dense_ring_bytes(numel, size)


@pytest.mark.parametrize("size", [2, 4, 16])
def test_auto_is_sparse_where_little_is_sent_and_dense_where_all_is(size: int) -> None:
    assert choose_collective(Sizes(1000, 10**6, size, ValueCodec.FP16)) == "allgather"
    assert choose_collective(Sizes(10**6, 10**6, size, ValueCodec.FP32)) == "dense"
