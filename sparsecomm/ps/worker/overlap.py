"""Notices in backward which parts of the gradient are complete, so that their push can leave before it ends."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

__all__ = ["Watch"]


class Watch:
    """Calls `complete` for each part as soon as every parameter in it has its gradient of this pass.

    The hook of a shared parameter runs once, with the sum. The hook of a parameter that is unused, or that has been
    frozen since, never runs, and `Worker.push` sends its part.

    Args:
        parameters: Parameters of the model.
        parts: For each part, the numbers of the parameters that it has a piece of.
        complete: Called with the number of a part, in the thread that made this object.
    """

    def __init__(
        self, parameters: Sequence[torch.Tensor], parts: Sequence[Sequence[int]], complete: Callable[[int], None]
    ) -> None:
        self._parts = [frozenset(part) for part in parts]
        self._of = [[i for i, part in enumerate(parts) if p in part] for p in range(len(parameters))]
        self._complete = complete
        self._thread = threading.get_ident()
        self._paused = False
        self._missing: list[set[int]] = []
        self.start()
        self._handles = [
            p.register_post_accumulate_grad_hook(partial(self._arrived, i))  # type: ignore[no-untyped-call]
            for i, p in enumerate(parameters)
        ]

    def start(self) -> None:
        """Begins a new step, in which no gradient has been computed yet."""
        self._missing = [set(part) for part in self._parts]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ignores backward passes inside the context. Their gradients are only a part of the step's."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _arrived(self, parameter: int, _: torch.Tensor) -> None:
        if self._paused or threading.get_ident() != self._thread:  # only one thread may use the mailbox
            return
        for part in self._of[parameter]:
            missing = self._missing[part]
            if parameter in missing:
                missing.discard(parameter)
                if not missing:
                    self._complete(part)
