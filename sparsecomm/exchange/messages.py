"""Whole payloads between two ranks, the receiver knowing neither length nor content.

Cost: two messages, the header and the body; the header alone if the body is empty.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from sparsecomm.errors import WireError
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps, Request
from sparsecomm.wire import (
    HEADER_BYTES,
    Header,
    read_header,
)

__all__ = ["receive_payload", "send_payload"]


def send_payload(channel: Channel, payload: torch.Tensor, dest: int) -> list[Request]:
    """Starts to send a payload.

    Args:
        channel: the ranks.
        payload: uint8, header and body, nothing after it.
        dest: to whom.
    """
    requests = [channel.isend(payload[:HEADER_BYTES], dest)]
    if payload.numel() > HEADER_BYTES:
        requests.append(channel.isend(payload[HEADER_BYTES:], dest))
    return requests


def receive_payload(
    channel: Channel, source: int, like: Header, arena: Arena, key: Hashable, *, author: int | None = None
) -> CollectiveSteps[tuple[Header, torch.Tensor]]:
    """Receives a payload, of which the header is checked and the body is not.

    Args:
        channel: the ranks.
        source: from whom.
        like: a header of the same exchange.
        arena: gives the buffer.
        key: names it.
        author: who made the payload, if not `source`.

    Returns:
        Header, and payload: uint8, the header's bytes first; in the arena, until the next use of the key.

    Raises:
        WireError: for a damaged header or one of another exchange; names the author and the bucket.
    """
    made_by = source if author is None else author
    head = arena.get((key, "head"), HEADER_BYTES, torch.uint8)
    yield [channel.irecv(head, source)]
    try:
        header = read_header(head)
    except WireError as error:
        raise error.at(rank=made_by, bucket=like.bucket) from None
    for field in ("world", "step", "bucket", "numel", "layout_hash"):
        if getattr(header, field) != getattr(like, field):
            reason = f"this rank is in an exchange with {getattr(like, field)}"
            raise WireError(field, getattr(header, field), reason, rank=made_by, bucket=like.bucket)
    if header.rank != made_by:
        raise WireError("rank", header.rank, "not the sender's", rank=made_by, bucket=like.bucket)
    length = HEADER_BYTES + header.body_bytes
    payload = arena.get((key, "payload"), length, torch.uint8, reserve=2 * length)
    payload[:HEADER_BYTES] = head
    if header.body_bytes:
        yield [channel.irecv(payload[HEADER_BYTES:], source)]
    return header, payload
