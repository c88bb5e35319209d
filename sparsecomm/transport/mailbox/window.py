"""The window protocol: memory that other ranks read without this rank's help."""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["Get", "Window"]


class Get(Protocol):
    """A read in progress. Its destination must not be touched until `test` has returned True."""

    def test(self) -> bool:
        """Makes progress and returns whether the read is complete."""


class Window(Protocol):
    """Memory of this rank that other ranks may read at any time.

    A read may overlap with a write, so readers must check the bytes that they get.

    Attributes:
        memory: This rank's memory, uint8.
    """

    memory: torch.Tensor

    def get(self, rank: int, offset: int, out: torch.Tensor) -> Get:
        """Starts to read from the memory of a rank.

        Args:
            rank: Rank whose memory is read.
            offset: First byte to read.
            out: Contiguous destination, which is filled. Mutated until the Get is complete.
        """

    def sync(self) -> None:
        """Orders this rank's writes: readers see earlier writes before later ones."""
