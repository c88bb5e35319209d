"""The options of one server: replication, checkpoints and its clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from sparsecomm.ps.server.shard import Shard

__all__ = ["ServerOptions"]


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The options of one server.

    Attributes:
        servers: Ranks of all servers, by index.
        replicate: Whether each shard has a copy on the next server.
        restore: Loads the checkpoint of a new shard, if there is one.
        saved: Called with a shard after each of its updates; may save it.
        now: Returns the time in seconds, monotonic.
    """

    servers: tuple[int, ...]
    replicate: bool
    restore: Callable[[Shard], None] | None = None
    saved: Callable[[Shard], None] | None = None
    now: Callable[[], float] = monotonic

    def save(self, shard: Shard, events: list[str]) -> None:
        """Calls `saved` with a shard. A failure, such as a full disk, becomes an event: it must not end training."""
        try:
            if self.saved is not None:
                self.saved(shard)
        except OSError as error:
            events.append(f"version {shard.version} of shard {shard.spec.index} was not saved: {error}")
