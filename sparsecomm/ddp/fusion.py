"""Lazy fusion: small buckets wait until together they are large enough for an exchange (Sun et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsecomm.ddp.gradients import check_gradient, unused_spans
from sparsecomm.errors import TransportError
from sparsecomm.feedback import BucketLayout
from sparsecomm.runtime.arena import Arena

__all__ = ["Batch", "Fusion", "HandedBucket"]

_SMALL = 1 << 14  # elements


@dataclass(slots=True, eq=False)
class HandedBucket:
    """A bucket that was handed over for averaging.

    Attributes:
        index: bucket number.
        parameters: parameters whose gradients make up the bucket, in order.
        grad: the flat bucket, shape (n,).
        error: an error that this rank met before the hand-over.
        outer: completed when the bucket holds the average, or when averaging has failed.
        result: the future that DDP waits for.
        failure: the error that `result` raises.
    """

    index: int
    parameters: Sequence[torch.Tensor]
    grad: torch.Tensor
    error: Exception | None = None
    outer: torch.futures.Future[Any] = field(init=False)
    result: torch.futures.Future[torch.Tensor] = field(init=False)
    failure: BaseException | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the gradient. Works for sparse layouts too, which are refused later."""
        return self.grad.numel() * self.grad.element_size()

    def __post_init__(self) -> None:
        # A future with devices makes its waiters wait for the stream that completed it.
        self.outer = torch.futures.Future(devices=[self.grad.device] if self.grad.is_cuda else None)
        # C++ can read an error only if a callback raised it; set_exception does not work.
        self.result = self.outer.then(self._value_or_raise)

    def _value_or_raise(self, future: torch.futures.Future[Any]) -> torch.Tensor:
        if self.failure is not None:
            raise self.failure
        return future.value()  # type: ignore[no-any-return]


@dataclass(slots=True, eq=False)
class Batch:
    """One or several buckets that are exchanged as one.

    Attributes:
        members: the buckets; all have the same dtype and device.
        last: whether this batch is the last of the backward pass.
        parameters: parameters of all members, in order.
        ids: `id` of each parameter.
        numel: elements of all members.
    """

    members: list[HandedBucket]
    last: bool = False
    parameters: list[torch.Tensor] = field(init=False)
    ids: tuple[int, ...] = field(init=False)
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for m in self.members for p in m.parameters]
        self.ids = tuple(map(id, self.parameters))
        self.numel = sum(m.grad.numel() for m in self.members)

    @property
    def device(self) -> torch.device:
        """Device of the gradients."""
        return self.members[0].grad.device

    @property
    def is_small(self) -> bool:
        """Whether the interpreter, not kernels or bytes, dominates the time of its exchange."""
        return self.numel < _SMALL

    @property
    def index(self) -> int:
        """Number of the first bucket, which names the batch."""
        return self.members[0].index

    def check(self, prefix: str) -> None:
        """Checks that all members can be exchanged.

        Raises:
            Exception: the error that a member was handed over with.
            ConfigError: for a gradient that cannot be exchanged; the text starts with `prefix`.
        """
        for member in self.members:
            if member.error is not None:
                raise member.error
            check_gradient(member.grad, prefix)

    def unused_spans(self, layout: BucketLayout) -> tuple[tuple[int, int], ...]:
        """Returns the spans (start, end) of the batch's elements whose parameters this rank did not use."""
        spans: list[tuple[int, int]] = []
        start, first = 0, 0
        for member in self.members:
            shapes = layout.shapes[first : first + len(member.parameters)]
            spans += [(start + a, start + b) for a, b in unused_spans(shapes, member.grad)]
            start, first = start + member.grad.numel(), first + len(member.parameters)
        return tuple(spans)

    def flat(self, arena: Arena) -> torch.Tensor:
        """Returns all gradients as one vector, shape (numel,): the only member itself, or a copy of several."""
        if len(self.members) == 1:
            return self.members[0].grad
        out = arena.get(("fused", self.index), self.numel, self.members[0].grad.dtype)
        return torch.cat([m.grad for m in self.members], out=out)

    def finish(self, average: torch.Tensor | None) -> None:
        """Completes all futures. `average` is the vector that `flat` returned; None if nothing was exchanged."""
        start = 0
        for member in self.members:
            end = start + member.grad.numel()
            if average is not None and average is not member.grad:
                member.grad.copy_(average[start:end])
            start = end
            member.outer.set_result(member.grad)

    def fail(self, error: BaseException) -> None:
        """Fails all futures."""
        for member in self.members:
            member.failure = error
            member.outer.set_result(None)


class Fusion:
    """Collects buckets until they are large enough for an exchange. Sizes decide, so that all ranks decide alike."""

    def __init__(self) -> None:
        self._waiting: list[HandedBucket] = []

    def add(self, handed: HandedBucket, fuse_bytes: int, *, last: bool) -> list[Batch]:
        """Takes a bucket and returns the batches to exchange now, in order.

        Args:
            handed: the bucket.
            fuse_bytes: gradient bytes of a batch that is large enough. A single bucket of that size is not copied.
            last: whether this is the last bucket of the backward pass; then no bucket keeps waiting.
        """
        waiting = self._waiting
        if waiting and waiting[-1].index >= handed.index:  # a new pass began, the previous one never ended
            Batch(waiting[:]).fail(
                TransportError(
                    f"bucket {waiting[0].index} was not exchanged: its backward pass did not come to its end"
                )
            )
            waiting.clear()
        out = []
        alone = handed.nbytes >= fuse_bytes
        if waiting and (alone or _differ(waiting[0].grad, handed.grad)):
            out.append(self._release())
        waiting.append(handed)
        if alone or last or sum(h.nbytes for h in waiting) >= fuse_bytes:
            out.append(self._release())
        if last:
            out[-1].last = True
        return out

    def _release(self) -> Batch:
        batch = Batch(self._waiting[:])
        self._waiting.clear()
        return batch


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype != b.dtype or a.device != b.device
