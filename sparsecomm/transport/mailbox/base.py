"""Messages of unknown length from anyone: what a parameter server needs and collectives do not.

A `Mailbox` belongs to one rank. It never blocks.
"""

from __future__ import annotations

from typing import Protocol

import torch

from sparsecomm.transport.base import Traffic

__all__ = ["Mailbox"]


class Mailbox(Protocol):
    """One rank's mailbox. Messages from one rank to another keep their order; used by one thread.

    Attributes:
        rank: this rank.
        size: number of ranks at the start.
        fault_tolerant: whether the others go on when one dies; else the launcher ends the job.
        traffic: what this rank sent and received.
    """

    rank: int
    size: int
    fault_tolerant: bool
    traffic: Traffic

    def send(self, dest: int, message: torch.Tensor) -> None:
        """Starts to send a contiguous uint8 tensor, which must not change any more. To a dead rank it does nothing."""

    def receive(self) -> tuple[int, torch.Tensor] | None:
        """Returns the next message that has arrived and its sender, or None.

        Raises:
            TransportError: if the transport failed other than by the death of a rank.
        """

    def lost(self) -> frozenset[int]:
        """Returns the ranks that are known to be dead. It only grows."""

    def flushed(self) -> bool:
        """Returns whether all that was sent to the living has left, letting it progress."""
