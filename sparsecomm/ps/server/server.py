"""A server handles messages, changes its shards and answers. It never waits, and no message of a worker stops it.

`Server.__init__` lists the handler of each kind of message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sparsecomm.errors import SparseCommError, TransportError, WireError
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.board import board_bytes
from sparsecomm.ps.protocol.gradient import read_gradient
from sparsecomm.ps.protocol.messages import Envelope, Kind
from sparsecomm.ps.protocol.payloads import PUSH, Origin, decode
from sparsecomm.ps.protocol.roster import Roster
from sparsecomm.ps.protocol.sharding import ModelLayout
from sparsecomm.ps.server.access import check_access
from sparsecomm.ps.server.admission import Admission
from sparsecomm.ps.server.answers import Answers, PendingPush, owned
from sparsecomm.ps.server.board import Board
from sparsecomm.ps.server.events import Events
from sparsecomm.ps.server.late import late
from sparsecomm.ps.server.options import ServerOptions
from sparsecomm.ps.server.rates import reference_rate
from sparsecomm.ps.server.replica import Copies, Mirror
from sparsecomm.ps.server.rules import Rules
from sparsecomm.ps.server.saving import Saving
from sparsecomm.ps.server.shard import Shard, UpdateFailed
from sparsecomm.ps.server.waiting import Waiting
from sparsecomm.transport.mailbox import Mailbox
from sparsecomm.transport.mailbox.window import Window

__all__ = ["Server"]

_PATIENCE = 10.0
"""Seconds for which a message about another server's shard is kept, in case that server turns out to be dead."""
_MOST_MESSAGES = 1000  # that are handled in one turn


class Server:
    """One server. `turn` does everything that can be done now.

    Args:
        mailbox: Mailbox of this server.
        rules: Rules of the job.
        options: Options of this server.

    Attributes:
        events: Events of the job in words, as this server saw them: deaths, take-overs, refused messages.
        rejected: Number of messages refused, by sender.
        finished: Whether the server's work is done.
        ready_workers: Workers that wait to open windows.
    """

    def __init__(self, mailbox: Mailbox, rules: Rules, options: ServerOptions) -> None:
        self.mailbox = mailbox
        self.rules = rules
        self.options = options
        self.index = options.servers.index(mailbox.rank)
        self.events = Events()
        self.rejected = self.events.refused
        self.finished = False
        self.ready_workers: set[int] = set()
        self.admission = Admission(rules, len(options.servers))
        self.copies = Copies(options.servers, rules)
        self.roster = Roster(mailbox.rank, options.servers, rules.workers, options.replicate)
        self._answers: dict[int, Answers] = {}  # by shard
        self._waiting = Waiting(options.now)
        self._said_done = False
        self._saving = Saving(options.checkpoints, mailbox, self.roster, self.events)
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
            Kind.LATE: self._on_late,
            Kind.EVENT: self._on_copy,
            Kind.SNAPSHOT: self._on_copy,
            Kind.STORED: self._on_stored,
            Kind.DONE: self._on_done,
            Kind.BEGIN: self._saving.hear,
        }

    def turn(self) -> bool:
        """Handles messages that have arrived and new deaths; returns whether any of them brings the job forward.

        Messages that are refused, or come from a rank that is no worker of the job, do not.
        """
        moved = False
        self._saving.lead()
        for _ in range(_MOST_MESSAGES):  # whoever floods this server must not keep it from the rest
            if (arrived := self.mailbox.receive()) is None:
                break
            moved |= self._receive(*arrived)
        moved |= self._handle_deaths()  # last, since a rank may end right after its last message
        self._retry_deferred()
        self._check_finished()
        return moved

    def may_open_window(self) -> bool:
        """Returns whether all workers are about to open windows and no message must arrive before."""
        return self.ready_workers == set(self.rules.workers) and self.index in self._answers and self.mailbox.flushed()

    def open_window(self, make: Callable[[int], Window]) -> None:
        """Shows this server's shard in a window. Collective: every rank opens one window, once."""
        answers = self._answers[self.index]
        numel = answers.shard.spec.numel
        answers.board = Board(make(board_bytes(numel)), numel)
        answers.show()

    @property
    def shards(self) -> dict[int, Shard]:
        """The shards that this server owns, by index."""
        return {i: answers.shard for i, answers in self._answers.items()}

    def stats(self, index: int) -> dict[str, object]:
        """Returns the history of a shard that this server owns, as a value that JSON can hold."""
        own = {"rank": self.mailbox.rank, "rejected": self.rejected, "events": list(self.events)}
        return {**self._answers[index].shard.facts(), **own}

    def late(self, index: int, clock: int = 0) -> str:
        """Names the ranks that a shard of this server waits for; empty if all its workers have left."""
        return late(self._answers.get(index), self.roster.living_workers, self.roster.backup(index), clock)

    # --- messages in and out ---

    def _receive(self, source: int, message: torch.Tensor) -> bool:
        """Handles a message; returns whether it was accepted and comes from a rank of the job.

        Raises:
            UpdateFailed: If the optimizer failed.
            TransportError: If a message of another server cannot be handled: two copies of a shard would differ.
        """
        try:
            self._dispatch(*ms.unpack(message, source), message)
        except UpdateFailed:
            raise
        except Exception as error:  # whatever a message causes, it must not end the server
            why = str(error) if isinstance(error, SparseCommError) else f"{type(error).__name__}: {error}"
            if source in self.options.servers:
                raise TransportError(f"a message of server rank {source} cannot be handled: {why}") from error
            self._reject(source, why)
            return False
        return source in self.options.servers or source in self.roster.workers

    def _dispatch(self, envelope: Envelope, body: torch.Tensor, message: torch.Tensor) -> None:
        source, kind, shard = envelope.sender, envelope.kind, envelope.shard
        check_access(envelope, body.numel(), self.options.servers, self.admission.longest_payload)
        if kind in (Kind.HELLO, Kind.JOIN) and source in self.roster.lost:
            return  # its death has been handled: nothing would remove it again
        if kind not in ms.BETWEEN_SERVERS:
            if self.roster.owner(shard) != self.mailbox.rank:
                self._defer(envelope, message)
                return
            if shard not in self._answers:
                self._take_over(shard)  # its owner had ended, but this worker has not heard of it
        self._handlers[kind](envelope, body)

    def _defer(self, envelope: Envelope, message: torch.Tensor) -> None:
        self._waiting.put(envelope, message, stranger=envelope.sender not in self.roster.workers)

    def _retry_deferred(self) -> None:
        """Handles deferred messages about shards that this server owns by now; refuses those that waited too long."""
        for entry in self._waiting.take():
            shard, source = entry.envelope.shard, entry.envelope.sender
            owner = self.roster.owner(shard)
            if owner == self.mailbox.rank:
                self._receive(source, entry.message)
            elif self.options.now() - entry.since > _PATIENCE:
                self._reject(source, f"shard {shard} of a message: rank {owner} serves it, and is alive", shard)
            else:
                self._waiting.keep(entry)

    def _send(self, dest: int, kind: Kind, shard: int, body: torch.Tensor = ms.NOTHING, **fields: Any) -> None:
        self.mailbox.send(dest, ms.pack(Envelope(kind, shard, self.mailbox.rank, **fields), body))

    def _reject(self, source: int, why: str, shard: int = 0) -> None:
        """Refuses a message and tells its sender why."""
        self.events.refuse(source, why)
        self._send(source, Kind.REJECT, shard, ms.text(why))

    def _answers_for(self, envelope: Envelope) -> Answers:
        return owned(self._answers, envelope, lost=self.roster.has_lost(envelope.shard))

    # --- ownership of shards, departure of workers, the end ---

    def _handle_deaths(self) -> bool:
        """Takes over shards of servers that have died and drops workers that have; returns whether any of them has."""
        lost = self.mailbox.lost()
        if lost == self.roster.lost:
            return False
        fresh, self.roster.lost = sorted(lost - self.roster.lost), lost
        known = [r for r in fresh if r in self.options.servers or r in self.roster.workers]
        for rank in known:
            if rank not in self.roster.departed | self.roster.ended:
                role = "server" if rank in self.options.servers else "worker"
                self.events.append(f"{role} rank {rank} died")
        for shard in range(len(self.options.servers)):
            if shard not in self._answers and self.roster.inherits(shard):
                self._take_over(shard)
        for shard, answers in self._answers.items():
            for rank in known:
                self._drop_worker(answers, rank, "died")
            answers.mirror.moved(self.roster.backup(shard), answers.shard)
            answers.answer_pulls()
        return bool(known)

    def _take_over(self, shard: int) -> None:
        replica = self.copies.take(shard)
        if replica is None:
            return  # the next HELLO creates the shard
        self._own(replica)
        self.events.append(f"shard {shard} is served by rank {self.mailbox.rank} from version {replica.version}")

    def _own(self, shard: Shard) -> None:
        index = shard.spec.index
        answers = self._answers[index] = Answers(shard, Mirror(self.mailbox, index), self.mailbox.rank)
        shard.on_version = self._saving.save
        answers.mirror.moved(self.roster.backup(index), shard)
        for worker in list(shard.clocks):
            self.roster.joined(worker)
            if worker in self.roster.lost:
                self._drop_worker(answers, worker, "died")

    def _drop_worker(self, answers: Answers, worker: int, why: str) -> None:
        """Removes a worker from a shard and from its copy."""
        if worker in answers.shard.clocks:
            clock = answers.shard.clocks[worker]
            answers.shard.leave(worker, why)
            answers.drop(worker)
            answers.mirror.leave(worker, why)
            if why != "ended":
                index = answers.shard.spec.index
                self.events.append(f"shard {index} goes on without worker rank {worker}: {why} after {clock} pushes")
            self._ask_for_values(answers)
            answers.answer_pulls()

    def _check_finished(self) -> None:
        """Ends when every worker has left every shard, here and on all other servers."""
        done = all(not a.shard.clocks and a.mirror.quiet for a in self._answers.values())
        done = done and (self.index in self._answers or not self.roster.living_workers)
        if done and not self._said_done:
            self._said_done = True
            for rank in self.options.servers:
                if rank != self.mailbox.rank:
                    self._send(rank, Kind.DONE, 0)
        self.finished = done and not self.roster.others and self.mailbox.flushed()

    # --- handlers: beginning ---

    def _on_hello(self, envelope: Envelope, body: torch.Tensor) -> None:
        worker, joins = envelope.sender, envelope.sender >= self.rules.world
        answers = self._answers.get(envelope.shard)
        if not self._saving.decided:
            self._defer(envelope, ms.pack(envelope, body))
            return
        if joins and (self.admission.first is None or answers is None or not answers.shard.ready):
            self._defer(envelope, ms.pack(envelope, body))  # there is nothing to join yet
            return
        first = self.admission.check(worker, body, joins=joins)
        if self.roster.has_lost(envelope.shard):  # then it must not begin anew
            self._answers_for(envelope)
        self._create_shard(envelope.shard, first.layout)
        self.admission.first = first
        answers = self._answers[envelope.shard]
        if joins:
            self._welcome(answers, worker, clock=answers.shard.offer)
            return
        if worker not in answers.greeted:
            answers.greeted.append(worker)
        self._welcome(answers, worker)
        self._ask_for_values(answers)

    def _create_shard(self, index: int, layout: ModelLayout) -> None:
        """Creates a shard, from a checkpoint if there is one; does nothing if this server has it."""
        if index in self._answers:
            return
        reference = reference_rate(self.rules, layout)
        shard = Shard(layout.shard(index, len(self.options.servers)), self.rules, reference)
        self._saving.restore(shard, layout)
        self._own(shard)

    def _welcome(self, answers: Answers, worker: int, **fields: Any) -> None:
        self._send(worker, Kind.WELCOME, answers.shard.spec.index, **fields)

    def _ask_for_values(self, answers: Answers) -> None:
        """Asks a worker for the first values, if the shard has none and no living worker has been asked."""
        if not answers.shard.ready and answers.initializer not in answers.greeted and answers.greeted:
            answers.initializer = answers.greeted[0]
            self._welcome(answers, answers.initializer, flags=1)

    def _on_init(self, envelope: Envelope, body: torch.Tensor) -> None:
        answers, worker = self._answers_for(envelope), envelope.sender
        spec = answers.shard.spec
        answers.shard.check_member(worker)
        origin = Origin(PUSH, spec, worker, self.rules.world, envelope.clock)
        (_, values), _ = decode(origin, body)
        if values.numel() != spec.numel:
            raise WireError("nnz", values.numel(), f"first values are {spec.numel}", rank=worker)
        if not answers.shard.ready:
            answers.shard.start(values)
            answers.mirror.snapshot(answers.shard)
        answers.acknowledge(envelope)
        answers.answer_pulls()

    def _on_join(self, envelope: Envelope, body: torch.Tensor) -> None:
        answers, worker = self._answers_for(envelope), envelope.sender
        if worker < self.rules.world:
            raise WireError("sender", worker, "was there at the start", rank=worker)
        joined = answers.shard.join(worker, envelope.clock)
        if joined:
            self.roster.joined(worker)
            answers.mirror.pass_on(envelope, body)
            self.events.append(f"worker rank {worker} joins shard {envelope.shard} at clock {envelope.clock}")
        answers.acknowledge(envelope, flags=int(not joined), clock=answers.shard.offer)
        answers.answer_pulls()

    # --- handlers: training ---

    def _on_push(self, envelope: Envelope, body: torch.Tensor) -> None:
        answers, worker, clock = self._answers_for(envelope), envelope.sender, envelope.clock
        shard = answers.shard
        shard.check_turn(worker, clock, envelope.version)
        origin = self.rules.push_origin(shard.spec, worker, clock)
        push = PendingPush(envelope, body, read_gradient(origin, envelope.seq, body))
        answers.pending.pop(worker, None)  # this push replaces it
        if envelope.flags & ms.PENDING and clock == shard.clocks[worker]:
            answers.pending[worker] = push
        else:
            answers.apply(push)

    def _on_commit(self, envelope: Envelope, body: torch.Tensor) -> None:
        answers = self._answers_for(envelope)
        if (push := answers.commit(envelope)) is None:
            answers.acknowledge(replace(envelope, kind=Kind.PUSH))
        else:
            answers.apply(push)

    def _on_pull(self, envelope: Envelope, body: torch.Tensor) -> None:
        answers = self._answers_for(envelope)
        answers.shard.check_member(envelope.sender)
        answers.pulls[envelope.sender] = envelope
        answers.answer_pulls()

    def _on_bye(self, envelope: Envelope, body: torch.Tensor) -> None:
        answers, worker = self._answers_for(envelope), envelope.sender
        why = ms.read_text(body)[:500] or "ended"
        self.roster.departed.add(worker)
        self._drop_worker(answers, worker, why)
        answers.acknowledge(envelope)

    def _on_stats(self, envelope: Envelope, body: torch.Tensor) -> None:
        answers = self._answers_for(envelope)
        answers.send(envelope.sender, Kind.STATS, ms.json_body(self.stats(envelope.shard)))

    def _on_late(self, envelope: Envelope, body: torch.Tensor) -> None:
        self._send(envelope.sender, Kind.LATE, envelope.shard, ms.text(self.late(envelope.shard, envelope.clock)))

    def _on_ping(self, envelope: Envelope, body: torch.Tensor) -> None:
        nbytes = envelope.clock
        if nbytes > ms.MAX_PING:
            raise WireError("clock", nbytes, f"at most {ms.MAX_PING} bytes", rank=envelope.sender)
        if envelope.flags & ms.READY:
            if envelope.sender not in self.rules.workers:
                raise WireError("flags", envelope.flags, "a worker that joined has no window", rank=envelope.sender)
            if not self._answers_for(envelope).complete(self.rules.workers):
                self._defer(envelope, ms.pack(envelope, body))
                return
            self.ready_workers.add(envelope.sender)
        zeros = torch.zeros(nbytes, dtype=torch.uint8)
        self._send(envelope.sender, Kind.PING, envelope.shard, zeros, clock=nbytes)

    # --- handlers: messages of other servers ---

    def _on_copy(self, envelope: Envelope, body: torch.Tensor) -> None:
        if envelope.shard not in self._answers and self.copies.take_in(envelope, body):
            self._send(envelope.sender, Kind.STORED, envelope.shard, seq=envelope.seq)

    def _on_stored(self, envelope: Envelope, body: torch.Tensor) -> None:
        if (answers := self._answers.get(envelope.shard)) is not None:
            answers.mirror.stored(envelope.sender, envelope.seq)

    def _on_done(self, envelope: Envelope, body: torch.Tensor) -> None:
        self.roster.ended.add(envelope.sender)
        for shard, answers in self._answers.items():
            answers.mirror.moved(self.roster.backup(shard), answers.shard)
