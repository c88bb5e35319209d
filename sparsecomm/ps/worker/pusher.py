"""How a worker's gradient gets to the servers: part by part, at the end of a step or while backward goes on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sparsecomm.errors import ConfigError
from sparsecomm.feedback import Taken
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.messages import Kind
from sparsecomm.ps.worker.client import Client
from sparsecomm.ps.worker.overlap import Watch
from sparsecomm.ps.worker.part import Part
from sparsecomm.runtime.arena import Arena

__all__ = ["Pusher", "WorkerMetrics"]

_PATIENCE = 2  # steps in a row in which gradients changed after they were sent


@dataclass
class WorkerMetrics:
    """What a worker has done so far.

    Attributes:
        pushes: gradients pushed.
        pulls: pulls.
        nnz: nonzeros pushed.
        bytes_sent: bytes of all messages to servers, envelopes and headers included.
        bytes_received: bytes of all messages from servers.
        dense_bytes: bytes that dense float32 pushes and pulls would have moved, without any headers.
        nonfinite: pushes left out because the gradient was not finite.
        staleness: sum over acknowledged pushes of the updates that their shard had seen since this worker's pull.
        acknowledged: acknowledged pushes, counted by shard.
        stalest: the largest of these.
        early_bytes: payload bytes of pushes that left in backward.
        retracted: of these, pushes that were sent again because their gradient had changed, counted by shard.
        torn: one-sided reads that met an update, and were done again.
        fallbacks: of one-sided pulls, those that asked the server after too many of these, counted by shard.
        joined_at: the clock at which this worker began; 0 for those that were there at the start.
    """

    pushes: int = 0
    pulls: int = 0
    nnz: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    dense_bytes: int = 0
    nonfinite: int = 0
    staleness: int = 0
    acknowledged: int = 0
    stalest: int = 0
    joined_at: int = 0
    early_bytes: int = 0
    retracted: int = 0
    torn: int = 0
    fallbacks: int = 0

    @property
    def ratio(self) -> float:
        """Dense bytes over bytes on the wire, both ways; 1.0 if nothing has moved."""
        moved = self.bytes_sent + self.bytes_received
        return self.dense_bytes / moved if moved else 1.0

    @property
    def mean_staleness(self) -> float:
        """Updates between a pull and the application of the gradient computed on it, on average."""
        return self.staleness / self.acknowledged if self.acknowledged else 0.0


@dataclass
class _Early:
    """A part whose gradient is in the residual already, and on its way unless it was not finite."""

    taken: Taken
    nnz: int


class Pusher:
    """Pushes all parts of a gradient as one: either all of them count, or none does.

    A part that is complete while backward goes on is sent as a push that the server only keeps. At the end of the step
    it is compared with the gradient as it is then, and a COMMIT of a few bytes makes it count; a push without that
    flag replaces it.

    Args:
        client: sends.
        parts: of the model.
        named: parameters by name.
        arena: gives the buffers.
        counted: what this worker has done. Mutated.

    Attributes:
        early: parts that were taken in backward, by number.
    """

    def __init__(
        self,
        client: Client,
        parts: Sequence[Part],
        named: Mapping[str, torch.nn.Parameter],
        arena: Arena,
        counted: WorkerMetrics,
    ) -> None:
        self.early: dict[int, _Early] = {}
        self._client = client
        self._parts = parts
        self._named = named
        self._arena = arena
        self._counted = counted
        self._watch: Watch | None = None
        self._in_vain = 0

    def watch(self, clock: Callable[[], int]) -> None:
        """Sends parts in backward from now on.

        Args:
            clock: returns the pushes done.
        """
        numbers = {name: i for i, name in enumerate(self._named)}
        parts = [[numbers[piece.name] for piece in part.spec.pieces] for part in self._parts]
        self._watch = Watch(list(self._named.values()), parts, lambda index: self._send_early(index, clock()))

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which backward sends nothing."""
        return contextlib.nullcontext() if self._watch is None else self._watch.paused()

    def close(self) -> None:
        """Sends nothing in backward any more."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def forget(self) -> None:
        """Takes back what was sent in backward: the step does not end."""
        for index, early in self.early.items():
            self._parts[index].settle(early.taken, sent=False)
            self._client.forget(Kind.PUSH, self._parts[index].spec.index)
        self.early.clear()

    def push(self, clock: int) -> None:
        """Pushes what is left, and makes it all count.

        Args:
            clock: pushes done before.

        Raises:
            ConfigError: for a sparse gradient.
        """
        self._retract()
        taken = []
        for index, part in enumerate(self._parts):
            early = self.early.get(index)
            taken.append(part.take(self._gather(part), clock) if early is None else early.taken)
        nonfinite = any(t.nonfinite for t in taken)
        for index, (part, t) in enumerate(zip(self._parts, taken, strict=True)):
            early = self.early.get(index)
            if early is None or nonfinite:
                payload, nnz = part.encode(t, nonfinite, clock)
                self._ask(part, payload, clock)
            else:
                nnz = early.nnz
                part.settle(t, sent=True)
                self._client.ask(Kind.COMMIT, part.spec.index, clock=clock)
            self._counted.nnz += nnz
        self._counted.nonfinite += nonfinite
        self.early.clear()
        if self._watch is not None:
            self._watch.start()

    def _send_early(self, index: int, clock: int) -> None:
        """Sends a part that is complete, if the servers have taken the push before."""
        if not self.early:
            self._client.pump()
            if self._client.waits(Kind.PUSH):
                return
        part = self._parts[index]
        grads = [self._named[piece.name].grad for piece in part.spec.pieces]
        if any(g is None or g.layout != torch.strided for g in grads):
            return
        taken = part.take(self._gather(part), clock)
        early = self.early[index] = _Early(taken, 0)
        if not taken.nonfinite:
            payload, early.nnz = part.write(taken, clock)
            self._counted.early_bytes += payload.numel()
            self._ask(part, payload, clock, ms.HELD)
        self._client.pump()  # lets it progress

    def _ask(self, part: Part, payload: torch.Tensor, clock: int, flags: int = 0) -> None:
        version = max(part.version, 0)
        self._client.ask(Kind.PUSH, part.spec.index, payload, clock=clock, version=version, flags=flags)

    def _retract(self) -> None:
        """Takes parts back whose gradient is not what was sent any more."""
        changed = [index for index in self.early if self._changed(self._parts[index])]
        for index in changed:
            self._parts[index].settle(self.early.pop(index).taken, sent=False)
        self._counted.retracted += len(changed)
        self._in_vain = self._in_vain + 1 if changed else 0
        if self._in_vain >= _PATIENCE:
            self.close()
            warnings.warn(
                "gradients change after backward has computed them (by clipping, or by more than one backward a step), "
                "so what was sent in backward is sent again; overlap is off from now on. Make the Worker with "
                "overlap=False, or wrap all but the last backward of a step in worker.no_sync()",
                stacklevel=2,
            )

    def _gather(self, part: Part) -> torch.Tensor:
        """Returns a part's gradients as one flat float32 vector, in the arena."""
        flat = self._arena.get(("gradient", part.spec.index), part.spec.numel, torch.float32)
        for piece in part.spec.pieces:
            grad = self._named[piece.name].grad
            here = flat[piece.offset : piece.offset + piece.end - piece.start]
            if grad is None:
                here.zero_()
            elif grad.layout != torch.strided:
                raise ConfigError(
                    f"the gradient of {piece.name!r} is {grad.layout}; build the embedding with sparse=False"
                )
            else:
                here.copy_(grad.reshape(-1)[piece.start : piece.end])
        return flat

    def _changed(self, part: Part) -> bool:
        """Returns whether a part's gradients are others than those gathered."""
        # Reading them all is sure: version counters miss what is done to `.data`.
        flat = self._arena.get(("gradient", part.spec.index), part.spec.numel, torch.float32)
        for piece in part.spec.pieces:
            grad = self._named[piece.name].grad
            if grad is None or grad.layout != torch.strided:
                return True
            here = flat[piece.offset : piece.offset + piece.end - piece.start]
            now = grad.reshape(-1)[piece.start : piece.end].to(torch.float32)
            if not torch.equal(here.view(torch.int32), now.contiguous().view(torch.int32)):
                return True
        return False
