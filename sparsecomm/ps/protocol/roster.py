"""Who is alive, and which server owns which shard. Every rank derives the same answer from the deaths that it knows."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Roster", "ring"]


def ring(servers: tuple[int, ...], shard: int) -> tuple[int, ...]:
    """Returns the servers' ranks in the order in which they own a shard, each after the death of those before it."""
    return servers[shard:] + servers[:shard]


class Roster:
    """The ranks of a job, as one server knows them.

    Args:
        rank: Rank of this server.
        servers: Ranks of all servers, by index.
        workers: Ranks of all workers.
        replicate: Whether shards have backups.

    Attributes:
        lost: Ranks that are dead.
        ended: Servers whose work is done.
        departed: Workers that have said BYE.
    """

    def __init__(self, rank: int, servers: tuple[int, ...], workers: Iterable[int], replicate: bool) -> None:
        self.rank = rank
        self.servers = servers
        self.workers = tuple(workers)
        self.lost: frozenset[int] = frozenset()
        self.ended: set[int] = set()
        self.departed: set[int] = set()
        self._replicate = replicate

    def owner(self, shard: int) -> int | None:
        """Returns the rank that owns a shard now, the first living one in its ring; None if all are dead."""
        return next((r for r in ring(self.servers, shard) if r not in self.lost), None)

    def backup(self, shard: int) -> int | None:
        """Returns the rank that keeps the copy of a shard of this server: the next one that is still at work."""
        if not self._replicate:
            return None
        away = self.lost | self.ended | {self.rank}
        return next((r for r in ring(self.servers, shard) if r not in away), None)

    def inherits(self, shard: int) -> bool:
        """Returns whether this server owns a shard because the servers before it died at work."""
        before = self._before(shard)
        return self.owner(shard) == self.rank and bool(before) and not self.ended.intersection(before)

    def has_lost(self, shard: int) -> bool:
        """Returns whether updates of a shard that no server has may be lost.

        They are lost if its owner died, and any backup that it had: an owner acknowledges nothing that its backup has
        not stored.
        """
        return len(self.lost.intersection(self._before(shard)) - self.ended) > self._replicate

    def _before(self, shard: int) -> tuple[int, ...]:
        """Returns the servers that come before this one in a shard's ring."""
        order = ring(self.servers, shard)
        return order[: order.index(self.rank)]

    def joined(self, worker: int) -> None:
        """Adds a worker unless it is known."""
        if worker not in self.workers:
            self.workers += (worker,)

    @property
    def living_workers(self) -> list[int]:
        """Ranks of workers that have neither died nor said BYE."""
        return [w for w in self.workers if w not in self.departed and w not in self.lost]

    @property
    def others(self) -> set[int]:
        """Ranks of the other servers that are alive and at work."""
        return set(self.servers) - {self.rank} - self.lost - self.ended
