"""Dense allreduce: every algorithm, any number of ranks, 32 and 16 bits, against float64 sums."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import EPS32, KINDS, gradient, magnitude, same_bits, total
from hypothesis import given
from hypothesis import strategies as st

from sparsecomm.collectives import (
    DenseAlgorithm,
    DenseSum,
    choose_dense,
    dense_allreduce,
    doubling_allreduce,
    halving_allreduce,
    ring_allreduce,
)
from sparsecomm.errors import CommTimeout, ConfigError, KernelError, TransportError
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import SimulatedWorld
from sparsecomm.types import ValueCodec

Algorithm = Callable[..., Any]
ALGORITHMS: list[Algorithm] = [ring_allreduce, halving_allreduce, doubling_allreduce, dense_allreduce]
WIRES = [ValueCodec.FP32, ValueCodec.FP16, ValueCodec.BF16]
UNIT = {ValueCodec.FP32: 0.0, ValueCodec.FP16: 2.0**-11, ValueCodec.BF16: 2.0**-8}
"""Half a unit in the last place, relative."""
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)


def summed(
    algorithm: Algorithm,
    data: list[torch.Tensor],
    *,
    wire: ValueCodec = ValueCodec.FP32,
    scale: float = 1.0,
    keep: bool = True,
    **options: Any,
) -> tuple[list[torch.Tensor], list[torch.Tensor], SimulatedWorld]:
    """Every rank's result and what it rounded off."""
    world = SimulatedWorld(len(data))
    work = [d.clone() for d in data]
    errors = [torch.full_like(d, float("nan")) for d in data]  # every element must be written

    def make(channel: Any) -> Any:
        error = errors[channel.rank] if keep else None
        return algorithm(channel, DenseSum(work[channel.rank], wire, scale, error), Arena(), "key", **options)

    world.run(make)
    assert not any(world.mail.values()), "a message was left over"
    return work, errors, world


sizes = st.integers(1, 16).flatmap(
    lambda p: st.tuples(st.just(p), st.sampled_from([0, 1, p - 1, p, p + 1, 37, 128, 1001]) | st.integers(0, 300))
)


@algorithms
@given(
    size=sizes,
    wire=st.sampled_from(WIRES),
    kind=st.sampled_from(KINDS),
    scaled=st.booleans(),
    segment=st.sampled_from([1, 3, 16, 1 << 19]),
    seed=st.integers(0, 1000),
)
def test_sums_agree_on_all_ranks_and_nothing_is_lost(
    algorithm: Algorithm, size: tuple[int, int], wire: ValueCodec, kind: str, scaled: bool, segment: int, seed: int
) -> None:
    ranks, numel = size
    if kind == "single" and not numel:
        return
    scale = 1.0 / ranks if scaled else 1.0
    options = {"segment": segment} if algorithm is ring_allreduce else {}
    data = [gradient(kind, numel, torch.float32, seed + r) for r in range(ranks)]
    work, errors, _ = summed(algorithm, data, wire=wire, scale=scale, keep=wire != ValueCodec.FP32, **options)
    assert all(same_bits(w, work[0]) for w in work)
    result = work[0].double() / scale
    kept = total(errors) if wire != ValueCodec.FP32 else torch.zeros(numel, dtype=torch.float64)
    rounding = (2 * ranks + 4) * (EPS32 * magnitude(data) + 2.0**-149)
    assert bool(((result + kept - total(data)).abs() <= rounding + ranks * 2.0**-148).all())
    # Each of at most P roundings is of a partial sum; in FP16 also of a unit of the segment's largest value.
    largest = float(magnitude(data).max()) if numel else 0.0
    coarse = UNIT[wire] * magnitude(data) + (2.0**-25 * largest if wire == ValueCodec.FP16 else 0.0) + 2.0**-133
    off = (result - total(data)).abs()
    assert bool((off <= 1.1 * ranks * coarse * (wire != ValueCodec.FP32) + rounding).all())


@algorithms
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_nan_and_infinity_reach_every_rank_and_stay_in_their_place(
    algorithm: Algorithm, wire: ValueCodec, ranks: int
) -> None:
    numel = 53
    data = [gradient("normal", numel, torch.float32, r) for r in range(ranks)]
    data[1][7], data[0][20], data[ranks - 1][40] = float("nan"), float("inf"), float("-inf")
    work, errors, _ = summed(algorithm, data, wire=wire, keep=wire != ValueCodec.FP32)
    for result in work:
        assert result[7].isnan()
        assert float(result[20]) == float("inf")
        assert float(result[40]) == float("-inf")
        assert int(result.isfinite().sum()) == numel - 3
        assert same_bits(result.nan_to_num(7.0, 8.0, 9.0), work[0].nan_to_num(7.0, 8.0, 9.0))
    if wire != ValueCodec.FP32:
        assert all(bool(e.isfinite().all()) for e in errors), "residuals must not be poisoned"


@pytest.mark.parametrize("ranks", [2, 4, 7])
@pytest.mark.parametrize("wire", WIRES)
def test_a_ring_of_many_blocks_equals_the_plain_order_of_summation(ranks: int, wire: ValueCodec) -> None:
    """Blocks only change when things happen: each element is still summed in the order of ranks from its owner's on."""
    numel, segment = 500, 8
    data = [gradient("wide", numel, torch.float32, r) for r in range(ranks)]
    work, _, world = summed(ring_allreduce, data, segment=segment, wire=wire, keep=False)
    blocks = -(-numel // (ranks * segment))
    if wire == ValueCodec.FP32:
        expected = torch.empty(numel, dtype=torch.float32)
        for b in range(blocks):
            first, past = numel * b // blocks, numel * (b + 1) // blocks
            for c in range(ranks):
                lo, hi = first + (past - first) * c // ranks, first + (past - first) * (c + 1) // ranks
                expected[lo:hi] = data[c][lo:hi]
                for i in range(1, ranks):
                    expected[lo:hi] += data[(c + i) % ranks][lo:hi]
        assert same_bits(work[0], expected)
    for traffic in world.traffic:
        assert traffic.messages_sent == 2 * (ranks - 1) * blocks


@pytest.mark.parametrize("ranks", range(1, 17))
@pytest.mark.parametrize("wire", WIRES)
def test_messages_and_bytes_are_those_of_the_papers(ranks: int, wire: ValueCodec) -> None:
    numel, width = 64 * 105, 4 if wire == ValueCodec.FP32 else 2
    data = [torch.ones(numel, dtype=torch.float32)] * ranks
    rounds = ranks.bit_length() - 1
    core = 1 << rounds
    scales = 4 if wire == ValueCodec.FP16 else 0
    _, _, world = summed(halving_allreduce, data, wire=wire)
    for rank, traffic in enumerate(world.traffic):
        fold = rank < 2 * (ranks - core)
        giver = fold and rank % 2 == 1
        assert traffic.messages_sent == (1 if giver else 2 * rounds + fold)
        values = numel if giver else 2 * numel * (core - 1) / core + fold * numel
        assert width * (values - 2) <= traffic.bytes_sent <= width * (values + 2) + scales * 3 * core
    _, _, world = summed(doubling_allreduce, data, wire=wire)
    most = max(t.messages_sent for t in world.traffic)
    assert most == rounds + (ranks != core)
    assert max(t.bytes_sent for t in world.traffic) == most * 4 * numel


@algorithms
@pytest.mark.parametrize("wire", WIRES)
def test_nothing_is_allocated_after_the_first_time(algorithm: Algorithm, wire: ValueCodec) -> None:
    ranks, numel = 5, 1000
    world, arenas = SimulatedWorld(ranks), [Arena() for _ in range(ranks)]
    work = [torch.ones(numel, dtype=torch.float32) for _ in range(ranks)]
    errors = [torch.empty(numel, dtype=torch.float32) for _ in range(ranks)]

    def make(channel: Any) -> Any:
        dense = DenseSum(work[channel.rank], wire, error=errors[channel.rank])
        return algorithm(channel, dense, arenas[channel.rank], "k")

    world.run(make)
    first = [a.allocations for a in arenas]
    for _ in range(3):
        world.run(make)
    assert [a.allocations for a in arenas] == first


@pytest.mark.parametrize("wire", WIRES)
def test_a_long_ring_needs_buffers_for_its_segments_only(wire: ValueCodec) -> None:
    ranks, segment, arena = 4, 16, Arena()
    for numel in (2_000, 8_000):
        arenas = [arena, *(Arena() for _ in range(ranks - 1))]
        ring = functools.partial(ring_allreduce, segment=segment)
        SimulatedWorld(ranks).run(
            lambda c, n=numel, a=arenas, ring=ring: ring(
                c, DenseSum(torch.ones(n, dtype=torch.float32), wire), a[c.rank], 0
            )
        )
        assert arena.allocated_bytes <= 1.25 * 8 * (ranks - 1) * (4 * segment + 4)


@algorithms
@pytest.mark.parametrize("wire", WIRES)
def test_a_lost_message_is_noticed_and_a_shortened_one_named(algorithm: Algorithm, wire: ValueCodec) -> None:
    for lost in (True, False):
        world = SimulatedWorld(4)
        count = [0]

        def tamper(
            source: int, dest: int, message: torch.Tensor, lost: bool = lost, count: list[int] = count
        ) -> torch.Tensor | None:
            count[0] += 1
            if count[0] != 6:
                return message
            return None if lost else message[:-1]

        world.tamper = tamper
        outcomes = world.run(
            lambda c: algorithm(c, DenseSum(torch.ones(100, dtype=torch.float32), wire), Arena(), 0),
            return_exceptions=True,
        )
        assert any(isinstance(o, CommTimeout if lost else TransportError) for o in outcomes), outcomes


@algorithms
def test_bad_arguments_are_refused_with_their_value(algorithm: Algorithm) -> None:
    world = SimulatedWorld(2)
    for options, kind, words in (
        ({"wire": ValueCodec.INT8}, KernelError, "INT8"),
        ({"scale": 0.0}, ConfigError, r"0\.0"),
        ({"error": torch.empty(3, dtype=torch.float32)}, ConfigError, r"\(3,\)"),
    ):
        with pytest.raises(kind, match=words):
            world.run(lambda c, o=options: algorithm(c, DenseSum(torch.ones(10, dtype=torch.float32), **o), Arena(), 0))


@given(st.integers(0, 1 << 28), st.integers(1, 1024), st.sampled_from(WIRES), st.booleans())
def test_the_rule_takes_the_fewest_rounds_for_little_and_the_fewest_bytes_for_much(
    numel: int, ranks: int, wire: ValueCodec, one_host: bool
) -> None:
    chosen = choose_dense(numel, ranks, wire, one_host=one_host)
    if numel <= 256:
        assert chosen == DenseAlgorithm.DOUBLING
    if numel >= 1 << 26 and 2 <= ranks <= 64:
        power = ranks & (ranks - 1) == 0
        assert chosen == DenseAlgorithm.RING or (power and chosen == DenseAlgorithm.HALVING)


def test_the_rule_picks_each_algorithm_where_it_was_measured_to_win() -> None:
    def pick(nbytes: int, ranks: int, one_host: bool = True) -> DenseAlgorithm:
        return choose_dense(nbytes // 4, ranks, ValueCodec.FP32, one_host=one_host)

    assert pick(64 << 10, 2) == DenseAlgorithm.DOUBLING
    assert pick(4 << 20, 2) == DenseAlgorithm.HALVING
    assert pick(256 << 20, 4) == DenseAlgorithm.HALVING
    assert pick(256 << 20, 3) == DenseAlgorithm.RING
    assert pick(256 << 20, 4, one_host=False) == DenseAlgorithm.RING
