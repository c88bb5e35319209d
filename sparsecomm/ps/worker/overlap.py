"""Noticing in backward which parts of the gradient are complete, so that their push can leave before it ends."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

__all__ = ["Watch"]


class Watch:
    """Hooks on all parameters; a part is complete when each parameter in it has its gradient of this pass.

    A parameter that is shared gets its hook called once, with the sum; one that is not used, or frozen since, never,
    and its part is left to `Worker.push`.

    Args:
        parameters: of the model.
        parts: for each part, which of them it has a piece of.
        complete: called with the number of a part, in the thread that made this.
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
        """Begins a new step: no gradient is there."""
        self._missing = [set(part) for part in self._parts]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Lets backward passes go by whose gradients are not all of the step's."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def close(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _arrived(self, parameter: int, _: torch.Tensor) -> None:
        if self._paused or threading.get_ident() != self._thread:  # only one thread may talk
            return
        for part in self._of[parameter]:
            missing = self._missing[part]
            if parameter in missing:
                missing.discard(parameter)
                if not missing:
                    self._complete(part)
