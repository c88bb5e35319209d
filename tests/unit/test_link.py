"""The measured link between hosts: what follows from it, who measures it and when, and errors meanwhile."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from sparsecomm.collectives import (
    DenseAlgorithm,
    DenseSum,
    choose_dense,
    dense_allreduce,
    dense_allreduce_bytes,
    link,
    link_between_hosts,
)
from sparsecomm.collectives.allreduce_costs import UNMEASURED
from sparsecomm.compress import TopK
from sparsecomm.errors import SparseCommError
from sparsecomm.exchange.auto.measure import measure
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import (
    AgreedError,
    Channel,
    CollectiveSteps,
    Engine,
    GroupLink,
    Link,
    Request,
    SimulatedWorld,
    Task,
)
from sparsecomm.types import ValueCodec

SLOW, GIGABIT, FAST = Link(100e-6, 84e-9), Link(100e-6, 8.8e-9), Link(100e-6, 0.9e-9)
Make = Callable[[Channel], CollectiveSteps[Any]]


def picked(nbytes: int, ranks: int, of: Link | None) -> DenseAlgorithm:
    return choose_dense(nbytes // 4, ranks, ValueCodec.FP32, one_host=False, link=of)


def longest_doubling(ranks: int, of: Link) -> int:
    """Bytes of the longest vector that recursive doubling sums."""
    sizes = [1 << b for b in range(12, 30)]
    return max(n for n in sizes if picked(n, ranks, of) == DenseAlgorithm.DOUBLING)


@pytest.mark.parametrize("ranks", [3, 4, 8, 16])
def test_the_choice_follows_the_link(ranks: int) -> None:
    assert longest_doubling(ranks, SLOW) < longest_doubling(ranks, GIGABIT) < longest_doubling(ranks, FAST)
    late = Link(10 * GIGABIT.alpha, GIGABIT.beta)
    assert longest_doubling(ranks, GIGABIT) < longest_doubling(ranks, late)


def test_the_choice_is_the_one_that_was_measured_to_win() -> None:
    """Between two to four emulated hosts; the figures are in the commit that added this test."""
    for nbytes in (256 << 10, 1 << 20, 16 << 20):
        assert picked(nbytes, 2, SLOW) == picked(nbytes, 2, GIGABIT) == DenseAlgorithm.DOUBLING
        assert picked(nbytes, 3, SLOW) == picked(nbytes, 4, SLOW) == DenseAlgorithm.RING
    assert picked(16 << 20, 4, GIGABIT) == DenseAlgorithm.RING
    assert picked(16 << 20, 4, FAST) == DenseAlgorithm.HALVING
    assert picked(16 << 20, 2, FAST) == DenseAlgorithm.DOUBLING


def test_short_sums_and_one_host_do_not_depend_on_the_link() -> None:
    extreme = Link(1e-9, 1e-6)
    for ranks in (2, 3, 4, 8):
        assert picked(4 * UNMEASURED, ranks, extreme) == picked(4 * UNMEASURED, ranks, None)
        for numel in (1 << 12, 1 << 20):
            alike = [choose_dense(numel, ranks, ValueCodec.FP32, one_host=True, link=x) for x in (extreme, None)]
            assert alike[0] == alike[1]


@given(
    ranks=st.integers(1, 12),
    numel=st.sampled_from([105, 64 * 105, 2048 * 105]),
    wire=st.sampled_from([ValueCodec.FP32, ValueCodec.FP16, ValueCodec.BF16]),
    of=st.sampled_from([None, SLOW, GIGABIT, FAST, Link(1e-6, 1e-6), Link(1e-2, 1e-9)]),
)
def test_the_predicted_bytes_are_those_that_are_sent(ranks: int, numel: int, wire: ValueCodec, of: Link | None) -> None:
    world = SimulatedWorld(ranks, nodes=range(ranks))

    def make(channel: Channel) -> CollectiveSteps[None]:
        channel.link = GroupLink(known=of) if of is not None else None
        return dense_allreduce(channel, DenseSum(torch.ones(numel, dtype=torch.float32), wire), Arena(), 0)

    world.run(make)
    sent = max(t.bytes_sent for t in world.traffic)
    headers = 4 * 4 * 2 * ranks * -(-numel // (1 << 17))  # scales of fp16 segments, and lengths that do not divide
    assert abs(sent - dense_allreduce_bytes(numel, ranks, wire, link=of)) <= headers


def test_simulated_ranks_in_lock_step_measure_nothing() -> None:
    world = SimulatedWorld(3, nodes=(0, 1, 2))
    assert world.run(link_between_hosts) == [None] * 3
    assert not any(t.messages_sent for t in world.traffic)


# --- under engines, each with its own thread and in real time ---------------------------------------------------------


class Pause(Request):
    """Is complete after some seconds."""

    peer = None

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    @override
    def test(self) -> bool:
        return time.monotonic() >= self._until

    @override
    def describe(self) -> str:
        return "a pause"

    @override
    def cancel(self) -> None:
        pass


@contextmanager
def engines(
    nodes: tuple[int, ...], timeout: float = 20.0, of: Link | None = None
) -> Iterator[tuple[SimulatedWorld, list[Engine]]]:
    """One engine a rank. They must end."""
    world = SimulatedWorld(len(nodes), nodes)
    made = [Engine(t, timeout=timeout, link=of) for t in world.ranks]
    yield world, made
    for engine in made:
        assert engine.close(30.0), "an engine did not finish"


def start(engine: Engine, makes: list[Make], group: tuple[int, ...] | None = None) -> list[queue.SimpleQueue[Any]]:
    """Submits collectives; returns a queue for the result or error of each."""
    done: list[queue.SimpleQueue[Any]] = []
    for i, make in enumerate(makes):
        done.append(queue.SimpleQueue())
        engine.submit(Task(f"task {i}", make, done[-1].put, done[-1].put, group=group))
    return done


def summing(numel: int, pause: float, fail: bool = False) -> Make:
    """A dense sum of ones after a pause, or in its place a failure that all ranks have agreed on.

    Returns the sum's first element, the link, and the bytes that the rank has counted.
    """

    def steps(channel: Channel) -> CollectiveSteps[tuple[float, Link | None, int]]:
        yield [Pause(pause)]
        if fail:
            raise AgreedError(ValueError("agreed"))
        work = torch.ones(numel, dtype=torch.float32)
        yield from dense_allreduce(channel, DenseSum(work), Arena(), 0)
        assert bool((work == work[0]).all())
        return float(work[0]), channel.link.known if channel.link else None, channel.traffic.bytes_sent

    return steps


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ranks that have begun to measure, one entry each time."""
    begun: list[int] = []
    real = link.measure_link

    def counted(channel: Channel, ring: list[int]) -> CollectiveSteps[Link]:
        begun.append(channel.rank)
        return real(channel, ring)

    monkeypatch.setattr(link, "measure_link", counted)
    return begun


LONG, SHORT = 3 * UNMEASURED, UNMEASURED


@pytest.mark.parametrize("nodes", [(0, 1), (0, 1, 2), (0, 0, 1, 1)], ids=str)
def test_sums_in_flight_reach_the_link_in_any_order_and_one_of_them_measures(
    nodes: tuple[int, ...], measurements: list[int]
) -> None:
    """Rank r pauses long before sum r, so that on every rank another sum comes first."""
    size = len(nodes)
    with engines(nodes) as (_, made):
        lengths = [SHORT, LONG, LONG + 1, SHORT - 1, 5 * LONG, LONG, LONG]
        done = [
            start(e, [summing(n, 0.3 if (i - r) % size == 0 else 0.0, fail=i == 1) for i, n in enumerate(lengths)])
            for r, e in enumerate(made)
        ]
        results = [[q.get(timeout=30.0) for q in queues] for queues in done]
    links = {outcome[1] for rank in results for i, outcome in enumerate(rank) if i not in (0, 1, 3)}
    (found,) = links
    assert found.alpha > 0
    assert found.beta > 0
    assert sorted(measurements) == list(range(size)), "once on every rank"
    for rank in results:
        assert isinstance(rank[1], ValueError)
        assert all(outcome[0] == size for i, outcome in enumerate(rank) if i != 1)


def test_the_messages_of_the_measurement_are_not_counted(measurements: list[int]) -> None:
    with engines((0, 1, 2)) as (_, made):
        done = [start(e, [summing(LONG, 0.0), summing(LONG, 0.0)]) for e in made]
        results = [[q.get(timeout=30.0) for q in queues] for queues in done]
    assert measurements
    for of_rank in zip(*results, strict=True):
        assert max(sent for _, _, sent in of_rank) == pytest.approx(
            dense_allreduce_bytes(LONG, 3, ValueCodec.FP32, link=of_rank[0][1]), abs=64
        )


def test_each_group_between_hosts_measures_its_own_link(measurements: list[int]) -> None:
    with engines((0, 0, 1)) as (_, made):
        first = [start(made[r], [summing(LONG, 0.0)], group=(0, 1))[0] for r in (0, 1)]
        assert all(q.get(timeout=30.0)[1] is None for q in first), "one host"
        assert not measurements
        second = [start(made[r], [summing(LONG, 0.0)], group=(2, 1))[0] for r in (1, 2)]
        links = [q.get(timeout=30.0)[1] for q in second]
        assert links[0] == links[1]
        assert links[0] is not None
        third = [start(e, [summing(LONG, 0.0)])[0] for e in made]
        assert len({q.get(timeout=30.0)[1] for q in third}) == 1
    assert sorted(measurements) == [0, 0, 1, 1, 2], "ranks within their groups"


def test_auto_takes_the_link_that_a_sum_has_measured(measurements: list[int]) -> None:
    def choosing(channel: Channel) -> CollectiveSteps[Any]:
        return measure(channel, 7, TopK(0.01), 0.01, Arena())

    with engines((0, 1)) as (_, made):
        done = [start(e, [summing(LONG, 0.0), choosing]) for e in made]
        results = [[q.get(timeout=60.0) for q in queues] for queues in done]
    for (_, found, _), costs in results:
        assert (costs.alpha, costs.beta) == (found.alpha, found.beta)
    assert sorted(measurements) == [0, 1]


def test_a_link_that_was_given_is_not_measured(measurements: list[int]) -> None:
    with engines((0, 1), of=SLOW) as (_, made):
        done = [start(e, [summing(LONG, 0.0)])[0] for e in made]
        assert [q.get(timeout=30.0)[1] for q in done] == [SLOW, SLOW]
    assert not measurements


def test_an_error_during_the_measurement_fails_everything_and_hangs_nobody(measurements: list[int]) -> None:
    with engines((0, 1, 2), timeout=2.0) as (world, made):

        def shorten(source: int, dest: int, message: torch.Tensor) -> torch.Tensor:
            return message[:-1] if message.numel() == 1 << 15 and source == 1 else message

        world.tamper = shorten
        done = [start(e, [summing(LONG, 0.0), summing(LONG, 0.0)]) for e in made]
        results = [[q.get(timeout=30.0) for q in queues] for queues in done]
        assert measurements
        assert all(isinstance(outcome, SparseCommError) for rank in results for outcome in rank)
        assert "expected 32768 bytes" in str(results[2][0])
        assert "communication failed before" in str(results[2][1])
        (later,) = start(made[2], [summing(LONG, 0.0)])
        assert "communication failed before" in str(later.get(timeout=30.0))
