"""The engine: order, many collectives in flight, timeouts, and what a failure does to everything else."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Cluster, gradient, plan, same_bits

from sparsecomm.collectives import allgather
from sparsecomm.errors import CommTimeout, ConfigError, TransportError
from sparsecomm.exchange import exchange
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import (
    AgreedError,
    Channel,
    CollectiveSteps,
    Engine,
    Request,
    SimulatedWorld,
    SoloTransport,
    Task,
)

BROKEN = "communication failed before"


def at_once(value: Any) -> Callable[[Channel], CollectiveSteps[Any]]:
    """A collective that needs nobody."""

    def steps(channel: Channel) -> CollectiveSteps[Any]:
        yield []
        return value

    return steps


def failing(error: BaseException) -> Callable[[Channel], CollectiveSteps[Any]]:
    def steps(channel: Channel) -> CollectiveSteps[Any]:
        yield []
        raise error

    return steps


def gather_ranks(channel: Channel) -> CollectiveSteps[list[int]]:
    mine = torch.tensor([channel.rank], dtype=torch.uint8)
    blocks = yield from allgather(channel, mine, Arena(), 0)
    return [int(b) for b in blocks]


class Outcomes:
    """Collects what the callbacks of an engine are given."""

    def __init__(self) -> None:
        self.by_label: dict[str, Any] = {}
        self.order: list[str] = []
        self._changed = threading.Condition()

    def callbacks(self, label: str) -> tuple[Callable[[Any], None], Callable[[BaseException], None]]:
        def note(what: Any) -> None:
            with self._changed:
                assert label not in self.by_label, "one callback, once"
                self.by_label[label] = what
                self.order.append(label)
                self._changed.notify_all()

        return note, note

    def submit(self, engine: Engine, label: str, make: Callable[[Channel], CollectiveSteps[Any]], **kw: Any) -> None:
        engine.submit(Task(label, make, *self.callbacks(label), **kw))

    def wait(self, count: int, seconds: float = 20.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.order) >= count, seconds), f"only {self.order} came back"


class Engines:
    """One engine a simulated rank, each with its own thread."""

    def __init__(self, size: int, timeout: float = 20.0) -> None:
        self.world = SimulatedWorld(size)
        self.all = [Engine(t, timeout=timeout) for t in self.world.ranks]

    def __enter__(self) -> list[Engine]:
        return self.all

    def __exit__(self, *exc: object) -> None:
        for engine in self.all:
            assert engine.close(20.0), "an engine did not finish"


@pytest.fixture
def solo() -> Any:
    engine = Engine(SoloTransport(), timeout=20.0)
    yield engine
    assert engine.close()


def test_call_returns_the_result_and_raises_the_error(solo: Engine) -> None:
    assert solo.call("a", at_once(5)) == 5
    with pytest.raises(ZeroDivisionError):
        solo.call("b", failing(AgreedError(ZeroDivisionError("x"))))
    assert solo.call("c", at_once(6)) == 6


def test_collectives_start_in_the_order_of_submission(solo: Engine) -> None:
    started: list[int] = []

    def make(number: int) -> Callable[[Channel], CollectiveSteps[None]]:
        def steps(channel: Channel) -> CollectiveSteps[None]:
            started.append(number)
            yield []

        return steps

    outcomes = Outcomes()
    for number in range(200):
        outcomes.submit(solo, str(number), make(number))
    outcomes.wait(200)
    assert started == list(range(200))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_many_collectives_are_in_flight_and_none_mixes_with_another(size: int) -> None:
    with Engines(size) as engines:
        outcomes = [Outcomes() for _ in range(size)]
        for rank, engine in enumerate(engines):
            for number in range(60):
                outcomes[rank].submit(engine, str(number), gather_ranks)
        for each in outcomes:
            each.wait(60)
            assert all(v == list(range(size)) for v in each.by_label.values())


def test_a_late_rank_does_not_stop_the_others_from_starting_the_next_collectives() -> None:
    """Rank 0 has two in flight: the first waits for rank 1, the second does not and overtakes it."""
    with Engines(2) as engines:
        outcomes = Outcomes()
        outcomes.submit(engines[0], "waits", gather_ranks)
        outcomes.submit(engines[0], "free", at_once(1))
        outcomes.wait(1)
        assert outcomes.order == ["free"]
        assert engines[1].call("waits", gather_ranks) == [0, 1]
        outcomes.wait(2)
        assert outcomes.by_label["waits"] == [0, 1]


def test_groups_may_be_submitted_in_different_orders_on_different_ranks() -> None:
    """Only within a group must the order agree, however many collectives are queued."""
    many = 200
    with Engines(2) as engines:
        outcomes = [Outcomes(), Outcomes()]
        for rank, groups in enumerate([((0, 1), None), (None, (0, 1))]):
            for group in groups:
                for number in range(many):
                    outcomes[rank].submit(engines[rank], f"{group} {number}", gather_ranks, group=group)
        for each in outcomes:
            each.wait(2 * many)
            assert all(v == [0, 1] for v in each.by_label.values()), each.by_label


def test_a_group_numbers_its_ranks_and_leaves_the_others_alone() -> None:
    with Engines(3) as engines:
        outcomes = [Outcomes() for _ in range(3)]
        for rank in (0, 2):
            outcomes[rank].submit(engines[rank], "pair", gather_ranks, group=(0, 2))
        for rank in (0, 2):
            outcomes[rank].wait(1)
            assert outcomes[rank].by_label["pair"] == [0, 1]
        for rank in range(3):
            outcomes[rank].submit(engines[rank], "all", gather_ranks)
        for rank in range(3):
            outcomes[rank].wait(2 if rank != 1 else 1)
            assert outcomes[rank].by_label["all"] == [0, 1, 2]


@pytest.mark.parametrize("group", [(1, 2), (0, 0), (0, 9)])
def test_a_group_that_makes_no_sense_is_an_error_not_a_hang(group: tuple[int, ...]) -> None:
    with Engines(3) as engines:
        outcomes = Outcomes()
        outcomes.submit(engines[0], "bad", gather_ranks, group=group)
        outcomes.wait(1)
        assert isinstance(outcomes.by_label["bad"], TransportError)


def test_a_timeout_says_who_waited_in_what_for_whom() -> None:
    with Engines(3, timeout=0.3) as engines:
        with pytest.raises(CommTimeout) as caught:
            engines[1].call("bucket 7 of step 3", gather_ranks)
        text = str(caught.value)
        for part in ("rank 1", "bucket 7 of step 3", "0.3 s", "receive of 1 bytes from rank 2", "SPARSECOMM_TIMEOUT"):
            assert part in text, text


def test_the_timeout_counts_from_the_start_of_each_collective() -> None:
    with Engines(2, timeout=1.0) as engines:
        for _ in range(4):
            outcomes = Outcomes()
            outcomes.submit(engines[0], "x", gather_ranks)
            time.sleep(0.4)
            assert engines[1].call("x", gather_ranks) == [0, 1]
            outcomes.wait(1)
            assert outcomes.by_label["x"] == [0, 1]


def test_an_agreed_failure_leaves_others_in_flight_and_the_engine_usable() -> None:
    with Engines(2) as engines:
        outcomes = Outcomes()
        outcomes.submit(engines[0], "in flight", gather_ranks)
        with pytest.raises(KeyError):
            engines[0].call("agreed", failing(AgreedError(KeyError("k"))))
        assert engines[1].call("in flight", gather_ranks) == [0, 1]
        outcomes.wait(1)
        assert outcomes.by_label["in flight"] == [0, 1]
        assert engines[0].call("later", at_once(3)) == 3


@pytest.mark.parametrize(
    "broken_by",
    [failing(OSError("cable cut")), failing(KeyboardInterrupt("cable cut")), lambda channel: 1 / 0],
    ids=["error", "interrupt", "make"],
)
def test_any_other_failure_fails_everything_in_flight_and_everything_later(broken_by: Any) -> None:
    with Engines(2) as engines:
        outcomes = Outcomes()
        outcomes.submit(engines[0], "before", gather_ranks)
        outcomes.submit(engines[0], "broken", broken_by)
        outcomes.submit(engines[0], "queued", gather_ranks)
        outcomes.wait(3)
        outcomes.submit(engines[0], "after", at_once(1))
        outcomes.wait(4)
        cause = outcomes.by_label["broken"]
        assert not isinstance(cause, TransportError)
        for label in ("before", "queued", "after"):
            error = outcomes.by_label[label]
            assert isinstance(error, TransportError)
            assert BROKEN in str(error)
            assert str(error).startswith(label)
            assert error.__cause__ is cause


class FailingRequest:
    peer = 1

    def test(self) -> bool:
        raise TransportError("receive of 4 bytes from rank 1 failed: truncated")

    def describe(self) -> str:
        return "receive of 4 bytes from rank 1"

    def cancel(self) -> None:
        pass


def test_a_failure_of_a_domain_leaves_the_others_alone(solo: Engine) -> None:
    ended: list[Any] = []
    released = threading.Event()

    def held(channel: Channel) -> CollectiveSteps[str]:
        while not released.is_set():
            yield []
        return "held"

    for domain in (7, 8, 0):
        name = f"held {domain}"
        solo.submit(Task(name, held, ended.append, lambda e: ended.append(str(e)), domain=domain))
    failed: list[BaseException] = []
    solo.submit(Task("bad", failing(RuntimeError("no")), ended.append, failed.append, domain=7))
    solo.submit(Task("late", at_once(1), ended.append, lambda e: ended.append(str(e)), domain=7))
    assert solo.call("other", at_once("still here")) == "still here"
    assert len(ended) == 2
    released.set()
    assert solo.close()
    assert [str(e) for e in failed] == ["no"]
    assert ended == [
        "held 7: not exchanged, communication failed before: no",
        "late: not exchanged, communication failed before: no",
        "held",
        "held",
    ]
    assert solo.breakage.latest is failed[0]


def test_a_request_that_fails_is_the_error_of_its_collective(solo: Engine) -> None:
    def steps(channel: Channel) -> CollectiveSteps[None]:
        requests: list[Request] = [FailingRequest()]
        yield requests

    with pytest.raises(TransportError, match="from rank 1 failed: truncated"):
        solo.call("x", steps)


def test_a_failed_collective_is_closed_so_that_it_can_undo_what_it_did() -> None:
    undone: list[str] = []

    def steps(channel: Channel) -> CollectiveSteps[None]:
        try:
            yield [channel.irecv(torch.empty(1, dtype=torch.uint8), 1)]
        except BaseException as error:
            undone.append(type(error).__name__)
            raise

    with Engines(2, timeout=0.2) as engines, pytest.raises(CommTimeout):
        engines[0].call("x", steps)
    assert undone == ["GeneratorExit"]


def test_a_collective_that_fails_to_undo_does_not_stop_the_engine() -> None:
    def steps(channel: Channel) -> CollectiveSteps[None]:
        try:
            yield [channel.irecv(torch.empty(1, dtype=torch.uint8), 1)]
        finally:
            raise RuntimeError("cannot undo")

    with Engines(2, timeout=0.2) as engines:
        outcomes = Outcomes()
        outcomes.submit(engines[0], "x", steps)
        outcomes.submit(engines[0], "y", gather_ranks)
        outcomes.wait(2, 5.0)
        assert isinstance(outcomes.by_label["x"], BaseException)
        with pytest.raises(TransportError):
            engines[0].call("z", at_once(1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("which", ["on_done", "on_error"])
def test_a_callback_that_raises_does_not_silence_the_engine(which: str) -> None:
    """Everything later must still come back, with a result or an error: a dead thread would mean a hang."""

    def explode(what: Any) -> None:
        raise ValueError("a bug in a callback")

    engine = Engine(SoloTransport(), timeout=5.0)
    steps = at_once(1) if which == "on_done" else failing(AgreedError(KeyError("k")))
    engine.submit(Task("x", steps, explode, explode))
    outcomes = Outcomes()
    outcomes.submit(engine, "later", at_once(2))
    outcomes.wait(1, 5.0)
    assert engine.close()


def test_closing_waits_for_what_is_in_flight_and_is_idempotent() -> None:
    engines = Engines(2).all
    outcomes = Outcomes()
    outcomes.submit(engines[0], "x", gather_ranks)
    assert not engines[0].close(0.1)
    with pytest.raises(TransportError, match=r"late.*submitted after the engine of rank 0 was closed"):
        engines[0].call("late", at_once(1))
    assert engines[1].call("x", gather_ranks) == [0, 1]
    assert engines[0].close(20.0)
    assert engines[0].close()
    assert engines[1].close()
    assert outcomes.by_label["x"] == [0, 1]


def test_closing_runs_what_was_queued_before() -> None:
    engine = Engine(SoloTransport(), timeout=20.0)
    outcomes = Outcomes()
    for number in range(300):
        outcomes.submit(engine, str(number), at_once(number))
    assert engine.close(20.0)
    assert list(outcomes.by_label.values()) == list(range(300))


def test_the_transport_is_closed_by_the_engines_own_thread() -> None:
    closed_by: list[str] = []

    class Noting(SoloTransport):
        def close(self) -> None:
            closed_by.append(threading.current_thread().name)

    engine = Engine(Noting())
    engine.close()
    assert closed_by == ["sparsecomm-engine"]


def test_a_forked_child_is_refused_with_both_process_ids(solo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.getpid()
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: own + 1)
        with pytest.raises(TransportError, match=rf"process {own + 1} was forked from rank 0 \(process {own}\)"):
            solo.call("x", at_once(1))
        assert solo.close(), "a child has nothing to wait for"
    assert solo.call("x", at_once(1)) == 1


@pytest.mark.parametrize("bad", [0, -1.0, float("nan")])
def test_a_bad_timeout_is_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="timeout"):
        Engine(SoloTransport(), timeout=bad)


def test_an_idle_engine_sleeps() -> None:
    engine = Engine(SoloTransport())
    time.sleep(0.05)
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.1
    engine.close()


@pytest.mark.parametrize("size", [2, 3])
def test_buckets_exchanged_concurrently_equal_those_exchanged_one_by_one(size: int) -> None:
    numel, buckets = 500, 8
    expected, clusters, grads = [], [], []
    for b in range(buckets):
        one_by_one = Cluster(size, numel, bucket=b)
        reference = [gradient("normal", numel, torch.float32, 10 * b + r) for r in range(size)]
        one_by_one.step(reference, plan(numel))
        expected.append(reference[0])
        clusters.append(Cluster(size, numel, bucket=b))
        grads.append([gradient("normal", numel, torch.float32, 10 * b + r) for r in range(size)])
    arenas = [Arena() for _ in range(size)]
    with Engines(size) as engines:
        outcomes = [Outcomes() for _ in range(size)]
        for r, engine in enumerate(engines):
            for b in range(buckets):

                def make(channel: Channel, r: int = r, b: int = b) -> CollectiveSteps[Any]:
                    return exchange(channel, clusters[b].buckets[r], grads[b][r], plan(numel), arenas[r])

                outcomes[r].submit(engine, f"bucket {b}", make)
        for each in outcomes:
            each.wait(buckets)
    for b in range(buckets):
        assert all(same_bits(g, expected[b]) for g in grads[b])
