"""Where a split-reduce works: the ranks, the buffers, and the bucket that errors and buffers are named after."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel

__all__ = ["Context"]


@dataclass(frozen=True, slots=True)
class Context:
    """Where a split-reduce works.

    Attributes:
        channel: the ranks.
        arena: gives all buffers.
        bucket: bucket number.
    """

    channel: Channel
    arena: Arena
    bucket: int
