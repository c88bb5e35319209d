"""Notes of ranks, and the errors that ranks make of them: who has left, and who is really late."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecomm.errors import CommTimeout, RankLeft, WireError
from sparsecomm.transport import Channel, CollectiveSteps, Engine, SimulatedWorld
from sparsecomm.transport.notes import NOTE_BYTES, Note, NoteKind, late_ranks, listed

KINDS = st.sampled_from(list(NoteKind))
RANKS = st.integers(0, 2**31)
LONG = st.characters(min_codepoint=0x10000)
"""Characters that take 12 bytes in JSON."""


@given(RANKS, KINDS, st.text(max_size=2000) | st.text(LONG, min_size=500, max_size=2000), st.lists(RANKS, max_size=50))
def test_a_note_is_short_and_comes_back(rank: int, kind: NoteKind, text: str, awaits: list[int]) -> None:
    note = Note(rank, kind, text, tuple(awaits))
    data = note.encode()
    assert len(data) <= NOTE_BYTES
    back = Note.decode(data)
    assert (back.rank, back.kind) == (rank, kind)
    assert text.startswith(back.text)
    assert tuple(awaits[: len(back.awaits)]) == back.awaits


@given(st.binary(max_size=200))
def test_bytes_that_are_no_note_are_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="is no note"):
        Note.decode(data)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"rank": 1, "kind": "ended", "text": 3, "awaits": []}',
        '{"rank": "1", "kind": "ended", "text": "", "awaits": []}',
        '{"rank": 1, "kind": "bored", "text": "", "awaits": []}',
        '{"rank": 1, "kind": "ended", "text": "", "awaits": [true]}',
        '{"rank": 1, "kind": "ended", "text": "", "awaits": 5}',
        "[" * 100_000,
    ],
)
def test_json_that_is_no_note_is_refused(text: str) -> None:
    with pytest.raises(WireError, match="is no note"):
        Note.decode(text.encode())


def overdue(rank: int, *awaits: int, label: str = "x") -> Note:
    return Note(rank, NoteKind.OVERDUE, label, awaits)


@pytest.mark.parametrize(
    ("mine", "others", "late"),
    [
        (overdue(0, 1), [], {1}),
        (overdue(0, 1, 2), [overdue(2, 1)], {1}),
        (overdue(0, 3), [overdue(3, 2), overdue(2, 1)], {1}),  # a chain, as in a ring
        (overdue(0, 1), [overdue(1, 0)], set()),  # they wait for each other
        (overdue(0, 1), [overdue(1, 2, label="y")], {1}),  # in another collective
        (overdue(0, 1), [Note(1, NoteKind.ENDED, "x")], {1}),
        (overdue(0), [], set()),
    ],
)
def test_who_is_late(mine: Note, others: list[Note], late: set[int]) -> None:
    assert late_ranks(mine, {note.rank: note for note in others}) == late


def test_many_ranks_are_listed_in_short() -> None:
    assert listed([2]) == "rank 2"
    assert listed({3, 1}) == "ranks 1, 3"
    assert listed(range(40)).endswith("14, 15 and 24 more")


def ring(channel: Channel) -> CollectiveSteps[None]:
    """A token goes once around, so that each rank waits for the rank before it alone."""
    token = torch.zeros(1, dtype=torch.uint8)
    before, after = (channel.rank - 1) % channel.size, (channel.rank + 1) % channel.size
    if channel.rank == 0:
        yield [channel.isend(token, after)]
    yield [channel.irecv(token, before)]
    if channel.rank:
        yield [channel.isend(token, after)]


def errors_of(world: SimulatedWorld, absent: int, note: Note | None, timeout: float) -> dict[int, BaseException]:
    """Runs `ring` on all ranks but one, which may leave a note. Returns the error of each."""
    if note is not None:
        world.ranks[absent].tell(note)
    engines = {r: Engine(t, timeout=timeout) for r, t in enumerate(world.ranks) if r != absent}
    found: dict[int, BaseException] = {}

    def call(rank: int) -> None:
        try:
            engines[rank].call("bucket 3 of step 7", ring)
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=call, args=(rank,)) for rank in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    for engine in engines.values():
        engine.close()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_timeout_names_the_rank_that_is_late_not_those_that_wait_for_it(size: int) -> None:
    found = errors_of(SimulatedWorld(size), absent=1, note=None, timeout=1.0)
    assert len(found) == size - 1
    for rank, error in found.items():
        assert isinstance(error, CommTimeout), error
        assert f"rank {rank}: bucket 3 of step 7 did not finish within 1 s; late: rank 1;" in str(error)


def test_ranks_that_wait_for_each_other_say_so() -> None:
    world = SimulatedWorld(2)
    world.tamper = lambda source, dest, message: None  # every message is lost
    engines = [Engine(t, timeout=0.5) for t in world.ranks]
    errors: list[Any] = []

    def call(engine: Engine) -> None:
        with pytest.raises(CommTimeout) as caught:
            engine.call("x", lambda channel: ring(channel))
        errors.append(str(caught.value))

    threads = [threading.Thread(target=call, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert len(errors) == 2
    assert all("all ranks wait in it, so messages between them are lost" in text for text in errors)
    for engine in engines:
        engine.close()


def test_a_rank_that_failed_fails_all_others_at_once() -> None:
    """Also those that wait for others: the job cannot go on."""
    left = Note(1, NoteKind.FAILED, "it exited with status 3")
    found = errors_of(SimulatedWorld(4), absent=1, note=left, timeout=300.0)
    assert set(found) == {0, 2, 3}
    for error in found.values():
        assert isinstance(error, RankLeft)
        assert error.rank == 1
        assert error.failed
        assert str(error) == "bucket 3 of step 7: rank 1 has left: it exited with status 3"


def test_a_rank_that_ended_fails_only_those_that_wait_for_it() -> None:
    world = SimulatedWorld(2)
    ended = Note(1, NoteKind.ENDED, "it ended normally after bucket 3 of step 6")
    found = errors_of(world, absent=1, note=ended, timeout=300.0)
    assert isinstance(found[0], RankLeft)
    assert not found[0].failed
    assert "it ended normally after bucket 3 of step 6" in str(found[0])
    assert "Join" in str(found[0])
    with Solo(world) as engine:  # of a collective that does not need rank 1
        assert engine.call("alone", lambda channel: at_once()) is None


class Solo:
    """An engine for rank 0 of a world."""

    def __init__(self, world: SimulatedWorld) -> None:
        self._engine = Engine(world.ranks[0], timeout=20.0)

    def __enter__(self) -> Engine:
        return self._engine

    def __exit__(self, *exc: object) -> None:
        assert self._engine.close()


def at_once() -> CollectiveSteps[None]:
    yield []


def test_what_a_rank_sent_before_it_ended_still_counts() -> None:
    world = SimulatedWorld(2)
    first, second = (Engine(t, timeout=20.0) for t in world.ranks)

    def one_way(channel: Channel) -> CollectiveSteps[None]:
        token = torch.zeros(1, dtype=torch.uint8)
        yield [channel.isend(token, 0)] if channel.rank else [channel.irecv(token, 1)]

    second.call("x", one_way)
    assert second.close()
    world.ranks[1].tell(Note(1, NoteKind.ENDED, "it ended normally"))
    first.call("x", one_way)
    assert first.close()


def test_a_rank_that_leaves_tells_the_others_and_fails_what_it_has_in_flight() -> None:
    world = SimulatedWorld(2)
    engine = Engine(world.ranks[0], timeout=300.0)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            engine.call("x", ring)
        except BaseException as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    while not engine.last_label:
        pass
    engine.leave(Note(0, NoteKind.FAILED, "it failed with ValueError"))
    caller.join(10.0)
    assert "rank 0 leaves: it failed with ValueError" in str(errors[0])
    assert world.notes[0].text == "it failed with ValueError"
