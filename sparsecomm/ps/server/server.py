"""A server: takes messages, changes its shards, answers. It never waits and never fails on what a worker sends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from sparsecomm.errors import SparseCommError, WireError
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.board import board_bytes
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.protocol.payloads import PUSH, decode
from sparsecomm.ps.protocol.roster import Roster
from sparsecomm.ps.protocol.sharding import ModelLayout
from sparsecomm.ps.server.admission import Admission
from sparsecomm.ps.server.answers import Answers, Held, PendingPush
from sparsecomm.ps.server.board import Board
from sparsecomm.ps.server.replica import Copies, Mirror
from sparsecomm.ps.server.rules import Rules, ServerOptions
from sparsecomm.ps.server.shard import Shard
from sparsecomm.transport.mailbox import Mailbox
from sparsecomm.transport.mailbox.window import Window

__all__ = ["Server"]

_PATIENCE = 10.0  # seconds that a message for another server's shard is kept, in case that server turns out to be dead


class Server:
    """One server; `turn` does all that can be done now.

    Args:
        mailbox: its mailbox.
        rules: of the job.
        options: its own.

    Attributes:
        events: what happened to the job, in words, as this server saw it.
        rejected: messages refused, by sender.
        finished: whether its work is done.
        ready_for: workers that wait to open windows.
    """

    def __init__(self, mailbox: Mailbox, rules: Rules, options: ServerOptions) -> None:
        self.mailbox = mailbox
        self.rules = rules
        self.options = options
        self.index = options.servers.index(mailbox.rank)
        self.events: list[str] = []
        self.rejected: dict[int, int] = {}
        self.finished = False
        self.ready_for: set[int] = set()
        self.admission = Admission(rules, len(options.servers))
        self._served: dict[int, Answers] = {}
        self.copies = Copies(options.servers, rules)
        self._held: list[Held] = []
        self.roster = Roster(mailbox.rank, options.servers, rules.workers, options.replicate)
        self._said_done = False
        self._handlers: dict[Kind, Callable[[Envelope, torch.Tensor], None]] = {
            Kind.HELLO: self._on_hello,
            Kind.INIT: self._on_init,
            Kind.JOIN: self._on_join,
            Kind.PUSH: self._on_push,
            Kind.COMMIT: self._on_commit,
            Kind.PULL: self._on_pull,
            Kind.BYE: self._on_bye,
            Kind.STATS: self._on_stats,
            Kind.PING: self._on_ping,
            Kind.EVENT: self._on_copy,
            Kind.SNAPSHOT: self._on_copy,
            Kind.STORED: self._on_stored,
            Kind.DONE: self._on_done,
        }

    # --- turning ---

    def turn(self) -> bool:
        """Handles what has arrived and who has died; returns whether there was anything."""
        moved = False
        while (arrived := self.mailbox.receive()) is not None:
            moved = True
            self._take(*arrived)
        moved |= self._bury()  # last: who has said all that it had to say may well be gone
        self._look_at_held()
        self._end()
        return moved

    def opens(self) -> bool:
        """Returns whether all ranks are about to open windows, and nobody waits for a message before."""
        return self.ready_for == set(self.rules.workers) and self.index in self._served and self.mailbox.flushed()

    def open(self, make: Callable[[int], Window]) -> None:
        """Shows its shard in a window. Collective: every rank opens one, once."""
        served = self._served[self.index]
        numel = served.shard.spec.numel
        served.board = Board(make(board_bytes(numel)), numel)
        served.show()

    def _take(self, source: int, message: torch.Tensor) -> None:
        try:
            envelope, body = ms.unpack(message, source)
            self._handle(envelope, body, message)
        except SparseCommError as error:
            self._reject(source, error)

    def _handle(self, envelope: Envelope, body: torch.Tensor, message: torch.Tensor) -> None:
        source, kind = envelope.sender, envelope.kind
        if kind not in self._handlers:
            raise WireError("kind", kind.name, "not for a server", rank=source)
        if (kind in ms.FROM_SERVERS) != (source in self.options.servers):
            raise WireError("kind", kind.name, "not for this sender to send", rank=source)
        if envelope.shard >= len(self.options.servers):
            raise WireError("shard", envelope.shard, f"there are {len(self.options.servers)}", rank=source)
        if kind in (Kind.HELLO, Kind.JOIN) and source in self.roster.lost:
            return  # its last words; it has been buried, and nobody would let it go again
        if kind not in ms.FROM_SERVERS and self.roster.owner(envelope.shard) != self.mailbox.rank:
            self._hold(source, message)
            return
        if kind not in ms.FROM_SERVERS and envelope.shard not in self._served:
            self._take_over(envelope.shard)  # its owner had done all its work, but this worker has not heard of it
        self._handlers[kind](envelope, body)

    def _hold(self, source: int, message: torch.Tensor) -> None:
        self._held.append(Held(self.options.now(), source, message))

    def _reject(self, source: int, error: SparseCommError, shard: int = 0) -> None:
        """Refuses a message and says why to its sender; the server lives on."""
        self.rejected[source] = self.rejected.get(source, 0) + 1
        self.events.append(f"refused a message of rank {source}: {error}")
        if source not in self.options.servers:
            self.mailbox.send(source, ms.pack(Envelope(Kind.REJECT, shard, self.mailbox.rank), ms.text(str(error))))

    # --- who serves what ---

    def _bury(self) -> bool:
        """Acts on deaths that were not known before."""
        lost = self.mailbox.lost()
        if lost == self.roster.lost:
            return False
        fresh, self.roster.lost = sorted(lost - self.roster.lost), lost
        for rank in fresh:
            if rank not in self.roster.left | self.roster.ended:
                role = "server" if rank in self.options.servers else "worker"
                self.events.append(f"{role} rank {rank} died")
        for shard in range(len(self.options.servers)):
            if shard not in self._served and self.roster.inherits(shard):
                self._take_over(shard)
        for shard, served in self._served.items():
            for rank in fresh:
                self._let_go(served, rank, "died")
            served.mirror.moved(self.roster.backup(shard), served.shard)
            self._flow(served)
        return True

    def _take_over(self, shard: int) -> None:
        replica = self.copies.take(shard)
        if replica is None:
            return  # begins like a new one, with the next HELLO
        self._serve(replica)
        self.events.append(f"shard {shard} is served by rank {self.mailbox.rank} from version {replica.version}")

    def _serve(self, shard: Shard) -> None:
        index = shard.spec.index
        served = self._served[index] = Answers(shard, Mirror(self.mailbox, index))
        shard.on_version = lambda updated: self.options.save(updated, self.events)
        served.mirror.moved(self.roster.backup(index), shard)
        for worker in list(shard.clocks):
            self.roster.joined(worker)
            if worker in self.roster.lost:
                self._let_go(served, worker, "died")

    def _let_go(self, served: Answers, worker: int, why: str) -> None:
        """Drops a worker from a shard, on the backup as well."""
        if worker in served.shard.clocks:
            clock = served.shard.clocks[worker]
            served.shard.leave(worker, why)
            served.drop(worker)
            served.mirror.leave(worker, why)
            if why != "ended":
                index = served.shard.spec.index
                self.events.append(f"shard {index} goes on without worker rank {worker}: {why} after {clock} pushes")
            self._ask_for_values(served)
            self._flow(served)

    def _look_at_held(self) -> None:
        held, self._held = self._held, []
        for entry in held:
            shard = ms.unpack(entry.message, entry.source)[0].shard
            owner = self.roster.owner(shard)
            if owner == self.mailbox.rank:
                self._take(entry.source, entry.message)
            elif self.options.now() - entry.since > _PATIENCE:
                error = WireError("shard", shard, f"rank {owner} serves it, and is alive", rank=entry.source)
                self._reject(entry.source, error, shard)
            else:
                self._held.append(entry)

    def _end(self) -> None:
        """Ends when every worker has left every shard, here and on all other servers."""
        done = all(not s.shard.clocks and s.mirror.quiet for s in self._served.values())
        done = done and (self.index in self._served or not self.roster.living_workers)
        if done and not self._said_done:
            self._said_done = True
            for rank in self.options.servers:
                if rank != self.mailbox.rank:
                    self.mailbox.send(rank, ms.pack(Envelope(Kind.DONE, 0, self.mailbox.rank)))
        self.finished = done and not self.roster.others and self.mailbox.flushed()

    # --- beginning ---

    def _on_hello(self, envelope: Envelope, body: torch.Tensor) -> None:
        worker, joins = envelope.sender, envelope.sender >= self.rules.world
        served = self._served.get(envelope.shard)
        if joins and (self.admission.first is None or served is None or not served.shard.ready):
            self._hold(worker, ms.pack(envelope, body))  # there is nothing to join yet
            return
        first = self.admission.check(worker, body, joins=joins)
        if self.roster.has_lost(envelope.shard):
            self._of(envelope)  # it must be here: it cannot begin anew
        self._begin(envelope.shard, first.layout)
        self.admission.first = first
        served = self._served[envelope.shard]
        if joins:
            self._welcome(served, worker, clock=served.shard.offer)
            return
        if worker not in served.greeted:
            served.greeted.append(worker)
        self._welcome(served, worker)
        self._ask_for_values(served)

    def _on_join(self, envelope: Envelope, body: torch.Tensor) -> None:
        served, worker = self._of(envelope), envelope.sender
        if worker < self.rules.world:
            raise WireError("sender", worker, "was there at the start", rank=worker)
        joined = served.shard.join(worker, envelope.clock)
        if joined:
            self.roster.joined(worker)
            served.mirror.pass_on(envelope, body)
            self.events.append(f"worker rank {worker} joins shard {envelope.shard} at clock {envelope.clock}")
        self._acknowledge(served, envelope, flags=int(not joined), clock=served.shard.offer)
        self._flow(served)

    def _begin(self, index: int, layout: ModelLayout) -> None:
        if index in self._served:
            return
        shard = Shard(layout.shard(index, len(self.options.servers)), self.rules)
        if self.options.restore is not None:
            self.options.restore(shard)
        self._serve(shard)

    def _welcome(self, served: Answers, worker: int, flags: int = 0, clock: int = 0) -> None:
        welcome = Envelope(Kind.WELCOME, served.shard.spec.index, self.mailbox.rank, clock, flags=flags)
        self.mailbox.send(worker, ms.pack(welcome))

    def _ask_for_values(self, served: Answers) -> None:
        """Asks one worker for the first values; another one when that has died."""
        if not served.shard.ready and served.asked not in served.greeted and served.greeted:
            served.asked = served.greeted[0]
            self._welcome(served, served.asked, flags=1)

    def _on_init(self, envelope: Envelope, body: torch.Tensor) -> None:
        served = self._of(envelope)
        spec = served.shard.spec
        (_, values), _ = decode(PUSH, spec, body, rank=envelope.sender, world=self.rules.world, step=envelope.clock)
        if values.numel() != spec.numel:
            raise WireError("nnz", values.numel(), f"first values are {spec.numel}", rank=envelope.sender)
        if not served.shard.ready:
            served.shard.start(values)
            served.mirror.snapshot(served.shard)
        self._acknowledge(served, envelope)
        self._flow(served)

    # --- serving ---

    def _of(self, envelope: Envelope) -> Answers:
        served = self._served.get(envelope.shard)
        if served is None:
            lost = "is lost: its server is dead, and so is its backup, or it had none"
            why = lost if self.roster.has_lost(envelope.shard) else "nobody said HELLO for it here"
            raise WireError("shard", envelope.shard, why, rank=envelope.sender)
        return served

    def _answer(self, served: Answers, dest: int, envelope: Envelope, body: torch.Tensor = ms.NOTHING) -> None:
        """Sends a message once all that the shard has seen so far is on its backup, too."""
        served.mirror.after(dest, ms.pack(envelope, body))

    def _acknowledge(self, served: Answers, asked: Envelope, flags: int = 0, clock: int | None = None) -> None:
        shard = served.shard
        clock = asked.clock if clock is None else clock
        reply = Envelope(Kind.ACK, shard.spec.index, self.mailbox.rank, clock, shard.version, asked.kind, flags)
        self._answer(served, asked.sender, reply)

    def _on_push(self, envelope: Envelope, body: torch.Tensor) -> None:
        served, worker, clock = self._of(envelope), envelope.sender, envelope.clock
        shard = served.shard
        shard.check_turn(worker, clock, envelope.version)
        world = self.rules.world_of(worker)
        decoded = decode(PUSH, shard.spec, body, rank=worker, world=world, step=clock)
        push = PendingPush(envelope, body, *decoded)
        served.early.pop(worker, None)  # this one replaces it
        if envelope.flags & ms.HELD and clock == shard.clocks[worker]:
            served.early[worker] = push
        else:
            self._apply(served, push)

    def _on_commit(self, envelope: Envelope, body: torch.Tensor) -> None:
        served = self._of(envelope)
        push = served.final(envelope)
        if push is None:
            self._acknowledge(served, replace(envelope, kind=Kind.PUSH))
        else:
            self._apply(served, push)

    def _apply(self, served: Answers, push: PendingPush) -> None:
        asked = push.envelope
        stale = served.shard.push(asked.sender, asked.clock, asked.version, push.selected, push.nonfinite)
        if stale is not None:
            served.mirror.pass_on(asked, push.body)
        served.show()  # before the worker hears of it
        self._acknowledge(served, asked, flags=min(stale or 0, 65535))
        self._flow(served)

    def _on_pull(self, envelope: Envelope, body: torch.Tensor) -> None:
        served = self._of(envelope)
        served.pulls[envelope.sender] = envelope
        self._flow(served)

    def _flow(self, served: Answers) -> None:
        """Answers every pull that may go on."""
        shard = served.shard
        served.show()
        for worker, asked in list(served.pulls.items()):
            if shard.may_pull(asked.clock):
                del served.pulls[worker]
                payload, whole = shard.pull(
                    worker, asked.version - 1, self.mailbox.rank, dense=bool(asked.flags & ms.WHOLE)
                )
                index, rank = shard.spec.index, self.mailbox.rank
                reply = Envelope(Kind.VALUES, index, rank, asked.clock, shard.version, flags=int(whole))
                self._answer(served, worker, reply, payload)

    def _on_bye(self, envelope: Envelope, body: torch.Tensor) -> None:
        served, worker = self._of(envelope), envelope.sender
        why = ms.read_text(body)[:500] or "ended"
        self.roster.left.add(worker)
        self._let_go(served, worker, why)
        self._acknowledge(served, envelope)

    def _on_stats(self, envelope: Envelope, body: torch.Tensor) -> None:
        reply = Envelope(Kind.STATS, envelope.shard, self.mailbox.rank)
        self._answer(self._of(envelope), envelope.sender, reply, ms.json_body(self.stats(envelope.shard)))

    def _on_ping(self, envelope: Envelope, body: torch.Tensor) -> None:
        if envelope.clock > ms.MAX_PING:
            raise WireError("clock", envelope.clock, f"at most {ms.MAX_PING} bytes", rank=envelope.sender)
        if envelope.flags & ms.READY:
            if not self._of(envelope).complete(self.rules.workers):
                self._hold(envelope.sender, ms.pack(envelope, body))
                return
            self.ready_for.add(envelope.sender)
        reply = Envelope(Kind.PING, envelope.shard, self.mailbox.rank, envelope.clock)
        self.mailbox.send(envelope.sender, ms.pack(reply, torch.zeros(envelope.clock, dtype=torch.uint8)))

    def stats(self, index: int) -> dict[str, object]:
        """Returns what has happened to a shard that this server has, as JSON."""
        return {
            **self._served[index].shard.facts(),
            "rank": self.mailbox.rank,
            "rejected": self.rejected,
            "events": self.events,
        }

    @property
    def shards(self) -> dict[int, Shard]:
        """The shards that this server answers for, by index."""
        return {i: s.shard for i, s in self._served.items()}

    # --- being a backup ---

    def _on_copy(self, envelope: Envelope, body: torch.Tensor) -> None:
        if envelope.shard not in self._served and self.copies.take_in(envelope, body):
            stored = Envelope(Kind.STORED, envelope.shard, self.mailbox.rank, seq=envelope.seq)
            self.mailbox.send(envelope.sender, ms.pack(stored))

    def _on_stored(self, envelope: Envelope, body: torch.Tensor) -> None:
        served = self._served.get(envelope.shard)
        if served is not None:
            served.mirror.stored(envelope.sender, envelope.seq)

    def _on_done(self, envelope: Envelope, body: torch.Tensor) -> None:
        self.roster.ended.add(envelope.sender)
        for shard, served in self._served.items():
            served.mirror.moved(self.roster.backup(shard), served.shard)
