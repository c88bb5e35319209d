"""A whole payload from one rank to another that knows neither its length nor whether there is one.

Cost: two messages, the header and the body; nothing but the header if the body is empty.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from sparsecomm.arena import Arena
from sparsecomm.collectives.parts import Codecs, Pairs
from sparsecomm.errors import WireError
from sparsecomm.transport import Channel, CollectiveSteps, Request
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import (
    FLAG_NONFINITE,
    HEADER_BYTES,
    CollectiveKind,
    Header,
    choose_index_codec,
    decode_body,
    encode_payload,
    max_payload_bytes,
    read_header,
    write_header,
)

__all__ = ["Vector", "read_vector", "receive_payload", "send_payload", "vector_header", "write_vector"]


@dataclass(frozen=True, slots=True)
class Vector:
    """A sparse vector as a payload.

    Attributes:
        header: its header.
        payload: uint8, header and body.
        error: float32, shape (nnz,): what rounding dropped of the values.
    """

    header: Header
    payload: torch.Tensor
    error: torch.Tensor


def vector_header(like: Header) -> Header:
    """Returns a header for a sparse vector of an exchange, nothing of its content in it: kind 1, as in an allgather."""
    return replace(
        like,
        collective=CollectiveKind.ALLGATHER,
        flags=0,
        nnz=0,
        plan=0,
        value_codec=ValueCodec.FP32,
        index_codec=IndexCodec.RAW,
    )


def write_vector(like: Header, pairs: Pairs | None, codecs: Codecs, arena: Arena, key: Hashable) -> Vector:
    """Writes a sparse vector.

    Args:
        like: this rank's header in the exchange.
        pairs: what is in it; None for a sum that is not finite, of which only that is told.
        codecs: how to write it.
        arena: gives the buffers.
        key: names them.
    """
    header = vector_header(like)
    if pairs is None:
        header.flags = FLAG_NONFINITE
        payload = arena.get((key, "vector"), HEADER_BYTES, torch.uint8)
        write_header(header, payload)
        return Vector(header, payload, torch.empty(0))
    indices, values = pairs
    nnz = values.numel()
    header.value_codec = codecs.values
    header.index_codec = choose_index_codec(nnz, header.numel, codecs.indices)
    room = max_payload_bytes(header.index_codec, codecs.values, nnz, header.numel)
    payload = arena.get((key, "vector"), room, torch.uint8, reserve=2 * room)
    error = arena.get((key, "error"), nnz, torch.float32, reserve=2 * nnz)
    encode_payload(header, indices, values, payload, error)
    return Vector(header, payload[: HEADER_BYTES + header.body_bytes], error)


def read_vector(header: Header, payload: torch.Tensor, arena: Arena, key: Hashable) -> Pairs:
    """Decodes and checks a sparse vector; it is in the arena until the next use of the key.

    Raises:
        WireError: if anything in it is wrong; names its author and the bucket.
    """
    indices = arena.get((key, "indices"), header.nnz, torch.uint32, reserve=2 * header.nnz)
    values = arena.get((key, "values"), header.nnz, torch.float32, reserve=2 * header.nnz)
    decode_body(header, payload[HEADER_BYTES:], indices, values)
    return indices, values


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
