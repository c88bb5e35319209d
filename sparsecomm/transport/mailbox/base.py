"""The mailbox protocol: messages of unknown length from any rank.

A parameter server needs them; collectives do not. A `Mailbox` belongs to one rank and never blocks.
"""

from __future__ import annotations

from typing import Protocol

import torch

from sparsecomm.transport.base import Traffic

__all__ = ["Mailbox"]


class Mailbox(Protocol):
    """The mailbox of one rank, used by one thread. Messages from one rank to another keep their order.

    Attributes:
        rank: This rank.
        size: Number of ranks at the start of the job.
        fault_tolerant: Whether the other ranks continue when one dies. If not, the launcher ends the job.
        traffic: Messages and bytes that this rank has sent and received.
    """

    rank: int
    size: int
    fault_tolerant: bool
    traffic: Traffic

    def send(self, dest: int, message: torch.Tensor) -> None:
        """Starts to send a contiguous uint8 tensor. Does nothing if `dest` is dead.

        The tensor must not change afterwards.
        """

    def receive(self) -> tuple[int, torch.Tensor] | None:
        """Returns the sender and the content of the next message that has arrived, or None.

        Raises:
            TransportError: if the transport failed for another reason than the death of a rank.
        """

    def lost(self) -> frozenset[int]:
        """Returns all ranks that are known to be dead. The set only grows."""

    def flushed(self) -> bool:
        """Makes progress and returns whether all messages to living ranks have left."""
