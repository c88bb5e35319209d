"""No message of a joiner ends, stalls or fills a server. test_ps_hostile.py invents such messages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated_job import Flat, SimulatedJob, sgd

import sparsecomm as sc
from sparsecomm.errors import TransportError
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.server.events import Events
from sparsecomm.ps.server.server import Server
from sparsecomm.ps.server.shard import UpdateFailed
from sparsecomm.ps.worker.link import Link, Steps

NUMEL = 60
MODES = [sc.ps.Synchronous(), sc.ps.StaleSynchronous(1), sc.ps.Asynchronous()]


def training(link: Link, steps: int = 4) -> Steps[sc.ps.Worker]:
    model = Flat(NUMEL)
    worker = sc.ps.Worker(model, sc.Dense(), link=link)
    yield from worker.connecting()
    for _ in range(worker.clock, steps):
        model.weight.grad = torch.ones(NUMEL, dtype=torch.float32)
        yield from worker.stepping()
    yield from worker.leaving()
    return worker


class Guest:
    """A job of one worker and one server, and a guest that holds the token and sends messages made by hand."""

    def __init__(self, mode: sc.ps.Mode | None = None, *, joined: bool = True, workers: int = 1) -> None:
        self.job = SimulatedJob(workers, 1, joiners=1, optimizer=sgd, mode=mode or sc.ps.Synchronous())
        self.rank, self.server_rank = workers + 1, workers
        self.mailbox = self.job.mailboxes.by_rank[self.rank]
        self.server: Server = self.job.servers[0]
        self.tasks = [training(link) for link in self.job.links[:workers]]
        for _ in range(6):
            for task in self.tasks:
                next(task)
            self.job.serve()
        if joined:
            self.say(Kind.JOIN, clock=self.shard.offer + 1)

    @property
    def shard(self) -> Any:
        return self.server.shards[0]

    def say(self, kind: Kind, body: torch.Tensor = ms.NOTHING, **fields: Any) -> list[tuple[Kind, str]]:
        """Sends a message; returns kinds and texts of all answers."""
        self.mailbox.send(self.server_rank, ms.pack(Envelope(kind, 0, self.rank, **fields), body))
        self.job.serve()
        found = []
        while (arrived := self.mailbox.receive()) is not None:
            envelope, said = ms.unpack(arrived[1], self.server_rank)
            found.append((envelope.kind, ms.read_text(said)))
        return found

    def leave(self) -> None:
        self.say(Kind.BYE)
        for task in self.tasks:
            for _ in range(50):
                next(task, None)
                self.job.serve()
        assert self.server.finished


def refused(answers: list[tuple[Kind, str]], text: str) -> None:
    assert [kind for kind, _ in answers] == [Kind.REJECT]
    assert text in answers[0][1]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("ahead", [(1 << 16) + 1, 1 << 40, 1 << 48])
def test_a_first_clock_that_lies_too_far_ahead(mode: sc.ps.Mode, ahead: int) -> None:
    """A server went through all rounds up to that clock, one by one, once the others had left."""
    guest = Guest(mode, joined=False)
    refused(guest.say(Kind.JOIN, clock=ahead + guest.shard.offer if ahead < 1 << 48 else ahead), "may begin at")
    guest.leave()


def test_rounds_up_to_a_late_one_close_at_once() -> None:
    guest = Guest(joined=False)
    guest.say(Kind.JOIN, clock=guest.shard.offer + (1 << 16))
    began = time.monotonic()
    guest.leave()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("field", ["clock", "version", "seq"])
@pytest.mark.parametrize("kind", [Kind.PUSH, Kind.PULL, Kind.JOIN, Kind.PING, Kind.COMMIT])
def test_numbers_are_bounded_when_they_are_read(kind: Kind, field: str) -> None:
    guest = Guest()
    for value in ((1 << 48) + 1, (1 << 63) - 1, -1):
        refused(guest.say(kind, **{field: value}), "clock, version, seq")
    guest.leave()


@pytest.mark.parametrize("kind", [Kind.PULL, Kind.STATS, Kind.JOIN, Kind.COMMIT, Kind.PING, Kind.LATE])
def test_bodies_where_there_are_none(kind: Kind) -> None:
    guest = Guest()
    refused(guest.say(kind, torch.zeros(1, dtype=torch.uint8)), f"{kind.name} has at most 0 here")
    guest.leave()


@pytest.mark.parametrize("kind", [Kind.PUSH, Kind.INIT, Kind.BYE, Kind.HELLO])
def test_bodies_longer_than_any_good_one(kind: Kind) -> None:
    guest = Guest()
    refused(guest.say(kind, torch.zeros(5000, dtype=torch.uint8)), "body_bytes = 5000")
    guest.leave()


def test_a_stranger_gets_no_copy_of_a_shard() -> None:
    """Each copy had stayed for ever."""
    guest = Guest(joined=False)
    for kind in (Kind.PULL, Kind.PUSH, Kind.INIT):
        refused(guest.say(kind), "not a worker of this job")
    assert guest.shard._views == {}
    guest.leave()


def test_a_joiner_cannot_keep_windows_closed() -> None:
    guest = Guest()
    refused(guest.say(Kind.PING, flags=ms.READY), "a worker that joined has no window")
    assert guest.server.ready_workers == set()
    guest.leave()


def test_pushes_far_ahead_of_the_others() -> None:
    guest = Guest()
    model = Flat(NUMEL)
    worker = sc.ps.Worker(model, sc.Dense(), link=guest.job.links[1])
    part, first = worker._parts[0], guest.shard.clocks[guest.rank]
    for clock in range(first, first + 32):
        payload, _ = part.encode(part.take(torch.ones(NUMEL, dtype=torch.float32), clock), clock)
        assert guest.say(Kind.PUSH, payload, clock=clock)[0][0] == Kind.ACK
    payload, _ = part.encode(part.take(torch.ones(NUMEL, dtype=torch.float32), first + 32), first + 32)
    refused(guest.say(Kind.PUSH, payload, clock=first + 32), "32 pushes of this worker wait for others in open rounds")
    guest.leave()


def test_greetings_before_there_is_anything_to_join() -> None:
    job = SimulatedJob(1, 1, joiners=3, optimizer=sgd)
    server = job.servers[0]
    big = torch.zeros(1 << 24, dtype=torch.uint8)
    for _ in range(3):
        for rank in (2, 3, 4):
            job.mailboxes.by_rank[rank].send(1, ms.pack(Envelope(Kind.HELLO, 0, rank), big))
        job.serve()
    assert len(server._waiting.take()) == 3, "one of each sender"
    for rank in (2, 3, 4):
        for _ in range(2):
            job.mailboxes.by_rank[rank].send(1, ms.pack(Envelope(Kind.HELLO, 0, rank), torch.cat((big, big[:8000]))))
        job.serve()
    assert sum(entry.message.numel() for entry in server._waiting.take()) <= 1 << 26


@pytest.mark.parametrize(
    "model",
    [
        [["w", [10**4000] * 3]],
        [["w", [2] * 65]],
        [["w", [2**32 + 1, 0]]],
        [["w", [1]], ["w", [1]]],
        [["w", [1]]] * 3,
    ],
    ids=["huge", "dimensions", "size", "twice", "thrice"],
)
def test_dimensions_are_bounded_when_they_are_read(model: Any) -> None:
    job = SimulatedJob(1, 1, optimizer=sgd)
    said = {"model": model, "values": "", "shards": 1, "mode": str(job.rules.mode)}
    job.mailboxes.by_rank[0].send(1, ms.pack(Envelope(Kind.HELLO, 0, 0), ms.json_body(said)))
    began = time.monotonic()
    job.serve()
    assert time.monotonic() - began < 1
    arrived = job.mailboxes.by_rank[0].receive()
    assert arrived is not None
    assert ms.unpack(arrived[1], 1)[0].kind == Kind.REJECT
    assert job.servers[0].shards == {}


def test_nested_json() -> None:
    job = SimulatedJob(1, 1, optimizer=sgd)
    for data in (b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b'"\\ud800"', b"\xff\xfe", b"NaN"):
        body = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        job.mailboxes.by_rank[0].send(1, ms.pack(Envelope(Kind.HELLO, 0, 0), body))
        job.serve()
    assert job.servers[0].rejected == {0: 6}


def test_whatever_handling_raises_is_a_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest()
    for error in (ValueError("x"), KeyError(3), MemoryError(), RecursionError("deep"), ZeroDivisionError()):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setitem(guest.server._handlers, Kind.STATS, fail)
        refused(guest.say(Kind.STATS), f"{type(error).__name__}: {error}")
    guest.leave()


def test_an_optimizer_factory_that_fails_is_a_rejection() -> None:
    def fail(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        raise KeyError(parameters[0].ps_name)  # type: ignore[attr-defined]

    job = SimulatedJob(1, 1, optimizer=fail)
    (error,) = job.run([training(job.links[0])])
    assert isinstance(error, sc.RemoteError)
    assert "KeyError: 'weight'" in str(error)


@pytest.mark.parametrize("culprit", ["optimizer", "rate"])
def test_an_optimizer_that_fails_ends_the_server_and_is_named(culprit: str) -> None:
    """The update is half done, so the server must not go on."""

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise ZeroDivisionError("no step")

    def rate(version: int) -> float:
        raise ZeroDivisionError("no rate")

    options: dict[str, Any] = {"optimizer": sgd, "rate": rate} if culprit == "rate" else {"optimizer": Failing}
    job = SimulatedJob(1, 1, **options)
    with pytest.raises(UpdateFailed, match=r"update 1 of shard 0 failed in the optimizer or in rate=: Zero.*: no"):
        job.run([training(job.links[0])])


def test_a_message_between_servers_that_cannot_be_handled_is_an_error() -> None:
    """The owner had waited for ever for the copy to store it."""
    job = SimulatedJob(1, 2, optimizer=sgd)

    def damage(source: int, dest: int, message: torch.Tensor) -> torch.Tensor:
        if source == 1 and dest == 2 and int(message[5]) == Kind.EVENT:
            message[-1] ^= 1
        return message

    job.mailboxes.tamper = damage
    with pytest.raises(TransportError, match="a message of server rank 1 cannot be handled"):
        job.run([training(job.links[0])])


# --- floods ---


def test_a_flood_does_not_keep_a_server_from_its_work() -> None:
    guest = Guest()
    endless = ms.pack(Envelope(Kind.STATS, 0, guest.rank))
    inner = guest.server.mailbox.receive
    guest.server.mailbox.receive = lambda: inner() or (guest.rank, endless)  # type: ignore[method-assign]
    guest.job.mailboxes.kill(0)
    guest.server.turn()
    assert guest.shard.gone == {0: "died"}


@pytest.mark.parametrize(
    "send",
    [
        lambda guest: guest.say(Kind.STATS),
        lambda guest: guest.say(Kind.PING),
        lambda guest: guest.say(Kind.PUSH),
        lambda guest: guest.say(Kind.VALUES),
    ],
)
def test_messages_of_strangers_do_not_count_as_progress(send: Callable[[Guest], object]) -> None:
    """A server that hears nothing else must still end at its timeout."""
    guest = Guest(joined=False)
    seen = []
    turn = guest.server.turn
    guest.server.turn = lambda: seen.append(turn()) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    guest.job.serve()
    del seen[:]
    send(guest)
    assert seen == [False]
    guest.say(Kind.JOIN, clock=guest.shard.offer + 1)
    assert seen[-1] is True


def test_events_are_few_and_short() -> None:
    events = Events()
    for i in range(5000):
        events.refuse(i % 3, "x" * 10_000)
    assert events.refused == {0: 1667, 1: 1667, 2: 1666}
    assert len(events) == 101
    assert "further ones are counted" in events[-1]
    assert max(map(len, events)) < 1100
    printed = events.total
    for i in range(3000):
        events.append(f"event {i} \x1b[31m\x00")
    assert len(events) == 1000
    assert events[-1] == "event 2999 ?[31m?"
    assert events.since(printed + 2990) == [f"event {i} ?[31m?" for i in range(2990, 3000)]
    assert len(events.since(0)) == 1000
    assert events.since(events.total) == []
    json.dumps(events)


def test_refused_messages_are_bounded_in_a_job() -> None:
    guest = Guest()
    for _ in range(300):
        guest.say(Kind.PUSH, torch.zeros(100, dtype=torch.uint8))
    assert guest.server.rejected == {guest.rank: 300}
    assert sum("refused a message" in event for event in guest.server.events) == 100
    guest.leave()
