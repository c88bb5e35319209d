"""Mutated and invented messages of a joiner that holds the token: each is answered, and a refused one changes nothing.

SPARSECOMM_HOSTILE=1000000 sets the number of messages. They are the same in every run; a failure shows the message.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import sealed
from simulated_job import SimulatedJob
from simulated_mailbox import SimulatedMailboxes

import sparsecomm as sc
from sparsecomm import kernels
from sparsecomm.ps.addresses import read_addresses
from sparsecomm.ps.joining import JoinListener
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.gradient import marks
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.protocol.payloads import PULL, PUSH, Origin, encode
from sparsecomm.ps.server.options import ServerOptions
from sparsecomm.ps.server.rules import Rules
from sparsecomm.ps.server.server import Server
from sparsecomm.ps.server.shard import Shard
from sparsecomm.runtime.arena import Arena
from sparsecomm.types import Codecs, IndexCodec, ValueCodec
from sparsecomm.wire import HEADER_BYTES

TRIES = int(os.environ.get("SPARSECOMM_HOSTILE", "3000"))
LASTS = 250  # messages to one job
MODES = [sc.ps.Synchronous(), sc.ps.StaleSynchronous(1), sc.ps.Asynchronous()]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for i, shape in enumerate(((5, 3), (7,), (2, 2), (20,))):
            self.register_parameter(f"p{i}", torch.nn.Parameter(torch.zeros(shape, dtype=torch.float32)))


def momentum(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class Target:
    """A job of a good worker (rank 0) and two servers, of which a guest has joined the shards."""

    def __init__(self, mode: sc.ps.Mode) -> None:
        self.job = SimulatedJob(1, 2, joiners=1, optimizer=momentum, mode=mode, pull=sc.TopK(0.3))
        self.worker = sc.ps.Worker(Net(), sc.Dense(), link=self.job.links[0])
        self.hello = self._bodies(sc.ps.Worker(Net(), sc.Dense(), link=self.job.links[1]))
        connecting = self.worker.connecting()
        while next(connecting, "over") != "over":
            self.job.serve()
        self.rank = 3
        self.mailbox = self.job.mailboxes.by_rank[self.rank]
        for index in range(2):
            self.send(index, ms.pack(Envelope(Kind.JOIN, index, self.rank, clock=self.shard(index).offer + 1)))

    def _bodies(self, guest: sc.ps.Worker) -> torch.Tensor:
        next(guest.connecting())
        found = [ms.unpack(m, None)[1] for _, m in self.job.mailboxes._mail[1]]
        for waiting in self.job.mailboxes._mail:
            waiting.clear()
        return found[0]

    def shard(self, index: int) -> Shard:
        return self.job.servers[index].shards[index]

    def copy(self, index: int) -> Shard:
        return self.job.servers[1 - index].copies.shards[index]

    def state(self) -> str:
        """Everything that a refused message must leave alone."""
        found: list[Any] = []
        for index, server in enumerate(self.job.servers):
            shard, answers = self.shard(index), server._answers[index]
            rounds = {c: sorted(p) for c, p in shard._open_rounds.items()}
            found += [shard.facts(), rounds, shard.values.numpy().tobytes(), sorted(shard._views)]
            found += [sorted(answers.pulls), sorted(answers.pending), sorted(server.roster.workers)]
            found += [server.ready_workers, server.copies.shards.keys(), server.finished]
        return repr(found)

    def send(self, to: int, message: torch.Tensor) -> list[tuple[Envelope, torch.Tensor]]:
        """Sends a message to a server; returns its answers."""
        self.mailbox.send(1 + to, message)
        self.job.turns += 1
        for _ in range(3):  # the copy stores it, too
            self.job.serve()
        found = []
        while (arrived := self.mailbox.receive()) is not None:
            found.append(ms.unpack(arrived[1], arrived[0]))
        return found

    def good_worker_goes_on(self) -> None:
        """Trains a few more steps with the good worker, after the guest has left."""
        for index in range(2):
            self.send(index, ms.pack(Envelope(Kind.BYE, index, self.rank)))
        before = [self.shard(i).tallies[0].pushes for i in range(2)]
        for _ in range(2):
            for p in self.worker.model.parameters():
                p.grad = torch.ones_like(p)
            for _ in self.worker.stepping():
                self.job.serve()
        self.job.serve()
        assert [self.shard(i).tallies[0].pushes for i in range(2)] == [b + 2 for b in before]


class Forge:
    """Makes messages, good ones and others."""

    def __init__(self, rng: random.Random, target: Target) -> None:
        self.rng = rng
        self.target = target

    def message(self) -> tuple[str, torch.Tensor]:
        """Returns the way in which it was made, and a message."""
        way = self.rng.choices(["good", "fields", "body", "damaged", "invented"], (3, 5, 5, 1, 1))[0]
        envelope, body = self.good()
        if way == "fields":
            envelope = self.other_fields(envelope)
        elif way == "body":
            body = self.other_body(envelope, body)
        elif way == "invented":
            envelope = self.other_fields(Envelope(Kind(self.rng.randrange(1, len(Kind) + 1)), 0, self.target.rank))
            body = torch.tensor([self.rng.randrange(256) for _ in range(self.rng.randrange(200))], dtype=torch.uint8)
        message = ms.pack(envelope, body)
        if way == "damaged":
            while torch.equal(message, damaged := self.damaged(message)):
                pass
            return way, damaged
        return way, message

    def good(self) -> tuple[Envelope, torch.Tensor]:
        """A message that a worker could send now."""
        rng, rank, index = self.rng, self.target.rank, self.rng.randrange(2)
        shard = self.target.shard(index)
        clock = shard.clocks.get(rank, 0)
        kinds = [Kind.PUSH] * 8 + [Kind.PULL, Kind.COMMIT, Kind.STATS, Kind.PING, Kind.LATE, Kind.JOIN, Kind.HELLO]
        kind = rng.choice([*kinds, Kind.INIT, Kind.EVENT])
        body, fields = ms.NOTHING, {"clock": clock}
        if kind == Kind.PUSH:
            body, fields = self.push(shard, clock)
        elif kind == Kind.INIT:
            body, fields = self.push(shard, 0)[0], {}
        elif kind == Kind.EVENT:
            inner, fields = self.push(shard, clock)
            body, fields = ms.pack(Envelope(Kind.PUSH, index, rank, **fields), inner), {"seq": shard.version}
        elif kind == Kind.HELLO:
            body = self.target.hello
        elif kind == Kind.PULL:
            fields["version"] = shard.version + rng.randrange(2)
        elif kind == Kind.PING:
            fields = {"clock": rng.choice([0, 10, ms.MAX_PING])}
        return Envelope(kind, index, rank, **fields), body

    def push(self, shard: Shard, clock: int) -> tuple[torch.Tensor, dict[str, int]]:
        rng, spec = self.rng, shard.spec
        kept = sorted(rng.sample(range(spec.numel), rng.choice([0, 1, 5, spec.numel])))
        absent = [i for i in range(len(spec.pieces)) if rng.random() < 0.3]
        if rng.random() < 0.7:  # else values may lie in pieces that are marked
            spans = [(p.offset, p.offset + p.end - p.start) for i, p in enumerate(spec.pieces) if i in absent]
            kept = [i for i in kept if not any(low <= i < high for low, high in spans)]
        values = torch.tensor([rng.gauss(0, 1) for _ in kept], dtype=torch.float32)
        pairs = torch.tensor(kept, dtype=torch.int64).to(torch.uint32), values
        origin = Origin(rng.choice([PUSH] * 9 + [PULL]), spec, self.target.rank, self.target.rank + 1, clock)
        nonfinite = not kept and rng.random() < 0.3
        codec = rng.choice([c for c in IndexCodec if c != IndexCodec.DENSE] + [None])  # type: ignore[list-item]
        codecs = Codecs(rng.choice(list(ValueCodec)), codec)
        payload, _ = encode(origin, pairs, codecs, Arena(), nonfinite=nonfinite)
        marked = marks(absent, len(spec.pieces))
        fields = {"clock": clock, "version": shard.version, "seq": marked.numel(), "flags": rng.randrange(2)}
        return torch.cat((marked, payload)), fields

    def number(self, old: int, limit: int) -> int:
        """A number that is likely to break something."""
        rng = self.rng
        near = [old + 1, old - 1, old * 2, old ^ (1 << rng.randrange(48)), -1, 0, 1, 2, 3, 7, 255]
        far = [1 << 16, (1 << 16) + 1, 1 << 31, 1 << 32, 1 << 48, (1 << 48) + 1, 1 << 62, limit - 1, limit // 2]
        return rng.choice(near * 2 + far)

    def other_fields(self, envelope: Envelope) -> Envelope:
        """Changes one to three fields within the range of their format."""
        made = {name: getattr(envelope, name) for name in Envelope.__slots__}
        sizes = {"kind": 8, "flags": 16, "shard": 32, "sender": 32, "clock": 64, "version": 64, "seq": 64}
        for name in self.rng.sample(sorted(sizes), self.rng.choice([1, 1, 1, 2, 3])):
            bits, value = sizes[name], self.number(made[name], 1 << sizes[name])
            value %= 1 << bits
            made[name] = max(value - (1 << 64), 1 - (1 << 62)) if bits == 64 and value >= 1 << 63 else value
        return Envelope(**made)

    def other_body(self, envelope: Envelope, body: torch.Tensor) -> torch.Tensor:
        """Changes a body and makes the checksums inside it right."""
        if envelope.kind == Kind.HELLO:
            return self.other_json(body)
        if envelope.kind not in (Kind.PUSH, Kind.INIT) or body.numel() < HEADER_BYTES:
            return self.damaged(body)
        marked = envelope.seq if envelope.kind == Kind.PUSH else 0
        front, payload = body[:marked].clone(), body[marked:].clone()
        kind = self.rng.randrange(3)
        if kind == 0 and marked:
            front[self.rng.randrange(marked)] = self.rng.randrange(256)
        elif kind == 1:
            at, size = self.rng.randrange(5, 72), self.rng.choice([1, 1, 2, 4, 8])  # a field, or parts of two
            new = self.number(1, 1 << 64) % (1 << (8 * size))
            payload[at : at + size] = torch.tensor(list(new.to_bytes(size, "little")), dtype=torch.uint8)
        else:
            payload = torch.cat((payload[:HEADER_BYTES], self.damaged(payload[HEADER_BYTES:])))
        return torch.cat((front, resealed(payload)))

    def other_json(self, body: torch.Tensor) -> torch.Tensor:
        said = json.loads(bytes(body.numpy()))
        odd: list[Any] = [None, True, -1, 1.5, 1 << 70, "", "x" * 3000, [], {}, [[]], [["p0", [1 << 40]]], [["p0", 3]]]
        kind = self.rng.randrange(4)
        if kind == 0:
            said[self.rng.choice(list(said))] = self.rng.choice(odd)
        elif kind == 1:
            said["model"][self.rng.randrange(len(said["model"]))] = self.rng.choice(odd)
        elif kind == 2:
            said["model"][self.rng.randrange(len(said["model"]))][self.rng.randrange(2)] = self.rng.choice(odd)
        else:
            return self.damaged(body)
        return ms.json_body(said)

    def damaged(self, data: torch.Tensor) -> torch.Tensor:
        """Bytes flipped, cut, extended or overwritten."""
        out, rng = data.clone(), self.rng
        kind = rng.randrange(4)
        if not out.numel() or kind == 0:
            return torch.cat((out, torch.tensor([rng.randrange(256) for _ in range(3)], dtype=torch.uint8)))
        at = rng.randrange(out.numel())
        if kind == 1:
            return out[:at]
        if kind == 2:
            out[at] ^= 1 << rng.randrange(8)
        else:
            out[at : at + rng.randrange(1, 9)] = rng.choice([0, 127, 255])
        return out


@contextlib.contextmanager
def allocations() -> Iterator[list[int]]:
    """Yields a list of the bytes of each tensor that torch.empty and torch.zeros make meanwhile."""
    found: list[int] = []
    real = {name: getattr(torch, name) for name in ("empty", "zeros")}

    def recording(name: str) -> Callable[..., torch.Tensor]:
        def make(*args: Any, **options: Any) -> torch.Tensor:
            tensor: torch.Tensor = real[name](*args, **options)
            found.append(tensor.nbytes)
            return tensor

        return make

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(torch, name, recording(name))
        yield found


ASKS_FOR_MORE = {Kind.PULL, Kind.PING, Kind.COMMIT}
"""Requests whose answers may be much longer, within the bounds of the shard or of `MAX_PING`."""


def check(target: Target, to: int, message: torch.Tensor) -> bool:
    """Sends a message and checks its effect; returns whether it was refused."""
    waiting = any(server._waiting._kept for server in target.job.servers)
    before, refusals = target.state(), sum(s.events.total for s in target.job.servers)
    with allocations() as made:
        answers = target.send(to, message)
    kinds = [envelope.kind for envelope, _ in answers]
    refused = Kind.REJECT in kinds
    if refused and not waiting:  # else it may be an earlier message that is refused now
        assert kinds == [Kind.REJECT]
        assert len(ms.read_text(answers[0][1])) > 10
        after = target.state()
        assert before == after, "a request that is refused changes nothing"
    assert refused or sum(s.events.total for s in target.job.servers) <= refusals + 3
    if message.numel() < 6 or int(message[5]) not in ASKS_FOR_MORE:
        assert max(made, default=0) <= 16 * message.numel() + (1 << 16)
    for index in range(2):
        shard, copy = target.shard(index), target.copy(index)
        assert bool(shard.values.isfinite().all())
        assert torch.equal(shard.values, copy.values)
        assert (shard.version, shard.clocks, shard.gone) == (copy.version, copy.clocks, copy.gone)
    return refused


def test_hostile_messages() -> None:
    counted: Counter[str] = Counter()
    kinds: Counter[int] = Counter()
    target: Target | None = None
    for number in range(TRIES):
        rng = random.Random(number)
        if target is None or number % LASTS == 0 or any(target.rank in target.shard(i).gone for i in range(2)):
            if target is not None:
                target.good_worker_goes_on()
            target = Target(MODES[(number // LASTS) % 3])
        way, message = Forge(rng, target).message()
        to = rng.choices([int(message[8]) if message.numel() > 8 else 0, rng.randrange(2)], (9, 1))[0] % 2
        try:
            refused = check(target, to, message)
        except BaseException as error:
            raise AssertionError(f"message {number}, {way}: {bytes(message.numpy()).hex()}") from error
        counted[f"{way}, {'refused' if refused else 'taken'}"] += 1
        waits = message.numel() > 8 and to != int(
            message[8]
        )  # at a server that does not read the body of others' pushes
        assert refused or waits or way != "damaged", f"message {number}: {bytes(message.numpy()).hex()}"
        kinds[int(message[5]) if message.numel() > 5 else 0] += not refused
    assert counted["good, taken"] > 0.12 * TRIES
    assert counted["fields, refused"] > 0.2 * TRIES
    assert counted["body, refused"] > 0.1 * TRIES
    assert all(kinds[kind] for kind in (Kind.PUSH, Kind.PULL, Kind.STATS, Kind.PING, Kind.LATE, Kind.HELLO))


def resealed(payload: torch.Tensor) -> torch.Tensor:
    """Makes both checksums of a payload right. Mutates and returns it."""
    struct.pack_into("<I", payload.numpy(), HEADER_BYTES - 8, kernels.crc32c(payload[HEADER_BYTES:]))
    sealed(payload[:HEADER_BYTES])
    return payload


# --- memory ---


class Large(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1 << 20, dtype=torch.float32))


@pytest.mark.parametrize("index_codec", list(IndexCodec), ids=lambda c: c.name)
@pytest.mark.parametrize("value_codec", list(ValueCodec), ids=lambda c: c.name)
def test_a_short_message_that_announces_a_long_one_takes_no_memory(
    index_codec: IndexCodec, value_codec: ValueCodec
) -> None:
    """Its header is right in itself: it names as many positions and bytes as the shard allows."""
    job = SimulatedJob(1, 1, optimizer=momentum)
    worker = sc.ps.Worker(Large(), sc.Dense(), link=job.links[0])
    connecting = worker.connecting()
    while next(connecting, "over") != "over":
        job.serve()
    spec = job.servers[0].shards[0].spec
    origin = Origin(PUSH, spec, 0, 2, 0)
    pairs = torch.arange(spec.numel, dtype=torch.int64).to(torch.uint32), torch.ones(spec.numel, dtype=torch.float32)
    if index_codec != IndexCodec.DENSE:
        pairs = pairs[0][1:], pairs[1][1:]
    whole, _ = encode(origin, pairs, Codecs(value_codec, index_codec), Arena())
    for body in (whole[:HEADER_BYTES], whole[: HEADER_BYTES + 1000], resealed(whole[: HEADER_BYTES + 1000].clone())):
        job.mailboxes.by_rank[0].send(1, ms.pack(Envelope(Kind.PUSH, 0, 0), body))
        with allocations() as made:
            job.serve()
        assert sum(made) < 1 << 16
        arrived = job.mailboxes.by_rank[0].receive()
        assert arrived is not None
        assert "length = " in ms.read_text(ms.unpack(arrived[1], 1)[1])


# --- bytes on sockets ---


def test_hostile_bytes_on_sockets(tmp_path: Path) -> None:
    """Connections that greet or not, send good and bad frames, and stop anywhere. The server goes on and ends."""
    boxes = SimulatedMailboxes(2)
    facts = {"servers": (1,), "workers": (0,), "world": 2, "mode": "Synchronous()"}
    listener = JoinListener(sc.ps.Rendezvous(tmp_path, "127.0.0.1"), boxes.by_rank[1], 0, facts)
    ((address, _),) = read_addresses(tmp_path)[0]
    rules = Rules(optimizer=momentum, workers=(0,), world=2)
    server = Server(listener.mailbox, rules, ServerOptions(servers=(1,), replicate=False))
    link = SimulatedJob(1, 1, optimizer=momentum).links[0]
    object.__setattr__(link, "mailbox", boxes.by_rank[0])
    worker = sc.ps.Worker(Net(), sc.Dense(), link=link)
    connecting = worker.connecting()
    while next(connecting, "over") != "over":
        server.turn()
    began, turns = time.monotonic(), 0
    for number in range(max(200, TRIES // 30)):
        rng = random.Random(number)
        with socket.create_connection(("127.0.0.1", address.port)) as sock, contextlib.suppress(OSError):
            sock.sendall(hostile_stream(rng, 2 + number, address.token))
            for _ in range(rng.randrange(4)):
                server.turn()
                turns += 1
            if rng.random() < 0.2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no end
    for _ in range(10):
        server.turn()
    assert time.monotonic() - began < 20 + turns * 0.01
    assert server.shards[0].clocks.keys() >= {0}
    for p in worker.model.parameters():
        p.grad = torch.ones_like(p)
    leaving = worker.leaving()
    while next(leaving, "over") != "over":
        server.turn()
    for rank in list(server.shards[0].clocks):
        server.shards[0].leave(rank, "over")
    server.turn()
    assert server.finished
    listener.close()


def hostile_stream(rng: random.Random, rank: int, token: bytes) -> bytes:
    """Returns bytes that a joiner could send from the start of its connection."""
    greeting = struct.pack("<16sII", token if rng.random() < 0.8 else rng.randbytes(16), rank, rng.choice([2, 2, 2, 3]))
    frames = []
    for _ in range(rng.randrange(6)):
        kind, clock = rng.randrange(1, len(Kind) + 1), rng.choice([0, 1, 5, 1 << 40])
        envelope = Envelope(Kind(kind), rng.choice([0, 0, 0, 1]), rank, clock=clock, flags=rng.randrange(2))
        message = bytes(
            ms.pack(envelope, torch.tensor(list(rng.randbytes(rng.randrange(40))), dtype=torch.uint8)).numpy()
        )
        if rng.random() < 0.3:
            message = bytes(ms.pack(envelope).numpy())
        length = rng.choice([len(message)] * 6 + [0, len(message) - 1, 1 << 29, 1 << 30, (1 << 30) + 1, (1 << 64) - 1])
        frames.append(struct.pack("<Q", length) + message)
    whole = greeting + b"".join(frames)
    return whole[: rng.randrange(len(whole) + 1)] if rng.random() < 0.3 else whole
