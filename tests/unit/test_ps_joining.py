"""Workers that join a running job of the parameter server, in one process, and the mailbox that admits them."""

from __future__ import annotations

import json
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_job import Flat, SimulatedJob, sgd
from simulated_mailbox import SimulatedMailboxes

import sparsecomm as sc
from sparsecomm.ps.joining import JoinListener, RunningJob, connect
from sparsecomm.ps.worker.link import Link, Steps
from sparsecomm.transport.mailbox.tcp import TCPMailbox

STEPS, NUMEL = 12, 60
MODES = [sc.ps.Synchronous(), sc.ps.StaleSynchronous(1), sc.ps.Asynchronous()]


def gradient(worker: int, step: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(100 * worker + step), dtype=torch.float32)


def training(link: Link, after: int = 0, start: float = 0.0, numel: int = NUMEL) -> Steps[sc.ps.Worker]:
    """Trains until the clock is STEPS; begins after `after` turns."""
    for _ in range(after):
        yield "the turn in which it begins"
    model = Flat(numel, start=start)
    worker = sc.ps.Worker(model, sc.Dense(), link=link)
    yield from worker.connecting()
    assert worker.residual().count_nonzero() == 0
    for step in range(worker.clock, STEPS):
        model.weight.grad = gradient(worker.rank, step)
        yield from worker.stepping()
    yield from worker.leaving()
    return worker


def ended(job: SimulatedJob, tasks: list[Steps[Any]], **options: Any) -> list[Any]:
    out = job.run(tasks, **options)
    for each in out:
        if isinstance(each, BaseException):
            raise each
    for _ in range(10):
        job.serve()
    assert all(s.finished for s in job.servers if s.mailbox.rank not in job.mailboxes.dead)
    return out


def check(job: SimulatedJob, joined_at: int) -> None:
    """Checks that shards hold all pushes of the first two workers, and those of the third since it joined."""
    alive = [s for s in job.servers if s.mailbox.rank not in job.mailboxes.dead]
    shards = {i: s for server in alive for i, s in (server.copies.shards | server.shards).items()}
    shards |= {i: s for server in alive for i, s in server.shards.items()}
    newcomer = job.links[2].mailbox.rank
    for index in range(len(job.servers)):
        shard = shards[index]
        assert shard.joined == {newcomer: joined_at}
        assert shard.tallies[newcomer].pushes == STEPS - joined_at
        expected = torch.zeros(NUMEL, dtype=torch.float64)
        for step in range(STEPS):
            pushes = [gradient(w, step).double() for w in range(2 + (step >= joined_at))]
            expected += sum(pushes) / (len(pushes) if job.rules.mode.rounds else 2)
        if job.rules.mode.rounds:
            assert shard.averaged == {2: joined_at, 3: STEPS - joined_at}
        span = slice(shard.spec.start, shard.spec.end)
        assert torch.allclose(-shard.values.double(), expected[span], atol=1e-5)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("after", [0, 1, 5, 9])
def test_a_joiner_pushes_from_its_clock_on(mode: sc.ps.Mode, after: int) -> None:
    job = SimulatedJob(2, 3, joiners=1, optimizer=sgd, mode=mode)
    old, _, new = ended(job, [training(job.links[0]), training(job.links[1]), training(job.links[2], after, start=5.0)])
    assert (new.rank, new.size, old.size) == (2, 3, 2)
    assert 0 < new.metrics().joined_at < STEPS
    check(job, new.metrics().joined_at)
    assert any("worker rank 5 joins shard 0 at clock" in event for event in job.servers[0].events)
    assert job.servers[0].stats(0)["joined"] == {5: new.metrics().joined_at}


@pytest.mark.parametrize("victim", [2, 3, 4])
def test_a_server_dies_while_one_joins(victim: int) -> None:
    for turn in range(2, 30, 2):
        job = SimulatedJob(2, 3, joiners=1, optimizer=sgd)

        def kill(now: int, job: SimulatedJob = job, turn: int = turn) -> None:
            if now == turn:
                job.mailboxes.kill(victim)

        tasks = [training(job.links[0]), training(job.links[1]), training(job.links[2], 5)]
        check(job, ended(job, tasks, between=kill)[2].metrics().joined_at)


def test_the_others_go_on_when_a_joiner_dies() -> None:
    for turn in range(2, 30, 2):
        job = SimulatedJob(2, 2, joiners=1, optimizer=sgd)

        def kill(now: int, job: SimulatedJob = job, turn: int = turn) -> None:
            if now == turn:
                job.mailboxes.kill(4)

        ended(job, [training(job.links[0]), training(job.links[1]), training(job.links[2], 3)], between=kill)
        assert all(server.shards[i].version == STEPS for i, server in enumerate(job.servers))


def test_joiners_have_different_numbers() -> None:
    job = SimulatedJob(1, 1, joiners=2, optimizer=sgd)
    out = ended(job, [training(job.links[0]), training(job.links[1], 3), training(job.links[2], 5)])
    assert [w.rank for w in out] == [0, 1, 2]
    at = [w.metrics().joined_at for w in out]
    assert 0 == at[0] < at[1] < at[2]
    assert job.servers[0].shards[0].averaged == {1: at[1], 2: at[2] - at[1], 3: STEPS - at[2]}


def test_a_joiner_that_cannot_join_gets_the_reason() -> None:
    job = SimulatedJob(1, 1, joiners=2, optimizer=sgd)
    out = job.run([training(job.links[0]), training(job.links[1], 3, numel=7), training(job.links[2], 60)])
    assert isinstance(out[0], sc.ps.Worker)
    assert "model = \"parameter 0 is 'weight' (7,), not 'weight' (60,)\"" in str(out[1])
    assert "cannot join: all workers have left: the job has ended" in str(out[2])


# --- over TCP ---


def opened(folder: Path) -> tuple[SimulatedMailboxes, JoinListener]:
    mailboxes = SimulatedMailboxes(2)
    facts = {"servers": [1], "workers": [0], "world": 2, "mode": "Synchronous()"}
    return mailboxes, JoinListener(sc.ps.Rendezvous(folder, host="127.0.0.1"), mailboxes.by_rank[1], 0, facts)


def connected(folder: Path, listener: JoinListener) -> RunningJob:
    """Connects while the server goes on; no message may come meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(connect, folder, 20.0)
        while not running.done():
            assert listener.mailbox.receive() is None
        return running.result()


def received(mailbox: Any) -> tuple[int, torch.Tensor]:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = mailbox.receive()
        if found is not None:
            return found  # type: ignore[no-any-return]
        time.sleep(0.001)
    raise AssertionError("nothing came")


def until_lost(mailbox: Any, rank: int) -> None:
    end = time.monotonic() + 20
    while rank not in mailbox.lost():
        assert time.monotonic() < end
        assert mailbox.receive() is None
        time.sleep(0.001)


def test_messages_pass_both_ways_and_a_death_is_noticed(tmp_path: Path) -> None:
    mailboxes, listener = opened(tmp_path)
    running = connected(tmp_path, listener)
    mailbox = running.mailbox
    assert (mailbox.rank, mailbox.size, running.servers, running.mode) == (2, 2, (1,), "Synchronous()")
    sent = [torch.full((n,), n % 251, dtype=torch.uint8) for n in (0, 1, 3_000_000, 5)]
    for message in sent:
        mailbox.send(1, message)
    mailboxes.by_rank[0].send(1, torch.ones(3, dtype=torch.uint8))
    got = []
    while len(got) < len(sent) + 1:
        mailbox.flushed()
        found = listener.mailbox.receive()
        got += [] if found is None else [found]
    assert [source for source, _ in got].count(0) == 1
    assert all(torch.equal(a, b) for a, b in zip(sent, [m for s, m in got if s == 2], strict=True))
    listener.mailbox.send(2, torch.arange(9, dtype=torch.uint8))
    assert received(mailbox)[1].tolist() == list(range(9))
    mailbox.close()
    until_lost(listener.mailbox, 2)
    second = connected(tmp_path, listener).mailbox
    assert second.rank == 3, "a rank is never used twice"
    second.send(1, torch.zeros(1, dtype=torch.uint8))
    assert received(listener.mailbox)[0] == 3
    listener.close()
    until_lost(second, 1)
    second.close()


@pytest.mark.parametrize("wrong", ["token", "world", "rank", "rank again", "length", "silence"])
def test_strangers_are_refused(tmp_path: Path, wrong: str) -> None:
    _, listener = opened(tmp_path)
    said = json.loads((tmp_path / "server-0.json").read_text())
    token = bytes(16) if wrong == "token" else bytes.fromhex(said["token"])
    rank, size = 1 if wrong == "rank" else 2, 3 if wrong == "world" else 2
    first = TCPMailbox(2, 2, {1: ("127.0.0.1", said["port"], token)}, 5.0) if wrong == "rank again" else None
    if first is not None:
        first.send(1, torch.zeros(1, dtype=torch.uint8))
        received(listener.mailbox)
    with socket.create_connection(("127.0.0.1", said["port"])) as sock:
        sock.settimeout(0.01)
        if wrong == "length":
            sock.sendall(token + struct.pack("<II", rank, size) + struct.pack("<Q", 1 << 62))
        elif wrong != "silence":
            sock.sendall(token + struct.pack("<II", rank, size))
        end, answer = time.monotonic() + (0.3 if wrong == "silence" else 20), b"open"
        while time.monotonic() < end and answer:
            assert listener.mailbox.receive() is None
            listener.mailbox.lost()
            try:
                answer = sock.recv(1)
            except TimeoutError:
                continue
            except ConnectionResetError:
                answer = b""
        assert (answer == b"open") == (wrong == "silence")
    listener.close()
    if first is not None:
        first.close()


def test_errors_of_a_rendezvous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(sc.LaunchError, match=f"no server has left its address in {tmp_path}: has the job begun"):
        connect(tmp_path, 0.1)
    _, listener = opened(tmp_path)
    path = tmp_path / "server-0.json"
    kept = path.read_text()
    listener.close()
    assert not path.exists()
    path.write_text(kept)  # as a killed server leaves it
    with pytest.raises(sc.LaunchError, match=r"no server answers; has the job ended\? rank 1 at 127.0.0.1"):
        connect(tmp_path, 0.5)
    with pytest.raises(sc.ConfigError, match=r"Rendezvous\.folder"):
        sc.ps.Rendezvous("")
    monkeypatch.setattr(socket, "gethostname", lambda: "no.such.host.invalid")
    with pytest.raises(sc.LaunchError, match="cannot listen for joiners"):
        JoinListener(sc.ps.Rendezvous(tmp_path, host="no.such.host.invalid"), SimulatedMailboxes(2).by_rank[1], 0, {})
