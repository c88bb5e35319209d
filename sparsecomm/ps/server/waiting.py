"""Messages that a server cannot handle yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsecomm.errors import WireError
from sparsecomm.ps.protocol.messages import Envelope

__all__ = ["Deferred", "Waiting"]

_MOST_BYTES = 1 << 26
"""Bytes of messages that wait, of all senders together that are no workers of the job yet."""


@dataclass(frozen=True)
class Deferred:
    """A message that waits.

    Most are about a shard of another server: their sender has heard of that server's death before this one has.

    Attributes:
        since: Time at which it was put aside, in seconds.
        envelope: Its envelope.
        message: The message, uint8.
    """

    since: float
    envelope: Envelope
    message: torch.Tensor


class Waiting:
    """The messages that wait, at most one of a kind per sender and shard, as a worker has no more requests open.

    Args:
        now: Returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._kept: dict[tuple[int, int, int], Deferred] = {}

    def put(self, envelope: Envelope, message: torch.Tensor, *, stranger: bool) -> None:
        """Puts a message aside, in place of an earlier one of its kind.

        Args:
            envelope: Envelope of the message.
            message: The message, uint8.
            stranger: Whether its sender is no worker of the job yet.

        Raises:
            WireError: If it comes from a stranger and too many bytes wait already.
        """
        key = (envelope.sender, envelope.kind, envelope.shard)
        self._kept.pop(key, None)
        waiting = sum(entry.message.numel() for entry in self._kept.values()) if stranger else 0
        if waiting + message.numel() > _MOST_BYTES and stranger:
            raise WireError("body_bytes", message.numel(), "too many wait already; try again", rank=envelope.sender)
        self._kept[key] = Deferred(self._now(), envelope, message)

    def keep(self, entry: Deferred) -> None:
        """Puts a message back that still has to wait."""
        self._kept[entry.envelope.sender, entry.envelope.kind, entry.envelope.shard] = entry

    def take(self) -> list[Deferred]:
        """Removes and returns all messages, the oldest first."""
        found = list(self._kept.values())
        self._kept.clear()
        return found
