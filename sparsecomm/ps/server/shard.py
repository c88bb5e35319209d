"""One shard of the parameters: its optimizer, its open rounds, and what it knows of every worker.

No messages here. What changes a shard (`start`, `push`, `leave`) is deterministic, so that a backup that is told the
same things in the same order holds the same bits.
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
from sparsecomm.errors import WireError
from sparsecomm.ps.protocol.payloads import PULL, Selected, decode, encode, everything
from sparsecomm.ps.protocol.sharding import Piece, ShardSpec
from sparsecomm.ps.server.rules import Rules
from sparsecomm.runtime.arena import Arena
from sparsecomm.types import ValueCodec

__all__ = ["Shard", "Tally"]


class Shard:
    """See the module's docstring.

    Args:
        spec: which part of the model.
        rules: of the job.

    Attributes:
        values: the parameters, float32, shape (numel,).
        ready: whether they have been given their first values.
        version: updates applied.
        clocks: pushes done, by living worker.
        gone: why each other worker is gone.
        tallies: by worker.
        joined: clock at which each worker began that came after the start.
        averaged: rounds by number of pushes in them.
        on_version: called with the shard after every update.
    """

    def __init__(self, spec: ShardSpec, rules: Rules) -> None:
        self.spec = spec
        self.rules = rules
        self.values = torch.zeros(spec.numel)
        self.ready = False
        self.version = 0
        self.clocks = dict.fromkeys(rules.workers, 0)
        self.gone: dict[int, str] = {}
        self.joined: dict[int, int] = {}
        self.tallies = {w: Tally() for w in rules.workers}
        self.averaged: dict[int, int] = {}
        self.on_version: Callable[[Shard], None] | None = None
        self._round = 0
        self._open: dict[int, dict[int, Selected | None]] = {}
        self._views: dict[int, tuple[int, torch.Tensor]] = {}
        self._memories: dict[int, SelectorMemory] = {}
        self._arena = Arena()
        self._all = everything(spec.numel)
        self._grad = torch.zeros(spec.numel)
        self._parameters = [self._parameter(p) for p in spec.pieces]
        self.optimizer = rules.optimizer(self._parameters)

    def _parameter(self, piece: Any) -> torch.nn.Parameter:
        span = slice(piece.offset, piece.offset + piece.end - piece.start)
        parameter = torch.nn.Parameter(self.values[span])
        parameter.grad = self._grad[span]
        parameter.ps_name, parameter.ps_shape = piece.name, piece.shape  # type: ignore[attr-defined]
        return parameter

    # --- what changes it, in the same order on its backup ---

    def start(self, values: torch.Tensor) -> None:
        """Gives it its first values; does nothing if it has some."""
        if not self.ready:
            self.values.copy_(values)
            self.ready = True

    def push(self, worker: int, clock: int, based_on: int, selected: Selected, nonfinite: bool) -> int | None:
        """Takes a worker's gradient: applies it, or lets it wait for its round.

        Args:
            worker: rank.
            clock: pushes that the worker has done before.
            based_on: version that the gradient was computed on.
            selected: the gradient.
            nonfinite: whether it was not finite: then it counts as done but changes nothing.

        Returns:
            Its staleness in updates; None for one that was already here (sent again after a failure).

        Raises:
            WireError: for a push out of turn, or by a worker that is gone.
        """
        self.check_turn(worker, clock, based_on)
        if clock < self.clocks[worker]:
            return None
        stale = self.version - based_on
        tally = self.tallies[worker]
        tally.pushes += 1
        tally.nonfinite += nonfinite
        tally.stale += stale
        tally.stalest = max(tally.stalest, stale)
        self.clocks[worker] = clock + 1
        if self.rules.mode.rounds:
            self._open.setdefault(clock, {})[worker] = None if nonfinite else selected
            self._close_rounds()
        elif nonfinite:
            self._count()
        else:
            self._update([selected], 1.0 / len(self.rules.workers))
        return stale

    def check_turn(self, worker: int, clock: int, based_on: int) -> None:
        """Checks that a push may come now.

        Raises:
            WireError: names the worker and what is wrong.
        """
        where = {"rank": worker, "bucket": self.spec.index}
        if not self.ready:
            raise WireError("shard", self.spec.index, "has no values here: its server and its backup are dead", **where)
        if worker not in self.clocks:
            why = self.gone.get(worker, "never one of this job")
            raise WireError("sender", worker, f"not a worker any more: {why}", **where)
        if clock > self.clocks[worker]:
            raise WireError("clock", clock, f"this worker has done {self.clocks[worker]} pushes", **where)
        if based_on > self.version:
            raise WireError("version", based_on, f"the shard is at version {self.version}", **where)

    def leave(self, worker: int, why: str) -> None:
        """Lets a worker go. What it has pushed stays; rounds close without it."""
        if self.clocks.pop(worker, None) is not None:
            self.gone[worker] = why
            self._views.pop(worker, None)
            self._close_rounds()

    def join(self, worker: int, clock: int) -> bool:
        """Lets a new worker in; until its first push it may name another clock.

        Args:
            worker: rank, of nobody who was here at the start.
            clock: number of its first push: rounds before that one close without it.

        Returns:
            Whether it may begin then; False if that round has closed.

        Raises:
            WireError: if it was here and is gone, or nobody is left to join.
        """
        where = {"rank": worker, "bucket": self.spec.index}
        if worker in self.gone or not self.clocks:
            why = self.gone.get(worker, "all workers have left: the job has ended")
            raise WireError("sender", worker, f"cannot join: {why}", **where)
        if worker in self.tallies and (worker not in self.joined or self.tallies[worker].pushes):
            raise WireError("sender", worker, "is at work already", **where)
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
        """Applies every round that all living workers have pushed to; the last ones when nobody is left."""
        while self._open and all(c > self._round for c in self.clocks.values()):
            pushes = self._open.pop(self._round, {})
            self._round += 1
            if not pushes:
                continue
            parts = [pushes[w] for w in sorted(pushes)]
            self.averaged[len(parts)] = self.averaged.get(len(parts), 0) + 1
            finite = [p for p in parts if p is not None]
            if finite:
                self._update(finite, 1.0 / len(parts))
            else:
                self._count()

    def _update(self, parts: Sequence[Selected], scale: float) -> None:
        """One step of the optimizer on the scaled sum of gradients."""
        kernels.scatter_reduce(self._grad, parts, scale=scale)
        if self.rules.rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rules.rate(self.version)
        self.optimizer.step()
        self._count()

    def _count(self) -> None:
        self.version += 1
        if self.on_version is not None:
            self.on_version(self)

    # --- what answers workers ---

    def may_pull(self, clock: int) -> bool:
        """Returns whether a worker that has done so many pushes may go on: nobody alive is too far behind."""
        lead = self.rules.mode.lead
        return self.ready and (lead is None or not self.clocks or min(self.clocks.values()) >= clock - lead)

    def pull(self, worker: int, have: int, rank: int, *, dense: bool = False) -> tuple[torch.Tensor, bool]:
        """Returns the payload that brings a worker to this version, as far as the pull's density allows.

        Args:
            worker: whom it is for.
            have: the version that it was last brought to; another one than was sent last gets the whole shard.
            rank: of this server.
            dense: whether the worker wants the whole shard in any case.

        Returns:
            The payload, in memory that the next pull reuses, and whether it replaces what the worker has.
        """
        sent, view = self._views.get(worker, (-1, None))
        compressor, codec, selected = (
            None if dense else self.rules.pull,
            self.rules.pull_codec,
            (self._all, self.values),
        )
        whole = compressor is None or view is None or sent != have
        if whole:
            codec = ValueCodec.FP32
        else:
            assert compressor is not None
            assert view is not None
            selected = self._changes(worker, view, compressor)
        payload, _ = encode(
            PULL,
            self.spec,
            selected,
            codec,
            self._arena,
            rank=rank,
            world=self.rules.world,
            step=self.version,
        )
        if compressor is not None:
            if whole or view is None:
                view = self.values.clone()
            else:
                sending, _ = decode(PULL, self.spec, payload, rank=rank, world=self.rules.world, step=self.version)
                kernels.scatter_add(view, *sending)
            self._views[worker] = (self.version, view)
        return payload, whole

    def _changes(self, worker: int, view: torch.Tensor, compressor: Compressor) -> Selected:
        """Selects the largest differences between the shard and what a worker has; the others stay differences."""
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

    # --- what its backup, its checkpoint and its statistics keep ---

    def facts(self) -> dict[str, Any]:
        """Returns what has happened to it, as JSON."""
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
        """Returns all that a backup needs, as bytes."""
        s = self.spec
        state = {
            "spec": [s.index, s.shards, s.start, s.end, s.model_hash],
            "pieces": [[p.name, list(p.shape), p.start, p.end, p.offset] for p in s.pieces],
            "values": self.values,
            "ready": self.ready,
            "version": self.version,
            "round": self._round,
            "clocks": self.clocks,
            "gone": self.gone,
            "joined": self.joined,
            "averaged": self.averaged,
            "tallies": {w: vars(t) for w, t in self.tallies.items()},
            "open": [
                (clock, worker, None if s is None else (s[0].to(torch.int64), s[1]))
                for clock, pushes in self._open.items()
                for worker, s in pushes.items()
            ],
            "optimizer": self.optimizer.state_dict(),
        }
        file = io.BytesIO()
        torch.save(state, file)
        return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    @classmethod
    def from_snapshot(cls, rules: Rules, data: torch.Tensor) -> Shard:
        """Returns the shard that a snapshot was made of; workers' views are not in it: they are sent all once more."""
        state = torch.load(io.BytesIO(bytes(data.numpy())), weights_only=True)
        index, shards, start, end, model_hash = state["spec"]
        pieces = tuple(Piece(name, tuple(shape), *rest) for name, shape, *rest in state["pieces"])
        made = cls(ShardSpec(index, shards, start, end, pieces, model_hash), rules)
        made.values.copy_(state["values"])
        made.ready, made.version, made._round = state["ready"], state["version"], state["round"]
        made.clocks, made.gone, made.averaged = state["clocks"], state["gone"], state["averaged"]
        made.joined = state["joined"]
        made.tallies = {w: Tally(**t) for w, t in state["tallies"].items()}
        for clock, worker, s in state["open"]:
            made._open.setdefault(clock, {})[worker] = None if s is None else (s[0].to(torch.uint32), s[1])
        made.optimizer.load_state_dict(state["optimizer"])
        return made

    def piece_states(self) -> list[dict[str, Any]]:
        """Returns what the optimizer keeps of each piece: its live state."""
        return [self.optimizer.state.setdefault(p, {}) for p in self._parameters]

    def restore(self, values: torch.Tensor, version: int, states: Sequence[dict[str, Any]]) -> None:
        """Continues from a checkpoint, before any worker has begun.

        Args:
            values: float32, shape (numel,).
            version: that they are of.
            states: of the optimizer, by piece.
        """
        self.values.copy_(values)
        for parameter, state in zip(self._parameters, states, strict=True):
            if state:
                self.optimizer.state[parameter] = state
        self.version, self.ready = version, True


@dataclass
class Tally:
    """What one worker has done to a shard.

    Attributes:
        pushes: applied, or waiting in an open round.
        nonfinite: of these, those whose gradient was not finite.
        stale: sum over its pushes of updates that the shard had seen since the worker's pull.
        stalest: the largest of these.
    """

    pushes: int = 0
    nonfinite: int = 0
    stale: int = 0
    stalest: int = 0
