"""The agreement: the first round of every exchange, after which all ranks know of a disagreement, failure or NaN.

In a small world every rank receives all headers: ceil(log2 P) messages, 88 (P - 1) bytes. In a large world ranks spread
a digest of 24 bytes in the same number of messages. The headers follow only for a method whose headers hold the lengths
of bodies, or to report a failure or a disagreement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from sparsecomm.collectives.gather import allgather, allgatherv_direct
from sparsecomm.errors import CollectiveMismatch, RemoteError, WireError
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import AgreedError, Channel, CollectiveSteps
from sparsecomm.wire import (
    FLAG_ERROR,
    FLAG_NONFINITE,
    HEADER_BYTES,
    Header,
    HeaderRules,
    Record,
    check_body,
    read_header,
    rules_of,
)

__all__ = ["DIGEST_ABOVE", "DIGEST_BYTES", "Agreement", "agree", "agreement_bytes"]

DIGEST_ABOVE = 16
"""Largest world in which headers are gathered without a digest first: 88 (P - 1) bytes cost less than more rounds."""

_MUST_MATCH = ("world", "step", "bucket", "numel", "layout_hash", "collective")
_matched = attrgetter(*_MUST_MATCH)
_DIGEST = Record(
    "digest",
    (("flags", "B"), ("reserved", "H"), ("digest", "Q"), ("tag", "I")),
    magic=b"SPCD",
    version=1,
    crc="digest_crc",
)
DIGEST_BYTES = _DIGEST.nbytes
_MISMATCH = 4
_OTHER_TAG = 8


@dataclass(frozen=True, slots=True)
class Agreement:
    """The result of an agreement.

    Attributes:
        nonfinite: whether some rank saw NaN or infinity.
        same_tag: whether the headers of all ranks have the same tag, and the tag is not 0.
        headers: all headers by rank; empty if they were not gathered.
    """

    nonfinite: bool
    same_tag: bool
    headers: list[Header]


def agree(
    channel: Channel, mine: Header, payload: torch.Tensor, arena: Arena, key: Hashable, *, gather: bool = True
) -> CollectiveSteps[Agreement]:
    """Checks that all ranks take part in the same exchange and that none has failed. Collective.

    Args:
        channel: connection to the other ranks.
        mine: this rank's header.
        payload: uint8, this rank's whole payload, which begins with that header.
        arena: allocates the receive buffers.
        key: name of the buffers.
        gather: whether the method needs all headers. In a small world they are always gathered.

    Returns:
        The agreement, the same on all ranks. No rank has reported an error.

    Raises:
        WireError: a message is damaged. The error names the sender.
        AgreedError: raised on every rank. Its cause is a CollectiveMismatch that lists the exchange of each rank, or a
            RemoteError that lists the failed ranks and their errors.
    """
    if channel.size > DIGEST_ABOVE:
        flags = yield from _spread_digests(channel, mine, arena, key)
        if not gather and not flags & (FLAG_ERROR | _MISMATCH):
            same_tag = mine.tag != 0 and not flags & _OTHER_TAG
            return Agreement(bool(flags & FLAG_NONFINITE), same_tag, [])
    headers = yield from _gather(channel, mine, payload, arena, key)
    if any(h.flags & FLAG_ERROR for h in headers):
        yield from _raise_remote(channel, payload, headers, arena, key)
    _check_match(headers)
    same_tag = mine.tag != 0 and all(h.tag == mine.tag for h in headers)
    return Agreement(any(h.flags & FLAG_NONFINITE for h in headers), same_tag, headers)


def _spread_digests(channel: Channel, mine: Header, arena: Arena, key: Hashable) -> CollectiveSteps[int]:
    """Combines the flags of all ranks and compares their digests, for any P.

    Before round j, rank r knows the combined flags of ranks r - 2^j + 1 .. r. In round j it sends them to rank r + 2^j
    and receives those of rank r - 2^j. In the last round the two sets of ranks may overlap. That does no harm, since
    "any" and "all equal" may count a rank twice.

    Returns:
        The flags that any rank has set, with _MISMATCH and _OTHER_TAG for digests and tags that differ.
    """
    size, rank = channel.size, channel.rank
    rounds = (size - 1).bit_length()
    work = arena.get((key, "digests"), 2 * rounds * DIGEST_BYTES, torch.uint8)
    digest = _digest(mine)
    flags, distance = mine.flags, 1
    for j in range(rounds):
        out = work[2 * j * DIGEST_BYTES : (2 * j + 1) * DIGEST_BYTES]
        into = work[(2 * j + 1) * DIGEST_BYTES : (2 * j + 2) * DIGEST_BYTES]
        _DIGEST.write(out, (flags, digest, mine.tag))
        source = (rank - distance) % size
        yield [channel.irecv(into, source), channel.isend(out, (rank + distance) % size)]
        try:
            their_flags, their_digest, their_tag = _read_digest(into)
        except WireError as error:
            raise error.at(rank=source, bucket=mine.bucket) from None
        flags |= their_flags
        flags |= _MISMATCH if their_digest != digest else 0
        flags |= _OTHER_TAG if their_tag != mine.tag else 0
        distance *= 2
    return flags


def _fields_to_match(header: Header) -> tuple[int, ...]:
    """Returns all header fields that must be the same on every rank."""
    more = rules_of(header.collective).must_match
    return (*(int(x) for x in _matched(header)), *(int(getattr(header, field)) for field in more))


def _digest(header: Header) -> int:
    text = repr(_fields_to_match(header)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _read_digest(data: torch.Tensor) -> tuple[int, int, int]:
    flags, digest, tag = _DIGEST.read(data)
    if flags & ~(FLAG_NONFINITE | FLAG_ERROR | _MISMATCH | _OTHER_TAG):
        raise WireError("flags", flags, "unknown bits")
    return flags, digest, tag


def _gather(
    channel: Channel, mine: Header, payload: torch.Tensor, arena: Arena, key: Hashable
) -> CollectiveSteps[list[Header]]:
    """Returns all headers by rank. Each of them is checked, but they are not compared."""
    block = payload[:HEADER_BYTES]
    blocks = [block]
    if channel.size > 1:
        blocks = yield from allgather(channel, block, arena, (key, "headers"))
    headers = []
    for rank, block in enumerate(blocks):
        if rank == channel.rank:
            headers.append(mine)
            continue
        try:
            header = read_header(block)
        except WireError as error:
            raise error.at(rank=rank, bucket=mine.bucket) from None
        if header.rank != rank:
            raise WireError("rank", header.rank, "not the sender's", rank=rank, bucket=mine.bucket)
        headers.append(header)
    return headers


def _check_match(headers: list[Header]) -> None:
    """Raises an AgreedError if headers differ. All ranks hold the same headers, so all raise the same error."""
    first = headers[0]
    same = _fields_to_match(first)
    if all(_fields_to_match(h) == same for h in headers[1:]):
        return
    rules = rules_of(first.collective)
    names = {field: field for field in _MUST_MATCH}
    differ = _differing(headers, names)
    if not differ:
        names = dict(rules.must_match)
        differ = _differing(headers, names)
    lines = []
    for h in headers:
        values = ", ".join(f"{names[f]} = {_show(rules, f, getattr(h, f))}" for f in differ)
        lines.append(f"rank {h.rank}: {values}")
    words = ", ".join(names[f] for f in differ)
    raise AgreedError(
        CollectiveMismatch(
            f"ranks disagree on {words} in bucket {first.bucket} of step {first.step}: "
            + "; ".join(lines)
            + ". Do all ranks build the same model, with the same options, and run the same steps?"
        )
    )


def _differing(headers: list[Header], fields: Iterable[str]) -> list[str]:
    return [f for f in fields if len({getattr(h, f) for h in headers}) > 1]


def _show(rules: HeaderRules, field: str, value: Any) -> str:
    if field == "layout_hash":
        return f"{value:#018x}"
    return rules_of(value).label if field == "collective" else rules.show(field, value)


def _raise_remote(
    channel: Channel, payload: torch.Tensor, headers: list[Header], arena: Arena, key: Hashable
) -> CollectiveSteps[None]:
    """Gathers the error messages of the failed ranks and raises them as one error."""
    lengths = [h.body_bytes if h.flags & FLAG_ERROR else 0 for h in headers]
    mine = payload[HEADER_BYTES : HEADER_BYTES + lengths[channel.rank]]
    bodies = yield from allgatherv_direct(channel, mine, lengths, arena, (key, "errors"))
    parts = []
    for header, body in zip(headers, bodies, strict=True):
        if header.flags & FLAG_ERROR:
            check_body(header, body)
            text = bytes(body.numpy()).decode("utf-8", "replace")
            parts.append(f"rank {header.rank} failed in bucket {header.bucket} of step {header.step}: {text}")
    raise AgreedError(RemoteError("; ".join(parts)))


def agreement_bytes(size: int) -> int:
    """Returns the bytes that each rank sends in an agreement of a method without bodies."""
    return HEADER_BYTES * (size - 1) if size <= DIGEST_ABOVE else DIGEST_BYTES * (size - 1).bit_length()
