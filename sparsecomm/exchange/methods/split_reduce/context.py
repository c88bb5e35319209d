"""The channel, the arena and the bucket of a split-reduce."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel

__all__ = ["Context"]


@dataclass(frozen=True, slots=True)
class Context:
    """The channel, the arena and the bucket of a split-reduce.

    Attributes:
        channel: connection to the other ranks.
        arena: allocates all buffers.
        bucket: bucket number, for errors and the names of buffers.
    """

    channel: Channel
    arena: Arena
    bucket: int
