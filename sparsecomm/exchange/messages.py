"""Whole payloads between two ranks, where the receiver does not know the length.

Cost: two messages, the header and the body; only the header if the body is empty.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from sparsecomm.errors import WireError
from sparsecomm.runtime.arena import Arena
from sparsecomm.transport import Channel, CollectiveSteps, Request
from sparsecomm.wire import HEADER_BYTES, Header, read_header

__all__ = ["receive_payload", "send_payload"]


def send_payload(channel: Channel, payload: torch.Tensor, dest: int) -> list[Request]:
    """Starts to send a payload and returns the requests.

    Args:
        channel: connection to the other ranks.
        payload: uint8, exactly the header and the body.
        dest: rank to send to.
    """
    requests = [channel.isend(payload[:HEADER_BYTES], dest)]
    if payload.numel() > HEADER_BYTES:
        requests.append(channel.isend(payload[HEADER_BYTES:], dest))
    return requests


def receive_payload(
    channel: Channel, source: int, like: Header, arena: Arena, key: Hashable, *, author: int | None = None
) -> CollectiveSteps[tuple[Header, torch.Tensor]]:
    """Receives a payload and checks its header, but not its body.

    Args:
        channel: connection to the other ranks.
        source: rank to receive from.
        like: a header of the same exchange.
        arena: allocates the buffers.
        key: name of the buffers.
        author: rank that made the payload, if `source` only forwards it.

    Returns:
        The header, and the payload: uint8, header and body. It is valid until the next use of the key.

    Raises:
        WireError: the header is damaged or belongs to another exchange. The error names the author and the bucket.
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
