"""The engine's inbox: order, who is woken, and what patience costs at most."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecomm.transport import Engine, SoloTransport, Task
from sparsecomm.transport.base import Channel, CollectiveSteps
from sparsecomm.transport.inbox import Inbox

LONG = 5.0


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 40))
def test_everything_comes_out_once_and_in_order(patience: list[bool], cut: int) -> None:
    inbox: Inbox[int] = Inbox()
    taken = []
    for number, patient in enumerate(patience):
        inbox.put(number, patient=patient)
        if number == cut:
            taken += inbox.take(0.0)
    taken += inbox.take(0.0)
    assert taken == list(range(len(patience)))


def test_nothing_is_lost_between_threads() -> None:
    """A sender that pauses now and then, so that the reader goes to sleep at every possible moment."""
    inbox: Inbox[int] = Inbox()
    taken: list[int] = []

    def read() -> None:
        while len(taken) < 3000:
            taken.extend(inbox.take(None))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for number in range(3000):
        inbox.put(number, patient=number % 3 > 0)
        if number % 50 == 0:
            time.sleep(1e-4)
    reader.join(LONG)
    assert not reader.is_alive(), "asleep with items there"
    assert taken == list(range(3000))


@pytest.mark.parametrize("patient", [False, True], ids=["urgent", "patient"])
def test_only_what_is_urgent_ends_a_sleep_with_a_limit(patient: bool) -> None:
    inbox: Inbox[str] = Inbox()
    threading.Timer(0.05, lambda: inbox.put("x", patient=patient)).start()
    began = time.monotonic()
    assert inbox.take(0.5) == ["x"]
    assert (time.monotonic() - began > 0.4) == patient


@pytest.mark.parametrize(
    ("gap", "many", "busy"), [(1e-6, 3, True), (4e-4, 100, True), (4e-4, 140, False), (6e-4, 100, True), (0.0, 1, True)]
)
def test_a_sender_is_busy_until_it_pauses_but_not_for_ever(
    gap: float, many: int, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items that come 0.4 ms apart are of one go, which is waited for no longer than 50 ms."""
    now = 100.0
    monkeypatch.setattr("sparsecomm.transport.inbox.time.monotonic", lambda: now)
    inbox: Inbox[int] = Inbox()
    assert not inbox.busy()
    for _ in range(many):
        now += gap
        inbox.put(1, patient=True)
    assert inbox.busy() == busy
    now += 6e-4
    assert not inbox.busy()


def finished(engine: Engine, patient: list[bool]) -> tuple[list[int], list[int]]:
    """In which order collectives started, and were reported, that nobody else takes part in."""
    started: list[int] = []
    reported: list[int] = []
    done = threading.Event()

    def make(number: int):  # type: ignore[no-untyped-def]
        def steps(channel: Channel) -> CollectiveSteps[int]:
            started.append(number)
            yield []
            return number

        return steps

    def report(number: int) -> None:
        reported.append(number)
        if len(reported) == len(patient):
            done.set()

    for number, waits in enumerate(patient):
        engine.submit(Task(f"c{number}", make(number), report, lambda e: None, key=number % 7, patient=waits))
    assert done.wait(LONG), f"started {started}, reported {reported}"
    return started, reported


@pytest.mark.parametrize(
    "patient",
    [[True], [True] * 200, [True] * 50 + [False], [False] + [True] * 50, [n % 5 > 0 for n in range(200)]],
    ids=["one", "all", "last urgent", "first urgent", "mixed"],
)
def test_the_engine_starts_in_order_and_reports_all(patient: list[bool]) -> None:
    """Each key is used by many, so what waits for the one before it must not wait for ever."""
    engine = Engine(SoloTransport())
    try:
        for _ in range(5):
            started, reported = finished(engine, patient)
            assert started == sorted(started)
            assert sorted(reported) == list(range(len(patient)))
            for key in range(7):
                assert [n for n in reported if n % 7 == key] == list(range(key, len(patient), 7))
    finally:
        assert engine.close()


def test_an_urgent_result_is_not_kept_for_a_patient_one_behind_it() -> None:
    """While another collective moves in every turn, so that there is always something else to do."""
    engine = Engine(SoloTransport())
    turns, ended, reported = 0, -1, -1
    told = threading.Event()

    def spin(channel: Channel) -> CollectiveSteps[None]:
        nonlocal turns
        while not told.is_set() and turns < 10**6:
            turns += 1
            yield []

    def urgent(channel: Channel) -> CollectiveSteps[None]:
        nonlocal ended
        yield []
        ended = turns

    def patient(channel: Channel) -> CollectiveSteps[None]:
        yield []

    def report(_: None) -> None:
        nonlocal reported
        reported = turns
        told.set()

    try:
        engine.submit(Task("spin", spin, lambda _: None, lambda e: None))
        engine.submit(Task("patient", patient, lambda _: None, lambda e: None, patient=True))
        engine.submit(Task("urgent", urgent, report, lambda e: None))
        engine.submit(Task("patient behind", patient, lambda _: None, lambda e: None, patient=True))
        assert told.wait(LONG)
        assert reported - ended <= 1
    finally:
        told.set()
        assert engine.close()
