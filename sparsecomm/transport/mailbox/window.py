"""Memory that others read without asking: the protocol, and one in this process."""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["Get", "Window"]


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
