"""The parameter server in one process: deaths at every turn, hostile workers, and other models."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_job import Flat, SimulatedJob, sgd

import sparsecomm as sc
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.worker.link import Link, Steps

STEPS, NUMEL = 6, 60
MODES = [sc.ps.Synchronous(), sc.ps.StaleSynchronous(1), sc.ps.Asynchronous()]


def gradient(worker: int, step: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(100 * worker + step), dtype=torch.float32)


def training(link: Link, acknowledged: dict[int, int] | None = None, model: Any = None) -> Steps[torch.Tensor]:
    model = Flat(NUMEL) if model is None else model
    worker = sc.ps.Worker(model, sc.Dense(), link=link)
    try:
        yield from worker.connecting()
        for step in range(STEPS):
            for p in model.parameters():
                p.grad = gradient(worker.rank, step)[: p.numel()]
            yield from worker.stepping()
            if acknowledged is not None:
                acknowledged[worker.rank] = worker.metrics().acknowledged // len(link.servers)
    except Exception as error:  # as `run` does
        with contextlib.suppress(sc.RemoteError):
            yield from worker.leaving(str(error))
        raise
    yield from worker.leaving()
    return torch.cat([p.detach().clone() for p in model.parameters()])


def train_all(job: SimulatedJob, kill: Callable[[int], None]) -> dict[int, int]:
    """Trains on all workers and raises what any of them raised; returns pushes acknowledged, by worker."""
    acknowledged: dict[int, int] = {}
    for result in job.run([training(link, acknowledged) for link in job.links], between=kill):
        if isinstance(result, BaseException):
            raise result
    return acknowledged


def finish(job: SimulatedJob) -> None:
    for _ in range(10):
        job.serve()
    assert all(s.finished for s in job.servers if s.mailbox.rank not in job.mailboxes.dead)


def shards_of(job: SimulatedJob) -> dict[int, Any]:
    """Returns each shard, by index, from its owner, or its copy if the owner died after its work was done."""
    alive = [server for server in job.servers if server.mailbox.rank not in job.mailboxes.dead]
    found: dict[int, Any] = {}
    for server in alive:
        found |= server.copies.shards
    for server in alive:
        found |= server.shards
    return found


def check(job: SimulatedJob, victim: int | None, acknowledged: dict[int, int]) -> None:
    """Checks that every shard holds the pushes that it counts: all of the living, the acknowledged ones of the dead."""
    shards = shards_of(job)
    assert sorted(shards) == list(range(len(job.servers)))
    workers = job.rules.workers
    for shard in shards.values():
        span = slice(shard.spec.start, shard.spec.end)
        counts = {w: shard.tallies[w].pushes for w in workers}
        assert all(n == STEPS for w, n in counts.items() if w != victim)
        assert all(counts[w] >= acknowledged.get(w, 0) for w in workers)
        expected = torch.zeros(NUMEL, dtype=torch.float64)
        for step in range(STEPS):
            pushes = [gradient(w, step).double() for w in workers if step < counts[w]]
            expected += sum(pushes) / (len(pushes) if job.rules.mode.rounds else len(workers))
        assert torch.allclose(-shard.values.double(), expected[span], atol=1e-5)


@pytest.mark.parametrize("lose", [False, True], ids=["delivered", "lost"])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("victim", [0, 2, 3, 4])
def test_one_death_at_every_turn(victim: int, mode: sc.ps.Mode, lose: bool) -> None:
    """Ranks 0 and 1 work, 2 to 4 serve; one dies at each turn of the job."""
    for turn in range(1 + lose, 40, 2):
        job = SimulatedJob(2, 3, optimizer=sgd, mode=mode)

        def kill(now: int, job: SimulatedJob = job, turn: int = turn) -> None:
            if now == turn:
                job.mailboxes.kill(victim, lose=lose)

        acknowledged = train_all(job, kill)
        finish(job)
        check(job, victim if victim < 2 else None, acknowledged)
        if job.turns < turn:
            break


@settings(max_examples=max(120, settings().max_examples))
@given(
    seed=st.integers(0, 2**32),
    workers=st.integers(1, 3),
    servers=st.integers(2, 3),
    mode=st.sampled_from(MODES),
    turn=st.integers(1, 60),
    lose=st.booleans(),
    data=st.data(),
)
def test_one_death_while_messages_and_news_are_late(
    seed: int, workers: int, servers: int, mode: sc.ps.Mode, turn: int, lose: bool, data: st.DataObject
) -> None:
    """Messages and news of deaths arrive in any order that MPI allows."""
    victim = data.draw(st.integers(0 if workers > 1 else 1, workers + servers - 1), "victim")
    job = SimulatedJob(workers, servers, optimizer=sgd, mode=mode)
    job.mailboxes.late = random.Random(seed)

    def kill(now: int) -> None:
        if now == turn:
            job.mailboxes.kill(victim, lose=lose)

    acknowledged = train_all(job, kill)
    job.mailboxes.late = None
    finish(job)
    check(job, victim if victim < workers else None, acknowledged)


@pytest.mark.parametrize("servers", [1, 2, 4])
@pytest.mark.parametrize("workers", range(1, 7))
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_number_of_servers_and_workers(workers: int, servers: int, mode: sc.ps.Mode) -> None:
    """Runs without a death, with a worker's in the middle, and with a server's."""
    for victim in [None, *([0] if workers > 1 else []), *([workers + servers - 1] if servers > 1 else [])]:
        job = SimulatedJob(workers, servers, optimizer=sgd, mode=mode)
        acknowledged: dict[int, int] = {}

        def kill(now: int, job: SimulatedJob = job, victim: int | None = victim) -> None:
            if now == 8 and victim is not None:
                job.mailboxes.kill(victim)

        out = job.run([training(link, acknowledged) for link in job.links], between=kill)
        assert not any(isinstance(result, BaseException) for result in out), out
        finish(job)
        check(job, victim if victim == 0 else None, acknowledged)


def test_two_servers_die_one_after_the_other() -> None:
    for first in range(2, 14, 3):
        for second in range(first + 3, first + 12, 3):
            job = SimulatedJob(2, 3, optimizer=sgd)
            deaths = {first: 2, second: 3}

            def kill(now: int, job: SimulatedJob = job, deaths: dict[int, int] = deaths) -> None:
                if now in deaths:
                    job.mailboxes.kill(deaths[now])

            acknowledged = train_all(job, kill)
            check(job, None, acknowledged)


@settings(max_examples=max(60, settings().max_examples))
@given(
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(MODES),
    turns=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    victims=st.permutations(range(2, 5)),
    lose=st.booleans(),
)
def test_two_servers_die_while_messages_and_news_are_late(
    seed: int, mode: sc.ps.Mode, turns: tuple[int, int], victims: list[int], lose: bool
) -> None:
    """A shard may be lost with its server and its backup. Then the error names it, and nobody goes on with another."""
    job = SimulatedJob(2, 3, optimizer=sgd, mode=mode)
    job.mailboxes.late = random.Random(seed)
    acknowledged: dict[int, int] = {}

    def kill(now: int) -> None:
        for turn, victim in zip(turns, victims, strict=False):
            if now == turn:
                job.mailboxes.kill(victim, lose=lose)

    out = job.run([training(link, acknowledged) for link in job.links], between=kill)
    failed = [result for result in out if isinstance(result, BaseException)]
    for error in failed:
        assert isinstance(error, sc.RemoteError)
        assert "shard" in str(error)
    if not failed:
        job.mailboxes.late = None
        finish(job)
        check(job, None, acknowledged)


def test_all_servers_dead_is_an_error_that_names_the_shard() -> None:
    job = SimulatedJob(1, 2, optimizer=sgd)

    def kill(now: int) -> None:
        if now == 6:
            job.mailboxes.kill(1)
            job.mailboxes.kill(2)

    (error,) = job.run([training(job.links[0])], between=kill)
    assert isinstance(error, sc.RemoteError)
    assert "shard 0 is lost: all servers are dead or have ended (rank 1, 2)" in str(error)


def test_a_shard_without_backup_is_lost_with_its_server() -> None:
    job = SimulatedJob(2, 2, optimizer=sgd, replicate=False)

    def kill(now: int) -> None:
        if now == 8:
            job.mailboxes.kill(2)

    out = job.run([training(link) for link in job.links], between=kill)
    assert any(isinstance(e, sc.RemoteError) and "shard = 0: is lost: its server is dead" in str(e) for e in out)


def test_copies_equal_their_shards_bit_for_bit() -> None:
    job = SimulatedJob(2, 3, optimizer=lambda p: torch.optim.Adam(p, lr=0.1), mode=sc.ps.Asynchronous())
    job.run([training(link) for link in job.links])
    finish(job)
    for server in job.servers:
        assert server.copies.shards
        for index, copy in server.copies.shards.items():
            shard = shards_of(job)[index]
            assert torch.equal(copy.values, shard.values)
            assert (copy.version, copy.gone, vars(copy.tallies[0])) == (
                shard.version,
                shard.gone,
                vars(shard.tallies[0]),
            )
            mine, theirs = (s.optimizer.state_dict()["state"][0]["exp_avg_sq"] for s in (shard, copy))
            assert torch.equal(mine, theirs)


# --- workers that are refused ---


def refused(job: SimulatedJob, tasks: list[Steps[Any]]) -> str:
    errors = [e for e in job.run(tasks) if isinstance(e, BaseException)]
    assert len(errors) == 1
    assert isinstance(errors[0], sc.RemoteError)
    return str(errors[0])


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (lambda: Flat(NUMEL + 1), "parameter 0 is 'weight' (61,), not 'weight' (60,)"),
        (lambda: Flat(NUMEL, name="bias"), "parameter 0 is 'bias' (60,), not 'weight' (60,)"),
        (lambda: torch.nn.Sequential(Flat(NUMEL), Flat(NUMEL)), "parameter 0 is '0.weight' (60,), not 'weight' (60,)"),
        (lambda: Flat(NUMEL, start=1.0), "build the model from the same seed on every worker"),
    ],
)
def test_a_worker_with_another_model_is_refused_and_the_rest_train(other: Callable[[], Any], text: str) -> None:
    job = SimulatedJob(2, 2, optimizer=sgd)

    def wrong(link: Link) -> Steps[None]:
        worker = sc.ps.Worker(other(), sc.Dense(), link=link)
        try:
            yield from worker.connecting()
        except sc.RemoteError as error:
            yield from leave(worker, str(error))
            raise

    message = refused(job, [training(job.links[0]), wrong(job.links[1])])
    assert "worker rank 1" in message
    assert text in message


def leave(worker: sc.ps.Worker, why: str) -> Steps[None]:
    """Leaves, and ignores refusals meanwhile."""
    while True:
        try:
            yield from worker.leaving(why)
            return
        except sc.RemoteError:
            continue


def test_another_mode_is_refused() -> None:
    job = SimulatedJob(1, 1, optimizer=sgd)
    link = Link(job.mailboxes.by_rank[0], (1,), (0,), 2, sc.ps.Asynchronous())
    assert "Asynchronous(), 1 servers" in refused(job, [training(link)])


def test_more_servers_than_elements() -> None:
    job = SimulatedJob(1, 3, optimizer=sgd)
    (error,) = job.run([training(job.links[0], model=Flat(2))])
    assert isinstance(error, sc.ConfigError)
    assert "3 servers for a model of 2 elements" in str(error)


def test_a_model_without_parameters_or_of_another_dtype() -> None:
    link = SimulatedJob(1, 1, optimizer=sgd).links[0]
    with pytest.raises(sc.ConfigError, match="has no trainable parameters"):
        sc.ps.Worker(torch.nn.ReLU(), link=link)
    with pytest.raises(sc.ConfigError, match="float64"):
        sc.ps.Worker(Flat(NUMEL).double(), link=link)
    with pytest.raises(sc.ConfigError, match="cannot be pushed"):
        sc.ps.Worker(Flat(NUMEL), collective="dense", link=link)


def test_a_worker_outside_of_run() -> None:
    with pytest.raises(sc.LaunchError, match=r"sparsecomm\.ps\.run"):
        sc.ps.Worker(Flat(NUMEL))


@pytest.mark.parametrize("bound", [-1, 1.5, True])
def test_a_bad_bound(bound: Any) -> None:
    with pytest.raises(sc.ConfigError, match="bound"):
        sc.ps.StaleSynchronous(bound)


# --- hostile bytes ---


class Hostile:
    """A job of a good worker (rank 0) and one whose messages are made by hand (rank 1)."""

    def __init__(self) -> None:
        self.job = SimulatedJob(2, 1, optimizer=sgd, mode=sc.ps.Asynchronous())
        self.mailbox = self.job.mailboxes.by_rank[1]
        self.task = training(self.job.links[0])
        worker = sc.ps.Worker(Flat(NUMEL), sc.TopK(0.1), link=self.job.links[1])
        self.worker = worker
        self.sent: list[torch.Tensor] = []
        steps = worker.connecting()
        good = iter(self.task)
        for _ in range(20):
            next(good, None)
            next(steps, None)
            self.job.serve()

    def answer(self, message: torch.Tensor) -> tuple[Envelope, str]:
        """Sends bytes and returns the server's answer."""
        self.mailbox.send(2, message)
        self.job.serve()
        arrived = self.mailbox.receive()
        assert arrived is not None, "every message is answered"
        envelope, body = ms.unpack(arrived[1], 2)
        return envelope, ms.read_text(body)

    def still_serves(self) -> None:
        for _ in self.task:
            self.job.serve()
        assert self.job.servers[0].shards[0].tallies[0].pushes == STEPS

    def push(self) -> torch.Tensor:
        """Returns the message of a good push."""
        part = self.worker._parts[0]
        payload, _ = part.encode(part.take(gradient(1, 0), 0), 0)
        return ms.pack(Envelope(Kind.PUSH, 0, 1, clock=0, version=0), payload)


def altered(message: torch.Tensor, **fields: Any) -> torch.Tensor:
    """Returns the same body in another envelope."""
    envelope, body = ms.unpack(message, None)
    kept = {name: getattr(envelope, name) for name in Envelope.__slots__}
    return ms.pack(Envelope(**(kept | fields)), body)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: altered(m, clock=5), "clock = 5: this worker has done 0 pushes"),
        (lambda m: altered(m, version=10**6), "version = 1000000: the shard is at version"),
        (lambda m: altered(m, shard=1), "shard = 1: there are 1"),
        (lambda m: altered(m, shard=2**32 - 1), "shard = 4294967295: at most"),
        (lambda m: altered(m, sender=0), "sender = 0: it came from rank 1"),
        (lambda m: altered(m, kind=Kind.EVENT), "kind = 'EVENT': not for this sender to send"),
        (lambda m: altered(m, kind=Kind.SNAPSHOT), "not for this sender to send"),
        (lambda m: altered(m, kind=Kind.VALUES), "kind = 'VALUES': not for a server"),
        (lambda m: altered(m, kind=Kind.HELLO), "bad payload from rank 1: json"),
        (lambda m: altered(m, kind=Kind.INIT), "nnz = 6: first values are 60"),
        (lambda m: m[:40], "length = 40: an envelope has 56 bytes"),
        (lambda m: m[:0], "length = 0"),
        (lambda m: m[:-1], "body_bytes"),
        (lambda m: ms.pack(ms.unpack(m, None)[0], m[56:-1]), "announces"),
        (lambda m: ms.pack(ms.unpack(m, None)[0]), "a header has 88 bytes"),
    ],
)
def test_a_message_that_does_not_fit_is_refused_by_name(
    change: Callable[[torch.Tensor], torch.Tensor], text: str
) -> None:
    hostile = Hostile()
    envelope, said = hostile.answer(change(hostile.push()))
    assert envelope.kind == Kind.REJECT
    assert text in said
    assert "rank 1" in said
    assert hostile.job.servers[0].rejected == {1: 1}
    hostile.still_serves()


@pytest.mark.parametrize("shape", [[2**62, 2**62], [0], [-1], [1.5], "60", [2**40]])
def test_a_model_that_cannot_be_is_refused(shape: Any) -> None:
    job = SimulatedJob(2, 1, optimizer=sgd)
    said = {"model": [["weight", shape]], "values": "", "shards": 1, "mode": str(job.rules.mode)}
    job.mailboxes.by_rank[1].send(2, ms.pack(Envelope(Kind.HELLO, 0, 1), ms.json_body(said)))
    job.serve()
    arrived = job.mailboxes.by_rank[1].receive()
    assert arrived is not None
    assert "model" in ms.read_text(ms.unpack(arrived[1], 2)[1])
    tasks = [training(job.links[0]), iter(())]
    job.mailboxes.kill(1)
    assert isinstance(job.run(tasks)[0], torch.Tensor)  # type: ignore[arg-type]


def test_a_good_push_after_a_refused_one_is_taken_and_a_second_copy_is_not() -> None:
    hostile = Hostile()
    push = hostile.push()
    assert hostile.answer(push[:-3])[0].kind == Kind.REJECT
    assert hostile.answer(push)[0].kind == Kind.ACK
    version = hostile.job.servers[0].shards[0].version
    assert hostile.answer(push)[0].kind == Kind.ACK
    assert hostile.job.servers[0].shards[0].version == version
    hostile.still_serves()


@settings(max_examples=25)
@given(data=st.data())
def test_any_damage_to_a_push_is_refused_and_changes_nothing(data: st.DataObject) -> None:
    hostile = Hostile()
    push = hostile.push()
    inside = data.draw(st.booleans())
    target = ms.unpack(push, None)[1].clone() if inside else push.clone()
    at = data.draw(st.integers(0, target.numel() - 1))
    target[at] ^= data.draw(st.integers(1, 255))
    before = hostile.job.servers[0].shards[0].values.clone()
    message = ms.pack(ms.unpack(push, None)[0], target) if inside else target
    assert hostile.answer(message)[0].kind == Kind.REJECT
    assert torch.equal(hostile.job.servers[0].shards[0].values, before)


@settings(max_examples=25)
@given(kind=st.integers(0, 20), body=st.binary(max_size=200), clock=st.integers(-5, 2**62), shard=st.integers(0, 3))
def test_no_bytes_of_a_worker_bring_a_server_down(kind: int, body: bytes, clock: int, shard: int) -> None:
    hostile = Hostile()
    content = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else ms.NOTHING
    hostile.mailbox.send(2, ms.pack(Envelope(kind, shard, 1, clock=clock), content))  # type: ignore[arg-type]
    hostile.job.serve()
    hostile.still_serves()
