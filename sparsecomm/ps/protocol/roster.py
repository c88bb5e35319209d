"""Who is alive, and which server answers for which shard: what every rank works out alike from who has died."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Roster", "ring"]


def ring(servers: tuple[int, ...], shard: int) -> tuple[int, ...]:
    """Returns the servers' ranks in the order in which they answer for a shard as those before them die."""
    return servers[shard:] + servers[:shard]


class Roster:
    """What one server knows of all ranks.

    Args:
        rank: of this server.
        servers: ranks of all servers, by index.
        workers: ranks of all workers.
        replicate: whether shards have backups.

    Attributes:
        lost: ranks that are dead.
        ended: servers whose work is done.
        left: workers that have said goodbye.
    """

    def __init__(self, rank: int, servers: tuple[int, ...], workers: Iterable[int], replicate: bool) -> None:
        self.rank = rank
        self.servers = servers
        self.workers = tuple(workers)
        self.lost: frozenset[int] = frozenset()
        self.ended: set[int] = set()
        self.left: set[int] = set()
        self._replicate = replicate

    def owner(self, shard: int) -> int | None:
        """Returns the rank that answers for a shard now: the first living one from its own server on."""
        return next((r for r in ring(self.servers, shard) if r not in self.lost), None)

    def backup(self, shard: int) -> int | None:
        """Returns the rank that keeps the copy of a shard that this server owns: the next one that is still at work."""
        if not self._replicate:
            return None
        away = self.lost | self.ended | {self.rank}
        return next((r for r in ring(self.servers, shard) if r not in away), None)

    def inherits(self, shard: int) -> bool:
        """Returns whether this server answers for a shard because the one before it died at work."""
        before = self._before(shard)
        return self.owner(shard) == self.rank and bool(before) and not self.ended.intersection(before)

    def has_lost(self, shard: int) -> bool:
        """Returns whether updates of a shard that is nowhere may be lost: with its owner and any backup it had.

        An owner acknowledges nothing that its backup does not have.
        """
        return len(self.lost.intersection(self._before(shard)) - self.ended) > self._replicate

    def _before(self, shard: int) -> tuple[int, ...]:
        """Returns the servers that answer for a shard before this one does."""
        order = ring(self.servers, shard)
        return order[: order.index(self.rank)]

    def joined(self, worker: int) -> None:
        """Notes a worker; does nothing for one that is known."""
        if worker not in self.workers:
            self.workers += (worker,)

    @property
    def living_workers(self) -> list[int]:
        """Ranks of workers that are neither dead nor gone."""
        return [w for w in self.workers if w not in self.left and w not in self.lost]

    @property
    def others(self) -> set[int]:
        """Ranks of the other servers that are alive and at work."""
        return set(self.servers) - {self.rank} - self.lost - self.ended
