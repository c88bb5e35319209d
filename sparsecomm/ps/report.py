"""Descriptions of a server's state for error messages."""

from __future__ import annotations

from sparsecomm.ps.server.late import ranks
from sparsecomm.ps.server.server import Server

__all__ = ["deserted", "waits_for"]


def waits_for(server: Server) -> str:
    """Names the ranks that a server waits for."""
    found = [server.late(index) for index in sorted({server.index, *server.shards})]
    return "; ".join(dict.fromkeys(filter(None, found))) or f"{ranks('server', server.roster.others)} to end"


def deserted(server: Server) -> bool:
    """Returns whether all workers have died or failed, so that none has ended its training."""
    return not any(why == "ended" for shard in server.shards.values() for why in shard.gone.values())
