"""Memory that others read without asking: the protocol, and one in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

__all__ = ["Get", "VirtualWindow", "Window"]


class Get(Protocol):
    """A read in progress. Its destination must not be touched until `test` has returned True."""

    def test(self) -> bool:
        """Returns whether it is complete, letting it progress."""


class Window(Protocol):
    """This rank's memory that others may read at any time, while it is written to, too: readers check.

    Attributes:
        memory: uint8, this rank's own.
    """

    memory: torch.Tensor

    def get(self, rank: int, offset: int, out: torch.Tensor) -> Get:
        """Starts to read from a rank's memory.

        Args:
            rank: whose.
            offset: first byte.
            out: contiguous; its bytes are filled. Mutated until the Get is complete.
        """

    def sync(self) -> None:
        """Orders this rank's writes: what was written before is seen before what is written after."""


class VirtualWindow:
    """Windows of ranks in one process.

    Args:
        memories: of all ranks; one that is not there yet is waited for.
        rank: this one.

    Attributes:
        during: called in the middle of each read of more than a header; may write to what is read.
    """

    def __init__(self, memories: dict[int, torch.Tensor], rank: int) -> None:
        self.memory = memories[rank]
        self.during: Callable[[], None] | None = None
        self._memories = memories

    def get(self, rank: int, offset: int, out: torch.Tensor) -> Get:
        """See `Window.get`: reads one half, then the other."""
        return _VirtualGet(self, self._memories, rank, offset, out)

    def sync(self) -> None:
        """Does nothing: there is one thread."""


class _VirtualGet:
    def __init__(
        self, window: VirtualWindow, memories: dict[int, torch.Tensor], rank: int, offset: int, out: torch.Tensor
    ) -> None:
        self._window = window
        self._memories = memories
        self._where = rank, offset
        self._target = out.view(torch.uint8)

    def test(self) -> bool:
        """Reads, if there is something to read."""
        rank, offset = self._where
        if rank not in self._memories:
            return False
        target, half = self._target, len(self._target) // 2
        source = self._memories[rank][offset : offset + len(target)]
        target[:half] = source[:half]
        if self._window.during is not None and len(target) > 64:
            self._window.during()
        target[half:] = source[half:]
        return True
