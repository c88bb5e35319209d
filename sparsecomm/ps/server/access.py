"""Checks that a sender may send a message to a server, and of that length."""

from __future__ import annotations

from sparsecomm.errors import WireError
from sparsecomm.ps.protocol import messages as ms
from sparsecomm.ps.protocol.messages import Envelope, Kind

__all__ = ["check_access"]

_FOR_SERVERS = frozenset(ms.LONGEST_REQUEST) | {Kind.INIT, Kind.PUSH} | ms.BETWEEN_SERVERS


def check_access(envelope: Envelope, nbytes: int, servers: tuple[int, ...], longest_payload: int) -> None:
    """Checks a message to a server.

    Args:
        envelope: Envelope of the message.
        nbytes: Length of its body.
        servers: Ranks of all servers.
        longest_payload: Most bytes in the body of a PUSH or INIT.

    Raises:
        WireError: If the message may not come. It names the field, its value and the sender.
    """
    source, kind = envelope.sender, envelope.kind
    if kind not in _FOR_SERVERS:
        raise WireError("kind", kind.name, "not for a server", rank=source)
    if (kind in ms.BETWEEN_SERVERS) != (source in servers):
        raise WireError("kind", kind.name, "not for this sender to send", rank=source)
    if envelope.shard >= len(servers):
        raise WireError("shard", envelope.shard, f"there are {len(servers)}", rank=source)
    longest = ms.LONGEST_REQUEST.get(kind, longest_payload)
    if kind not in ms.BETWEEN_SERVERS and nbytes > longest:
        raise WireError("body_bytes", nbytes, f"{kind.name} has at most {longest} here", rank=source)
