"""A watch on a bucket: how long elements wait to be sent, and the size of the residual beside what is added to it.

It looks only at fixed places that are drawn from the bucket's layout, so a step costs microseconds, whatever the
bucket's size. It changes nothing in the bucket's memory, sends nothing, and never waits for a GPU.

    every step      the residual at 128 places is copied into a row; it is zero where an element has just left
    every 64 steps  ages are worked out from the rows, and norms of the residual and of the vector added to it are
                    estimated from 1,024 places

A step counts once it is final, so a step that is undone leaves no trace.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsecomm.feedback.layout import BucketLayout
from sparsecomm.runtime.device import side_of

__all__ = ["Hidden", "Seen", "Watch"]

_AGED = 128  # places whose ages are known. In a large bucket each costs a cache miss a step.
_WEIGHED = 1024  # places for norms: more, since a few large elements make up much of a gradient's norm
_ROWS = 64  # steps; working ages out in every step would double the cost
_WEIGH_EVERY = 64  # steps; at the start more often
_NEWEST = 0.5  # weight of the newest norm in the moving average
_ALL = 4096  # elements; up to that size a bucket is sampled without replacement

_Floats = npt.NDArray[np.float32]
Hidden = tuple[int, torch.Tensor]
"""First position of a parameter that this rank did not use, and its residual, which is zeroed during the exchange."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Figures of one bucket.

    Attributes:
        numel: elements of the bucket.
        steps: compressed steps seen since the watch began, or began again after a dense exchange.
        residual: 2-norm of the residual, estimated.
        added: 2-norm of a vector that is added to the residual in one step, in the same units, estimated.
        ages: float32, shape (samples,), steps that an element has waited; 0 if it was just sent or has nothing to send.
            Equal to `steps` if it was not sent once. None if a part of every element is sent in every step.
    """

    numel: int
    steps: int
    residual: float
    added: float
    ages: _Floats | None


class Watch:
    """Watches one bucket. Only the thread that exchanges the bucket changes it; `seen` may be called on any thread.

    In every step, `began` comes first. Then `look` and `keep` follow if some elements are sent, or `keep_whole` if the
    whole residual is. If all ranks find common places to send, `look_before` comes before `look`.

    Args:
        layout: layout of the bucket; determines the places.
    """

    def __init__(self, layout: BucketLayout) -> None:
        self._numel = layout.numel
        self._drawn = _draw(layout)
        self._lock = threading.Lock()
        self._residual: torch.Tensor | None = None
        # On the residual's device, made by `_attach`. Numpy's arrays on the host: for so few elements it takes a third
        # of torch's time.
        self._source: Any = None  # the residual
        self._aged: Any = None  # places whose ages are known
        self._rows: list[Any] = []  # the residual there in the latest steps; the last is for `look_before`
        self._table: Any = None  # all rows, shape (rows, samples)
        self._ages: Any = None  # int32, before the rows
        self._numbers: Any = None  # int32, shape (rows, 1), from 1
        self._places = self._drawn
        self._waits = True  # whether elements wait whole, so that they have ages
        self._begun = self._steps = self._filled = 0  # begun: calls of `began`
        self._norms: torch.Tensor | None = None  # moving averages of both norms, at the places
        self._weight: torch.Tensor | None = None  # norms of the step that is not final; None if it is not weighed
        self._length: torch.Tensor | None = None
        self._compares = False

    # --- on the thread that exchanges -----------------------------------------------------------------------------

    def began(self, source: torch.Tensor, factor: float, residual: torch.Tensor) -> None:
        """Weighs a vector that is added to the residual, if this is a step for that.

        Args:
            source: shape (n,), float32, float16 or bfloat16.
            factor: factor that converts it to the units of the residual.
            residual: float32, shape (n,).
        """
        if residual is not self._residual:
            self._attach(residual)
        self._weight = self._length = None
        if self._begun % _WEIGH_EVERY == 0 or self._begun & (self._begun - 1) == 0:  # or a power of two
            self._weight = _norm(source, self._places) * abs(factor)
        self._begun += 1

    def look_before(self) -> None:
        """Looks at the residual just before elements at common places leave it."""
        self._copy(self._rows[_ROWS])
        self._compares = True

    def look(self, hidden: Sequence[Hidden] = ()) -> None:
        """Looks at the residual just after elements have left it, before rounding is put in their place.

        After `look_before`, rounding may be there: an element has left wherever the residual has changed.

        Args:
            hidden: parameters whose residual is set aside.
        """
        if not self._waits:
            self._restart(waits=True)
        row = self._rows[self._filled]
        self._copy(row)
        if self._compares:
            row *= row == self._rows[_ROWS]
            self._compares = False
        for start, content in hidden:
            _fill_in(torch.as_tensor(row), torch.as_tensor(self._aged) - start, content)
        self._weigh_residual()

    def keep(self) -> None:
        """Counts the last look: its step is final."""
        with self._lock:
            self._keep_norms()
            self._steps += 1
            self._filled += 1
            if self._filled == _ROWS:
                self._ages, self._filled = self._ages_now(), 0

    def keep_whole(self, *, rest: bool) -> None:
        """Notes that the whole residual was exchanged, and that the step is final.

        Args:
            rest: whether a part of the elements has stayed. If nothing has, nothing waits, and the watch begins again.
        """
        if not rest or self._waits:
            self._restart(waits=not rest)
        if not rest:
            return
        self._weigh_residual()
        with self._lock:
            self._keep_norms()
            self._steps += 1

    def _weigh_residual(self) -> None:
        if self._weight is not None and self._residual is not None:
            self._length = _norm(self._residual, self._places)

    def _keep_norms(self) -> None:
        if self._weight is not None and self._length is not None:
            newest = torch.stack([self._length, self._weight])
            # Not in place: `seen` may hold the tensor on another thread.
            self._norms = newest if self._norms is None else torch.lerp(self._norms, newest, _NEWEST)
            self._weight = self._length = None

    def _copy(self, out: Any) -> None:
        """Copies the residual at the places whose ages are known. Mutates `out`."""
        if isinstance(out, torch.Tensor):
            torch.index_select(self._source, 0, self._aged, out=out)
        else:
            self._source.take(self._aged, out=out, mode="clip")

    def _attach(self, residual: torch.Tensor) -> None:
        """Begins to watch this residual. The one before, if any, was on another device."""
        with self._lock:
            self._residual, self._places = residual, self._drawn.to(residual.device)
            aged = self._places[:_AGED].clone()
            ages = torch.zeros_like(aged, dtype=torch.int32)
            numbers = torch.arange(1, _ROWS + 1, dtype=torch.int32, device=aged.device)[:, None]
            arrays = (residual, aged, residual.new_zeros(_ROWS + 1, aged.numel()), ages, numbers)
            self._source, self._aged, self._table, self._ages, self._numbers = (
                arrays if residual.is_cuda else (a.numpy() for a in arrays)
            )
            self._rows = list(self._table)
        self._restart(waits=True)

    def _restart(self, *, waits: bool) -> None:
        """Forgets everything seen."""
        with self._lock:
            self._waits = waits
            if self._steps:
                self._begun = 0  # weigh soon; but not in each of many dense steps
            self._steps = self._filled = 0
            self._norms = None
            self._ages = self._ages * 0

    def _ages_now(self) -> Any:
        """Returns the ages after the steps in the rows: int32, shape (samples,)."""
        m = self._filled
        if not m:
            return self._ages
        largest: Any = torch.amax if isinstance(self._table, torch.Tensor) else np.amax
        last = largest((self._table[:m] == 0) * self._numbers[:m], 0)  # number of the row; 0 where nothing was sent
        return self._ages * (last == 0) + (m - last)

    # --- on any thread --------------------------------------------------------------------------------------------

    def seen(self) -> Seen | None:
        """Returns the figures so far; None if there are none yet. Waits for the device."""
        with self._lock:
            norms, steps, waits = self._norms, self._steps, self._waits
            if norms is None:
                return None
            side = side_of(norms.device)
            with side.active():
                ages = torch.as_tensor(self._ages_now())
        with side.active():
            scaled = norms * math.sqrt(self._numel / max(1, self._drawn.numel()))
            residual, added, *rest = side.read(torch.cat([scaled, ages]))
        return Seen(self._numel, steps, residual, added, np.array(rest, dtype=np.float32) if waits else None)


def _draw(layout: BucketLayout) -> torch.Tensor:
    """Returns the places of a bucket: int64, shape (at most 1024,), in random order, the same in every run."""
    random = np.random.Generator(np.random.Philox(key=layout.hash))
    if layout.numel <= _ALL:
        return torch.from_numpy(random.permutation(layout.numel)[:_WEIGHED])
    return torch.from_numpy(random.integers(0, layout.numel, _WEIGHED))


def _norm(vector: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Returns the 2-norm of some elements, float32, shape ()."""
    norm: torch.Tensor = torch.linalg.vector_norm(vector[places], dtype=torch.float32)
    return norm


def _fill_in(row: torch.Tensor, places: torch.Tensor, content: torch.Tensor) -> None:
    """Copies `content` to the elements of `row` whose places are in it. Mutates `row`, without waiting for a GPU."""
    inside = (places >= 0) & (places < content.numel())
    row.copy_(torch.where(inside, content[places.clamp(0, content.numel() - 1)], row))
