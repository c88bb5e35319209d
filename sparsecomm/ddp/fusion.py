"""Lazy fusion: small buckets are held back until together they are worth an exchange (Sun et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsecomm.ddp.gradients import check_gradient, unused_spans
from sparsecomm.errors import TransportError
from sparsecomm.feedback import BucketLayout
from sparsecomm.runtime.arena import Arena

__all__ = ["Batch", "Fusion", "Handed"]

_SMALL = 1 << 14  # elements


@dataclass(slots=True, eq=False)
class Handed:
    """A bucket that was handed over to be averaged.

    Attributes:
        index: bucket number.
        parameters: whose gradients make it up, in order.
        grad: the flat bucket, shape (n,).
        error: what has gone wrong with it on this rank already.
        outer: completed when the bucket holds the average, or when that has failed.
        result: what DDP waits for.
        failure: what has failed.
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
        """Bytes of the gradient, also of one in a layout that will be refused."""
        return self.grad.numel() * self.grad.element_size()

    def __post_init__(self) -> None:
        # A future with devices tells whoever waits for it to wait for the stream in which it was completed.
        self.outer = torch.futures.Future(devices=[self.grad.device] if self.grad.is_cuda else None)
        # Only a callback that raises gives a torch future an error that C++ can read (set_exception does not).
        self.result = self.outer.then(self._value_or_raise)

    def _value_or_raise(self, future: torch.futures.Future[Any]) -> torch.Tensor:
        if self.failure is not None:
            raise self.failure
        return future.value()  # type: ignore[no-any-return]


@dataclass(slots=True, eq=False)
class Batch:
    """Buckets that are exchanged as one, usually a single one.

    Attributes:
        members: the buckets, of one dtype.
        last: whether the last of them is the last of the backward pass.
        parameters: the parameters of all.
        numel: elements of all.
    """

    members: list[Handed]
    last: bool = False
    parameters: list[torch.Tensor] = field(init=False)
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for m in self.members for p in m.parameters]
        self.numel = sum(m.grad.numel() for m in self.members)

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.members[0].grad.device

    @property
    def is_small(self) -> bool:
        """Whether exchanging it is more a matter of the interpreter than of kernels and bytes."""
        return self.numel < _SMALL

    @property
    def index(self) -> int:
        """The first bucket's number, by which the whole is known."""
        return self.members[0].index

    def check(self, where: str) -> None:
        """Checks all gradients.

        Raises:
            Exception: what has gone wrong with one on this rank already.
            ConfigError: for one that cannot be exchanged; starts with `where`.
        """
        for member in self.members:
            if member.error is not None:
                raise member.error
            check_gradient(member.grad, member.parameters, where)

    def unused_spans(self, layout: BucketLayout) -> tuple[tuple[int, int], ...]:
        """Returns the spans of parameters that this rank did not use, see `unused_spans`."""
        spans: list[tuple[int, int]] = []
        start, first = 0, 0
        for member in self.members:
            shapes = layout.shapes[first : first + len(member.parameters)]
            spans += [(start + a, start + b) for a, b in unused_spans(shapes, member.grad)]
            start, first = start + member.grad.numel(), first + len(member.parameters)
        return tuple(spans)

    def flat(self, arena: Arena) -> torch.Tensor:
        """Returns all gradients in one vector: the bucket itself, or a copy of several."""
        if len(self.members) == 1:
            return self.members[0].grad
        out = arena.get(("fused", self.index), self.numel, self.members[0].grad.dtype)
        return torch.cat([m.grad for m in self.members], out=out)

    def finish(self, average: torch.Tensor | None) -> None:
        """Completes all futures; `average` is what `flat` returned, None if nothing was exchanged."""
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
    """Collects buckets until they are worth an exchange. All ranks decide alike, by sizes alone."""

    def __init__(self) -> None:
        self._held: list[Handed] = []

    def add(self, handed: Handed, fuse_bytes: int, *, last: bool) -> list[Batch]:
        """Takes a bucket and returns what is to be exchanged now, in order.

        Args:
            handed: the bucket.
            fuse_bytes: bytes of gradients from which on an exchange starts; a bucket that has them alone is not copied.
            last: whether it is the backward pass's last bucket; then nothing is held back.
        """
        held = self._held
        if held and held[-1].index >= handed.index:  # a new pass: the one before was given up half-way
            Batch(held[:]).fail(
                TransportError(f"bucket {held[0].index} was not exchanged: its backward pass did not come to its end")
            )
            held.clear()
        out = []
        alone = handed.nbytes >= fuse_bytes
        if held and (alone or _unlike(held[0].grad, handed.grad)):
            out.append(self._release())
        held.append(handed)
        if alone or last or sum(h.nbytes for h in held) >= fuse_bytes:
            out.append(self._release())
        if last:
            out[-1].last = True
        return out

    def _release(self) -> Batch:
        batch = Batch(self._held[:])
        self._held.clear()
        return batch


def _unlike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype != b.dtype or a.device != b.device
