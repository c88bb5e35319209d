"""What is said of a server when something is wrong."""

from __future__ import annotations

from sparsecomm.ps.server.server import Server

__all__ = ["deserted", "waits_for"]


def waits_for(server: Server) -> str:
    """Says whom a server waits for, for error messages."""
    alive = sorted({w for s in server.shards.values() for w in s.clocks} or server.roster.living_workers)
    if alive:
        return f"messages of worker{'s' * (len(alive) > 1)} at rank {', '.join(map(str, alive))}"
    return f"servers at rank {', '.join(map(str, sorted(server.roster.others)))} to end"


def deserted(server: Server) -> bool:
    """Returns whether no worker has ended its training: all have died or failed."""
    return not any(why == "ended" for shard in server.shards.values() for why in shard.gone.values())
