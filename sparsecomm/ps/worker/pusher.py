"""Pushes a worker's gradient to the servers part by part, at the end of a step or while backward goes on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sparsecomm.feedback import Taken
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.gradient import marks
from sparsecomm.ps.protocol.messages import Kind
from sparsecomm.ps.worker.client import Client
from sparsecomm.ps.worker.metrics import WorkerMetrics
from sparsecomm.ps.worker.overlap import Watch
from sparsecomm.ps.worker.part import Part
from sparsecomm.runtime.arena import Arena
from sparsecomm.runtime.kinds import check_plain, tensor_problem

__all__ = ["Pusher"]

_PATIENCE = 2  # steps in a row with retracted pushes, after which overlap ends


@dataclass
class _Early:
    """A part that was taken in backward, and sent unless its gradient was not finite.

    Attributes:
        taken: Values taken out of the part.
        nnz: Number of nonzeros sent.
    """

    taken: Taken
    nnz: int


class Pusher:
    """Pushes all parts of a gradient as one: either all of them count, or none does.

    A part that is complete while backward goes on is sent as a pending push, which the server checks and keeps. At the
    end of the step the part is compared with the gradient as it is then. If it is unchanged, a COMMIT makes the push
    count; otherwise another push replaces it.

    Args:
        client: Sends the requests.
        parts: Parts of the model.
        named: Parameters by name.
        arena: Gives the buffers.
        counted: Counters of this worker. Mutated.

    Attributes:
        early: Parts that were taken in backward, by number.
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
            clock: Returns the number of pushes done.
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
        """Takes back the parts sent in backward, because their step will not end."""
        for index, early in self.early.items():
            early.taken.undo()
            self._client.forget(Kind.PUSH, self._parts[index].spec.index)
        self.early.clear()

    def push(self, clock: int) -> None:
        """Pushes the parts that were not sent in backward, and commits the others.

        Args:
            clock: Pushes done before.

        Raises:
            ConfigError: If a gradient is a sparse tensor.
        """
        self._retract()
        late = [p for i, p in enumerate(self._parts) if i not in self.early]
        gathered = {part.spec.index: self._gather(part) for part in late}  # before any is taken: it may fail
        taken, marked = [], []
        for index, part in enumerate(self._parts):
            early, absent = self.early.get(index), self._absent(part)
            taken.append(part.take(gathered[part.spec.index], clock, absent) if early is None else early.taken)
            marked.append(marks(absent, len(part.spec.pieces)))
        nonfinite = any(t.nonfinite for t in taken)
        for index, (part, t) in enumerate(zip(self._parts, taken, strict=True)):
            early = self.early.get(index)
            if nonfinite:
                t.undo()
                self._ask(part, part.encode_nonfinite(clock), clock)
            elif early is None:
                payload, nnz = part.encode(t, clock)
                part.commit(t)
                self._ask(part, payload, clock, marked=marked[index])
                self._counted.nnz += nnz
            else:
                part.commit(t)
                self._client.ask(Kind.COMMIT, part.spec.index, clock=clock)
                self._counted.nnz += early.nnz
        self._counted.nonfinite += nonfinite
        self.early.clear()
        if self._watch is not None:
            self._watch.start()

    def _send_early(self, index: int, clock: int) -> None:
        """Sends a complete part as a pending push, if the servers have acknowledged the push before."""
        if not self.early:
            self._client.pump()
            if self._client.waits(Kind.PUSH):
                return
        part = self._parts[index]
        grads = [self._named[piece.name].grad for piece in part.spec.pieces]
        if any(g is None or tensor_problem(g) is not None for g in grads):
            return
        taken = part.take(self._gather(part), clock)
        early = self.early[index] = _Early(taken, 0)
        if not taken.nonfinite:
            payload, early.nnz = part.encode(taken, clock)
            self._counted.early_bytes += payload.numel()
            self._ask(part, payload, clock, ms.PENDING)
        self._client.pump()  # lets the message progress

    def _ask(
        self, part: Part, payload: torch.Tensor, clock: int, flags: int = 0, marked: torch.Tensor = ms.NOTHING
    ) -> None:
        fields = {"clock": clock, "version": max(part.version, 0), "flags": flags, "seq": marked.numel()}
        body = torch.cat((marked, payload)) if marked.numel() else payload
        self._client.ask(Kind.PUSH, part.spec.index, body, **fields)

    def _retract(self) -> None:
        """Takes back the parts whose gradient has changed since they were sent."""
        changed = [index for index in self.early if self._changed(self._parts[index])]
        for index in changed:
            self.early.pop(index).taken.undo()
        self._counted.retracted += len(changed)
        self._in_vain = self._in_vain + 1 if changed else 0
        if self._in_vain >= _PATIENCE:
            self.close()
            warnings.warn(
                "gradients change after backward has computed them (by clipping, or by more than one backward a step), "
                "so parts that left in backward are sent again; overlap is off from now on. Make the Worker with "
                "overlap=False, or wrap all but the last backward of a step in worker.no_sync()",
                stacklevel=2,
            )

    def _absent(self, part: Part) -> list[int]:
        """Returns the numbers of a part's pieces whose parameter has no gradient."""
        return [i for i, piece in enumerate(part.spec.pieces) if self._named[piece.name].grad is None]

    def _gather(self, part: Part) -> torch.Tensor:
        """Returns a part's gradient as one flat float32 vector, in the arena; zeros where there is none."""
        flat = self._arena.get(("gradient", part.spec.index), part.spec.numel, torch.float32)
        for piece in part.spec.pieces:
            grad = self._named[piece.name].grad
            here = flat[piece.offset : piece.offset + piece.end - piece.start]
            if grad is None:
                here.zero_()
            else:
                check_plain(grad, f"the gradient of {piece.name!r}")
                here.copy_(grad.reshape(-1)[piece.start : piece.end])
        return flat

    def _changed(self, part: Part) -> bool:
        """Returns whether a part's gradient has changed since it was gathered."""
        # Compares all values, since version counters miss changes made through `.data`.
        flat = self._arena.get(("gradient", part.spec.index), part.spec.numel, torch.float32)
        for piece in part.spec.pieces:
            grad = self._named[piece.name].grad
            if grad is None or tensor_problem(grad) is not None:
                return True
            here = flat[piece.offset : piece.offset + piece.end - piece.start]
            now = grad.reshape(-1)[piece.start : piece.end].to(torch.float32)
            if not torch.equal(here.view(torch.int32), now.contiguous().view(torch.int32)):
                return True
        return False
