"""One shard of the parameters, with its optimizer, its open rounds and its record of every worker.

It knows no messages. `start`, `push`, `leave` and `join` change a shard deterministically, so a backup that makes the
same calls in the same order holds the same bits.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparsecomm import kernels
from sparsecomm.compress import Compressor, SelectionBuffers
from sparsecomm.compress.base import SelectorMemory
from sparsecomm.errors import ConfigError, WireError
from sparsecomm.ps.protocol.gradient import Gradient
from sparsecomm.ps.protocol.payloads import PULL, Origin, all_positions, decode, encode
from sparsecomm.ps.protocol.sharding import Piece, ShardSpec
from sparsecomm.ps.server.rates import Rates
from sparsecomm.ps.server.rules import Rules
from sparsecomm.runtime.arena import Arena
from sparsecomm.types import Codecs, Pairs, ValueCodec

__all__ = ["Shard", "Tally", "UpdateFailed"]

_MOST_AHEAD = 1 << 16
"""Rounds that a new worker may leave out."""
_MOST_OPEN = 32
"""Pushes of one worker that wait in open rounds. A worker that pulls after each push has one."""


class UpdateFailed(ConfigError):
    """The optimizer or the rate failed in the middle of an update, for which no message is to blame."""


@dataclass
class Tally:
    """One worker's contributions to a shard.

    Attributes:
        pushes: Pushes that were applied or wait in an open round.
        nonfinite: Pushes among these whose gradient was not finite.
        stale: Sum over its pushes of the updates that the shard had seen since the worker's pull.
        stalest: Largest number of such updates of one push.
    """

    pushes: int = 0
    nonfinite: int = 0
    stale: int = 0
    stalest: int = 0


class Shard:
    """One shard of the parameters.

    Args:
        spec: The part of the model that it holds.
        rules: Rules of the job.
        reference: Learning rate that `rules.rate` takes the place of, as from `reference_rate`.

    Attributes:
        values: The parameters, float32, shape (numel,).
        ready: Whether the shard has its first values.
        version: Number of updates applied.
        clocks: Pushes done, by living worker.
        gone: Reason why a worker is gone, by worker.
        tallies: Tally of each worker.
        joined: Clock at which a worker joined, by worker that came after the start.
        averaged: Number of rounds, by number of pushes in them.
        on_version: Called with the shard after every update.
    """

    def __init__(self, spec: ShardSpec, rules: Rules, reference: float = 0.0) -> None:
        self.spec = spec
        self.rules = rules
        self.values = torch.zeros(spec.numel, dtype=torch.float32)
        self.ready = False
        self.version = 0
        self.clocks = dict.fromkeys(rules.workers, 0)
        self.gone: dict[int, str] = {}
        self.joined: dict[int, int] = {}
        self.tallies = {w: Tally() for w in rules.workers}
        self.averaged: dict[int, int] = {}
        self.on_version: Callable[[Shard], None] | None = None
        self._round = 0
        self._open_rounds: dict[int, dict[int, Gradient]] = {}  # by clock, then worker
        self._views: dict[int, tuple[int, torch.Tensor]] = {}  # by worker: the values that it has, and their version
        self._memories: dict[int, SelectorMemory] = {}
        self._arena = Arena()
        self._positions = all_positions(spec.numel)
        self._grad = torch.zeros(spec.numel, dtype=torch.float32)
        self._gradients = [self._grad[_span(p)] for p in spec.pieces]
        self._parameters = [self._parameter(p) for p in spec.pieces]
        self.optimizer = rules.optimizer(self._parameters)
        self._reference = reference
        self._rates = Rates(self.optimizer, reference)

    def _parameter(self, piece: Piece) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(self.values[_span(piece)])
        parameter.ps_name, parameter.ps_shape = piece.name, piece.shape  # type: ignore[attr-defined]
        return parameter

    # --- changes, made on the backup in the same order ---

    def start(self, values: torch.Tensor) -> None:
        """Sets the first values; does nothing if the shard has values."""
        if not self.ready:
            self.values.copy_(values)
            self.ready = True

    def push(self, worker: int, clock: int, based_on: int, gradient: Gradient) -> int | None:
        """Applies a worker's gradient, or keeps it until its round closes.

        Args:
            worker: Rank of the worker.
            clock: Pushes that the worker has done before.
            based_on: Version that the gradient was computed on.
            gradient: The gradient. One that was not finite is counted but changes no values.

        Returns:
            Staleness of the push in updates; None if it was applied before and sent again after a failure.

        Raises:
            WireError: If the push is out of turn, or the worker is gone.
        """
        self.check_turn(worker, clock, based_on)
        if clock < self.clocks[worker]:
            return None
        stale = self.version - based_on
        tally = self.tallies[worker]
        tally.pushes += 1
        tally.nonfinite += gradient.nonfinite
        tally.stale += stale
        tally.stalest = max(tally.stalest, stale)
        self.clocks[worker] = clock + 1
        if self.rules.mode.rounds:
            self._open_rounds.setdefault(clock, {})[worker] = gradient
            self._close_rounds()
        else:
            self._update([gradient], 1.0 / len(self.rules.workers))
        return stale

    def check_turn(self, worker: int, clock: int, based_on: int) -> None:
        """Checks that a push may come now.

        Raises:
            WireError: If it may not. It names the worker and the reason.
        """
        if not self.ready:
            reason = "has no values here: its server and its backup are dead"
            raise self._error("shard", self.spec.index, reason, worker)
        self.check_member(worker)
        if clock > self.clocks[worker]:
            raise self._error("clock", clock, f"this worker has done {self.clocks[worker]} pushes", worker)
        if based_on > self.version:
            raise self._error("version", based_on, f"the shard is at version {self.version}", worker)
        waiting = sum(worker in pushes for pushes in self._open_rounds.values())
        if clock == self.clocks[worker] and waiting >= _MOST_OPEN:
            reason = f"{waiting} pushes of this worker wait for others in open rounds; pull after each push"
            raise self._error("clock", clock, reason, worker)

    def check_member(self, worker: int) -> None:
        """Checks that a rank is one of the workers now.

        Raises:
            WireError: If it is not. It names the reason.
        """
        if worker not in self.clocks:
            why = f"any more: {self.gone[worker]}" if worker in self.gone else "of this job"
            raise self._error("sender", worker, f"not a worker {why}", worker)

    def _error(self, field: str, value: object, reason: str, worker: int) -> WireError:
        return WireError(field, value, reason, rank=worker, bucket=self.spec.index)

    def leave(self, worker: int, why: str) -> None:
        """Removes a worker. Its pushes stay, and rounds close without it."""
        if self.clocks.pop(worker, None) is not None:
            self.gone[worker] = why
            self._views.pop(worker, None)
            self._memories.pop(worker, None)
            self._close_rounds()

    def join(self, worker: int, clock: int) -> bool:
        """Admits a new worker. Until its first push it may call again with another clock.

        Args:
            worker: Rank of the worker, which was not there at the start.
            clock: Clock of its first push. Earlier rounds close without it.

        Returns:
            Whether it may begin at that clock; False if that round has closed.

        Raises:
            WireError: If the worker was here before and is gone, all workers have left, or the clock lies too far
                ahead.
        """
        if worker in self.gone or not self.clocks:
            why = self.gone.get(worker, "all workers have left: the job has ended")
            raise self._error("sender", worker, f"cannot join: {why}", worker)
        if worker in self.tallies and (worker not in self.joined or self.tallies[worker].pushes):
            raise self._error("sender", worker, "is at work already", worker)
        if not self.ready or clock > self.offer + _MOST_AHEAD:
            reason = f"a new worker may begin at {self.offer} to {self.offer + _MOST_AHEAD}, once the shard has values"
            raise self._error("clock", clock, reason, worker)
        if self.rules.mode.rounds and clock < self._round:
            return False
        self.clocks[worker] = self.joined[worker] = clock
        self.tallies.setdefault(worker, Tally())
        self._close_rounds()
        return True

    @property
    def offer(self) -> int:
        """The earliest clock at which a worker could join now."""
        return self._round if self.rules.mode.rounds else min(self.clocks.values(), default=0)

    def _close_rounds(self) -> None:
        """Applies every round that all living workers have pushed to; all open rounds if no worker is left."""
        while self._open_rounds:
            nearest = min(self._open_rounds)
            slowest = min(self.clocks.values(), default=nearest + 1)
            self._round = max(self._round, min(nearest, slowest))
            if slowest <= nearest:
                return
            pushes = self._open_rounds.pop(nearest)
            self._round = nearest + 1
            parts = [pushes[w] for w in sorted(pushes)]
            self.averaged[len(parts)] = self.averaged.get(len(parts), 0) + 1
            self._update(parts, 1.0 / len(parts))

    def _update(self, gradients: Sequence[Gradient], scale: float) -> None:
        """Counts an update, and makes one step of the optimizer on the scaled sum of the gradients that are finite.

        The optimizer sees no gradient for a piece that all of them lack.
        """
        finite = [g for g in gradients if not g.nonfinite]
        if finite:
            kernels.scatter_reduce(self._grad, [g.pairs for g in finite], scale=scale)
            absent = frozenset.intersection(*(g.absent for g in finite))
            for number, parameter in enumerate(self._parameters):
                parameter.grad = None if number in absent else self._gradients[number]
            self._step()
        self.version += 1
        if self.on_version is not None:
            self.on_version(self)

    def _step(self) -> None:
        try:
            self._optimize()
        except Exception as error:
            raise UpdateFailed(
                f"update {self.version + 1} of shard {self.spec.index} failed in the optimizer or in rate=: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _optimize(self) -> None:
        if self.rules.rate is not None:
            self._rates.set(self.rules.rate(self.version))
        self.optimizer.step()

    # --- pulls ---

    def may_pull(self, clock: int) -> bool:
        """Returns whether the mode lets a worker that has done `clock` pushes go on."""
        lead = self.rules.mode.lead
        return self.ready and (lead is None or not self.clocks or min(self.clocks.values()) >= clock - lead)

    def pull(self, worker: int, have: int, rank: int, *, dense: bool = False) -> tuple[torch.Tensor, bool]:
        """Returns the payload that brings a worker to this version, as far as the pull's density allows.

        Args:
            worker: Rank of the worker.
            have: Version that the worker has. If another one was sent to it last, it gets the whole shard.
            rank: Rank of this server.
            dense: Whether the worker asks for the whole shard.

        Returns:
            The payload, in memory that the next pull reuses, and whether it is the whole shard. The worker adds any
            other payload to the values that it has.
        """
        version, view = self._views.get(worker, (-1, None))
        compressor = None if dense else self.rules.pull
        origin = Origin(PULL, self.spec, rank, self.rules.world, self.version)
        if compressor is None or view is None or version != have:
            payload, _ = encode(origin, (self._positions, self.values), Codecs(ValueCodec.FP32, None), self._arena)
            if compressor is not None:
                self._views[worker] = (self.version, self.values.clone())
            return payload, True
        changes = self._changes(worker, view, compressor)
        payload, _ = encode(origin, changes, Codecs(self.rules.pull_codec, None), self._arena)
        rounded, _ = decode(origin, payload)
        kernels.scatter_add(view, *rounded)
        self._views[worker] = (self.version, view)
        return payload, False

    def _changes(self, worker: int, view: torch.Tensor, compressor: Compressor) -> Pairs:
        """Selects the largest differences between the shard and a worker's view; the others come in a later pull."""
        numel = self.spec.numel
        k = compressor.k_for(numel, self.version)
        capacity = compressor.capacity(k, numel)
        out = SelectionBuffers(
            self._arena.get("indices", capacity, torch.uint32), self._arena.get("values", capacity, torch.float32)
        )
        behind = torch.neg(view, out=self._arena.get("difference", numel, torch.float32))
        memory = self._memories.setdefault(worker, SelectorMemory())
        chosen = compressor.select(self.values, behind, k, memory, out)
        return out.indices[: chosen.nnz], out.values[: chosen.nnz]

    # --- state for backups, checkpoints and statistics ---

    def facts(self) -> dict[str, Any]:
        """Returns the shard's history as a value that JSON can hold."""
        return {
            "shard": self.spec.index,
            "version": self.version,
            "clocks": self.clocks,
            "gone": self.gone,
            "joined": self.joined,
            "averaged": self.averaged,
            "workers": {w: asdict(t) for w, t in self.tallies.items()},
        }

    def snapshot(self) -> torch.Tensor:
        """Returns all state that a backup needs, as bytes, uint8."""
        s = self.spec
        state = {
            "spec": [s.index, s.shards, s.start, s.end, s.model_hash],
            "pieces": [[p.name, list(p.shape), p.start, p.end, p.offset] for p in s.pieces],
            "values": self.values,
            "reference": self._reference,
            "ready": self.ready,
            "version": self.version,
            "round": self._round,
            "clocks": self.clocks,
            "gone": self.gone,
            "joined": self.joined,
            "averaged": self.averaged,
            "tallies": {w: vars(t) for w, t in self.tallies.items()},
            "open": [
                (clock, worker, g.pairs[0].to(torch.int64), g.pairs[1], g.nonfinite, sorted(g.absent))
                for clock, pushes in self._open_rounds.items()
                for worker, g in pushes.items()
            ],
            "optimizer": self.optimizer.state_dict(),
        }
        file = io.BytesIO()
        torch.save(state, file)
        return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    @classmethod
    def from_snapshot(cls, rules: Rules, data: torch.Tensor) -> Shard:
        """Returns the shard of a snapshot. Workers' views are not in it: their next pull brings the whole shard."""
        state = torch.load(io.BytesIO(bytes(data.numpy())), weights_only=True)
        index, shards, start, end, model_hash = state["spec"]
        pieces = tuple(Piece(name, tuple(shape), *rest) for name, shape, *rest in state["pieces"])
        made = cls(ShardSpec(index, shards, start, end, pieces, model_hash), rules, state["reference"])
        made.values.copy_(state["values"])
        made.ready, made.version, made._round = state["ready"], state["version"], state["round"]
        made.clocks, made.gone, made.averaged = state["clocks"], state["gone"], state["averaged"]
        made.joined = state["joined"]
        made.tallies = {w: Tally(**t) for w, t in state["tallies"].items()}
        for clock, worker, indices, values, nonfinite, absent in state["open"]:
            gradient = Gradient((indices.to(torch.uint32), values), nonfinite, frozenset(absent))
            made._open_rounds.setdefault(clock, {})[worker] = gradient
        made.optimizer.load_state_dict(state["optimizer"])
        return made

    def piece_states(self) -> list[dict[str, Any]]:
        """Returns the optimizer's live state of each piece."""
        return [self.optimizer.state.setdefault(p, {}) for p in self._parameters]

    def restore(self, values: torch.Tensor, version: int, states: Sequence[dict[str, Any]]) -> None:
        """Sets the state from a checkpoint, before any worker has begun.

        Args:
            values: Parameters, float32, shape (numel,).
            version: Version of these values.
            states: State of the optimizer, by piece.
        """
        self.values.copy_(values)
        for parameter, state in zip(self._parameters, states, strict=True):
            if state:
                self.optimizer.state[parameter] = state
        self.version, self.ready = version, True


def _span(piece: Piece) -> slice:
    """Returns the positions of a piece in its shard."""
    return slice(piece.offset, piece.offset + piece.end - piece.start)
