"""Descriptions of a server's state for error messages."""

from __future__ import annotations

from sparsecomm.ps.server.server import Server

__all__ = ["deserted", "waits_for"]


def waits_for(server: Server) -> str:
    """Names the ranks that a server waits for."""
    alive = sorted({w for s in server.shards.values() for w in s.clocks} or server.roster.living_workers)
    if alive:
        return f"messages of worker{'s' * (len(alive) > 1)} at rank {', '.join(map(str, alive))}"
    return f"servers at rank {', '.join(map(str, sorted(server.roster.others)))} to end"


def deserted(server: Server) -> bool:
    """Returns whether all workers have died or failed, so that none has ended its training."""
    return not any(why == "ended" for shard in server.shards.values() for why in shard.gone.values())
