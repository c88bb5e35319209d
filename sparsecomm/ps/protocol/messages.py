"""The messages between workers and servers: an envelope of 56 bytes, then a body.

| kind | sender -> receiver | body | answer |
|---|---|---|---|
| 1 HELLO | worker -> server | JSON: names and shapes, hash of the initial values, number of shards, mode | WELCOME |
| 2 WELCOME | server -> worker | | INIT, if flag 1 is set: the worker must send the shard's first values |
| 3 INIT | worker -> server | payload: the shard's first values | ACK |
| 4 PUSH | worker -> server | marks and a payload (gradient.py; collective 12) | ACK; with the flag PENDING, at COMMIT |
| 5 ACK | server -> worker | | |
| 6 PULL | worker -> server | | VALUES, as soon as the mode allows |
| 7 VALUES | server -> worker | payload (docs/wire-format.md, collective 13) | |
| 8 BYE | worker -> server | text: why the worker leaves; empty at the end of training | ACK |
| 9 STATS | worker -> server | | STATS with JSON |
| 10 REJECT | server -> worker | text: why a message was refused | |
| 11 EVENT | server -> its backup | a PUSH or JOIN as it came, or a BYE in a worker's name | STORED |
| 12 SNAPSHOT | server -> its backup | a whole shard with its optimizer and open rounds | STORED |
| 13 STORED | backup -> server | | |
| 14 DONE | server -> other servers | none; it says that all workers have left the sender's shards | |
| 15 JOIN | later worker -> server | none; the clock is its first one | ACK; flag 1 for too late, with a clock offered |
| 16 COMMIT | worker -> server | none; the PUSH of this clock counts now | the ACK of the PUSH that it completes |
| 17 PING | worker -> server | none; the clock says how many zero bytes to send back | PING with them |
| 18 LATE | worker -> server | none; the clock is the worker's | LATE with text: whom the server waits for |
| 19 BEGIN | first living server -> others | JSON: the run, and the version that it resumes; or why not | |

Rules:

- Workers ask and servers answer. A request that is refused is answered by REJECT and changes nothing.
- A worker has at most one request of a kind open per shard. When the shard's server dies, the worker sends its open
  requests to the next server, so a request that arrives twice must have the same effect as one.
- Answers to PUSH and PULL repeat the request's clock. A worker ignores an answer to any but its open request.
- If a worker dies before its INIT has come, the server asks another worker for one.
- An answer that shows a change of a shard leaves only after the shard's backup has stored that change.
- A server believes nothing in a message before both checksums fit and every position and value has been decoded.

To add a message, add its kind here and to the table, a handler to `Server` (server/server.py), and a call of
`Client.ask` (worker/client.py), where `_REQUEST_OF` says which request an answer belongs to. A number is never reused.

The envelope, little-endian:

| offset | bytes | field | content |
|---|---|---|---|
| 0 | 4 | magic | "SPPS" |
| 4 | 1 | version | 3 |
| 5 | 1 | kind | see above |
| 6 | 2 | flags | see below |
| 8 | 4 | shard | |
| 12 | 4 | sender | rank; must be the rank that the message came from |
| 16 | 8 | clock | pushes that the worker did before; ACK of a JOIN: the clock offered; PING: bytes |
| 24 | 8 | version | see below |
| 32 | 8 | seq | number of an event between servers; of an ACK the kind that it acknowledges; of a PUSH bytes of marks |
| 40 | 8 | body bytes | |
| 48 | 4 | body crc | CRC32C; of a PUSH that of the marks; 0 in INIT, VALUES and EVENT |
| 52 | 4 | envelope crc | CRC32C of bytes 0..51 |

Payloads and the messages in an EVENT carry checksums themselves.

Flags: PENDING of a PUSH, WHOLE of a PULL, READY of a PING. WELCOME: 1 asks for INIT. VALUES: 1 says that the body is a
whole shard. ACK: the staleness of a PUSH in updates, at most 65535; of a JOIN 1 for too late. Otherwise 0.

Versions of the shard: PUSH the one that the gradient was computed on; PULL 1 + the one that the worker has, or 0 if it
has none; ACK and VALUES the current one. Otherwise 0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

from sparsecomm import kernels
from sparsecomm.errors import WireError
from sparsecomm.wire import Record

__all__ = [
    "BETWEEN_SERVERS",
    "ENVELOPE_BYTES",
    "LONGEST_REQUEST",
    "MAX_MESSAGE",
    "MAX_PING",
    "NOTHING",
    "PENDING",
    "READY",
    "SEALED",
    "WHOLE",
    "Envelope",
    "Kind",
    "json_body",
    "pack",
    "read_json",
    "read_text",
    "text",
    "unpack",
]

MAGIC = b"SPPS"
VERSION = 3
_RECORD = Record(
    "envelope",
    (
        ("kind", "B"),
        ("flags", "H"),
        ("shard", "I"),
        ("sender", "I"),
        ("clock", "q"),
        ("version", "q"),
        ("seq", "q"),
        ("body_bytes", "Q"),
        ("body_crc", "I"),
    ),
    magic=MAGIC,
    version=VERSION,
    crc="envelope_crc",
)
ENVELOPE_BYTES = _RECORD.nbytes
MAX_SHARDS = 1 << 16
NOTHING = torch.empty(0, dtype=torch.uint8)


class Kind(IntEnum):
    """Kinds of messages, as in the table at the top of this file."""

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
    LATE = 18
    BEGIN = 19


PENDING = 1
"""Flag of a PUSH that counts only once a COMMIT has come."""

WHOLE = 1
"""Flag of a PULL that asks for the whole shard, whatever the worker has."""

READY = 1
"""Flag of a PING that is answered once all workers have said HELLO and the shard has values."""

MAX_PING = 1 << 20
"""Most bytes that a PING may ask for."""

MAX_COUNT = 1 << 48
"""Most that a clock, a version or a number of an event can be."""

MAX_MESSAGE = 1 << 30
"""Most bytes of a message."""

LONGEST_TEXT = 4096
"""Bytes of a text."""

_NO_BODY = (Kind.PULL, Kind.STATS, Kind.JOIN, Kind.COMMIT, Kind.PING, Kind.LATE)
LONGEST_REQUEST = dict.fromkeys(_NO_BODY, 0) | {Kind.HELLO: 1 << 26, Kind.BYE: LONGEST_TEXT}
"""Most bytes in the body of a worker's request, by kind. Those with payloads are bounded by the shard."""

SEALED = frozenset({Kind.INIT, Kind.VALUES, Kind.EVENT})
"""Kinds whose whole body is covered by checksums inside it, so that the envelope does not need one."""

BETWEEN_SERVERS = frozenset({Kind.EVENT, Kind.SNAPSHOT, Kind.STORED, Kind.DONE, Kind.BEGIN})
"""Kinds that only a server may send, and only to a server."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fixed part of a message.

    Attributes:
        kind: Kind of the message.
        shard: Index of the shard that it concerns.
        sender: Rank of its sender.
        clock: Pushes that the worker had done before; other meanings are in the table above.
        version: Version of the shard; of a PUSH the one that the gradient was computed on, of a PULL 1 + the worker's.
        seq: Number of a replicated event; of an ACK the kind that it acknowledges; of a PUSH bytes of marks; else 0.
        flags: `PENDING` of a PUSH, `WHOLE` of a PULL, `READY` of a PING, the staleness in an ACK of a PUSH; 1 in some
            answers, see above.
    """

    kind: Kind
    shard: int
    sender: int
    clock: int = 0
    version: int = 0
    seq: int = 0
    flags: int = 0


def pack(envelope: Envelope, body: torch.Tensor = NOTHING) -> torch.Tensor:
    """Returns a message of `ENVELOPE_BYTES + body.numel()` bytes, uint8."""
    e = envelope
    out = torch.empty(ENVELOPE_BYTES + body.numel(), dtype=torch.uint8)
    out[ENVELOPE_BYTES:] = body
    crc = kernels.crc32c(_covered(e.kind, e.seq, out[ENVELOPE_BYTES:]))
    _RECORD.write(out, (e.kind, e.flags, e.shard, e.sender, e.clock, e.version, e.seq, body.numel(), crc))
    return out


def unpack(message: torch.Tensor, source: int | None) -> tuple[Envelope, torch.Tensor]:
    """Reads and checks a message.

    Args:
        message: uint8, as it arrived.
        source: Rank that the transport names as the sender; None for a message inside another one.

    Returns:
        The envelope, and the body as a view of `message`.

    Raises:
        WireError: If a field is wrong. It names the first such field, its value and the source.
    """

    def bad(field: str, value: object, reason: str) -> WireError:
        return WireError(field, value, reason, rank=source)

    try:
        kind, flags, shard, sender, clock, at, seq, length, body_crc = _RECORD.read(message)
    except WireError as error:
        raise error.at(rank=source) from None
    if kind not in _KINDS:
        raise bad("kind", kind, f"known are 1 to {len(_KINDS)}")
    if source is not None and sender != source:
        raise bad("sender", sender, f"it came from rank {source}")
    if shard >= MAX_SHARDS:
        raise bad("shard", shard, f"at most {MAX_SHARDS - 1}")
    if not 0 <= min(clock, at, seq) <= max(clock, at, seq) <= MAX_COUNT:
        raise bad("clock, version, seq", (clock, at, seq), f"must be 0 to {MAX_COUNT}")
    body = message[ENVELOPE_BYTES:]
    if length != body.numel():
        raise bad("body_bytes", length, f"{body.numel()} bytes follow the envelope")
    found = kernels.crc32c(_covered(kind, seq, body))
    if found != body_crc:
        raise bad("body_crc", hex(body_crc), f"the body's checksum is {found:#x}")
    return Envelope(Kind(kind), shard, sender, clock, at, seq, flags), body


def _covered(kind: int, seq: int, body: torch.Tensor) -> torch.Tensor:
    """Returns the part of a body that the envelope's checksum covers."""
    if kind == Kind.PUSH:
        return body[:seq]
    return NOTHING if kind in SEALED else body


_KINDS = {int(k) for k in Kind}


def json_body(content: Any) -> torch.Tensor:
    """Returns a body with JSON in UTF-8."""
    return torch.frombuffer(bytearray(json.dumps(content, separators=(",", ":")).encode()), dtype=torch.uint8)


def text(content: str) -> torch.Tensor:
    """Returns a body with a string in UTF-8, cut to `LONGEST_TEXT` bytes."""
    data = content[:LONGEST_TEXT].encode(errors="replace")[:LONGEST_TEXT]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else NOTHING


def read_text(body: torch.Tensor) -> str:
    """Returns the string in a body that `text` made; bytes that are not UTF-8 are replaced."""
    return bytes(body[:LONGEST_TEXT].numpy()).decode(errors="replace")


def read_json(body: torch.Tensor, fields: dict[str, type], source: int) -> dict[str, Any]:
    """Reads a JSON object with exactly these fields.

    Args:
        body: Body of a message.
        fields: Type of each field, by name.
        source: Rank of the sender, for errors.

    Raises:
        WireError: If the body is anything else. It names the source.
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
