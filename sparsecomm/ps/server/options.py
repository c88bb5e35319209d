"""The options of one server: replication, checkpoints and its clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from sparsecomm.ps.server.checkpoint import Checkpoints

__all__ = ["ServerOptions"]


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The options of one server.

    Attributes:
        servers: Ranks of all servers, by index.
        replicate: Whether each shard has a copy on the next server.
        checkpoints: Where the servers save their shards, and whether they resume; None for no checkpoints.
        now: Returns the time in seconds, monotonic.
    """

    servers: tuple[int, ...]
    replicate: bool
    checkpoints: Checkpoints | None = None
    now: Callable[[], float] = monotonic
