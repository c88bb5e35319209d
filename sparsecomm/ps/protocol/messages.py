"""What workers and servers say to each other: a fixed envelope and a body, as docs/parameter-server.md specifies."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

from sparsecomm import kernels
from sparsecomm.errors import WireError

__all__ = [
    "ENVELOPE_BYTES",
    "FROM_SERVERS",
    "HELD",
    "MAX_PING",
    "NOTHING",
    "READY",
    "SEALED",
    "WHOLE",
    "Envelope",
    "Kind",
    "json_body",
    "pack",
    "read_text",
    "text",
    "unpack",
    "unpack_json",
]

MAGIC = b"SPPS"
VERSION = 2
_FORMAT = struct.Struct("<4sBBHIIqqqQII")
ENVELOPE_BYTES = _FORMAT.size
_CRC_OFFSET = ENVELOPE_BYTES - 4
MAX_SHARDS = 1 << 16
NOTHING = torch.empty(0, dtype=torch.uint8)


class Kind(IntEnum):
    """What a message is. See docs/parameter-server.md for who sends it when, and for its body."""

    HELLO = 1
    WELCOME = 2
    INIT = 3
    PUSH = 4
    ACK = 5
    PULL = 6
    VALUES = 7
    BYE = 8
    STATS = 9
    REJECT = 10
    EVENT = 11
    SNAPSHOT = 12
    STORED = 13
    DONE = 14
    JOIN = 15
    COMMIT = 16
    PING = 17


HELD = 1
"""Flag of a PUSH: it counts only when a COMMIT has come."""

WHOLE = 1
"""Flag of a PULL: the whole shard is wanted, whatever the worker has."""

READY = 1
"""Flag of a PING: to be answered when all workers have said HELLO and the shard has values."""

MAX_PING = 1 << 20

SEALED = frozenset({Kind.INIT, Kind.PUSH, Kind.VALUES, Kind.EVENT})
"""Messages whose bodies have checksums of their own all through: no second pass over them."""

FROM_SERVERS = frozenset({Kind.EVENT, Kind.SNAPSHOT, Kind.STORED, Kind.DONE})
"""What only a server may send to a server."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fixed part of a message.

    Attributes:
        kind: what it is.
        shard: which shard it is about.
        sender: rank of whoever sent it.
        clock: a worker's clock: pushes it had done before.
        version: a version of the shard: updates it has seen; of a PUSH the one that the gradient was computed on.
        seq: number of a replicated event; 0 otherwise.
        flags: of a PUSH `HELD`, of a PULL `WHOLE`, of a PING `READY`, or 0; of an ACK how it was; else 0.
    """

    kind: Kind
    shard: int
    sender: int
    clock: int = 0
    version: int = 0
    seq: int = 0
    flags: int = 0


def pack(envelope: Envelope, body: torch.Tensor = NOTHING) -> torch.Tensor:
    """Returns a message: uint8, ENVELOPE_BYTES + body.numel() long."""
    e = envelope
    out = torch.empty(ENVELOPE_BYTES + body.numel(), dtype=torch.uint8)
    out[ENVELOPE_BYTES:] = body
    crc = 0 if e.kind in SEALED else kernels.crc32c(out[ENVELOPE_BYTES:])
    view: Any = out.numpy()
    fields = (e.flags, e.shard, e.sender, e.clock, e.version, e.seq, body.numel(), crc, 0)
    _FORMAT.pack_into(view, 0, MAGIC, VERSION, e.kind, *fields)
    struct.pack_into("<I", view, _CRC_OFFSET, kernels.crc32c(out[:_CRC_OFFSET]))
    return out


def unpack(message: torch.Tensor, source: int | None) -> tuple[Envelope, torch.Tensor]:
    """Reads and checks a message.

    Args:
        message: uint8, as it arrived.
        source: the rank that the transport says it came from; None inside another message.

    Returns:
        The envelope, and the body as a view.

    Raises:
        WireError: names the first field that is wrong, its value and the source.
    """

    def bad(field: str, value: object, reason: str) -> WireError:
        return WireError(field, value, reason, rank=source)

    if message.numel() < ENVELOPE_BYTES:
        raise bad("length", message.numel(), f"an envelope has {ENVELOPE_BYTES} bytes")
    view: Any = message.numpy()
    magic, version, kind, flags, shard, sender, clock, at, seq, length, body_crc, crc = _FORMAT.unpack_from(view, 0)
    if magic != MAGIC:
        raise bad("magic", magic, f"expected {MAGIC!r}")
    if version != VERSION:
        raise bad("version", version, f"this build speaks version {VERSION}")
    found = kernels.crc32c(message[:_CRC_OFFSET])
    if found != crc:
        raise bad("envelope_crc", hex(crc), f"the envelope's checksum is {found:#x}")
    if kind not in _KINDS:
        raise bad("kind", kind, f"known are 1 to {len(_KINDS)}")
    if source is not None and sender != source:
        raise bad("sender", sender, f"it came from rank {source}")
    if shard >= MAX_SHARDS:
        raise bad("shard", shard, f"at most {MAX_SHARDS}")
    if min(clock, at, seq) < 0:
        raise bad("clock, version, seq", (clock, at, seq), "negative")
    body = message[ENVELOPE_BYTES:]
    if length != body.numel():
        raise bad("body_bytes", length, f"{body.numel()} bytes follow the envelope")
    found = 0 if kind in SEALED else kernels.crc32c(body)
    if found != body_crc:
        raise bad("body_crc", hex(body_crc), f"the body's checksum is {found:#x}")
    return Envelope(Kind(kind), shard, sender, clock, at, seq, flags), body


_KINDS = {int(k) for k in Kind}


def json_body(content: Any) -> torch.Tensor:
    """Returns JSON in UTF-8 as a body."""
    return torch.frombuffer(bytearray(json.dumps(content, separators=(",", ":")).encode()), dtype=torch.uint8)


def text(content: str) -> torch.Tensor:
    """Returns a string as a body: UTF-8, cut to 4096 bytes."""
    data = content.encode(errors="replace")[:4096]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else NOTHING


def read_text(body: torch.Tensor) -> str:
    """Returns what `text` made, whatever it holds."""
    return bytes(body.numpy()).decode(errors="replace")


def unpack_json(body: torch.Tensor, fields: dict[str, type], source: int) -> dict[str, Any]:
    """Reads a JSON object with exactly these fields.

    Raises:
        WireError: if it is something else; names the source.
    """
    try:
        content = json.loads(bytes(body.numpy()).decode())
    except (ValueError, RecursionError) as error:
        raise WireError("json", bytes(body[:40].tolist()), str(error), rank=source) from None
    if not isinstance(content, dict) or set(content) != set(fields):
        raise WireError("json", str(content)[:80], f"expected the fields {', '.join(fields)}", rank=source)
    for name, kind in fields.items():
        if type(content[name]) is not kind:
            raise WireError(name, str(content[name])[:80], f"must be {kind.__name__}", rank=source)
    return content
