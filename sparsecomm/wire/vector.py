"""A whole payload from one rank to another that knows neither its length nor whether there is one.

Cost: two messages, the header and the body; nothing but the header if the body is empty.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from sparsecomm.runtime.arena import Arena
from sparsecomm.types import Codecs, IndexCodec, Pairs, ValueCodec
from sparsecomm.wire.header import FLAG_NONFINITE, HEADER_BYTES, Header, write_header
from sparsecomm.wire.pairs import choose_index_codec, decode_body, encode_payload, max_payload_bytes

_NUMBER = 1  # in the header of a vector, whatever exchange it belongs to: number 1 is pairs

__all__ = ["Vector", "read_vector", "vector_header", "write_vector"]


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
        collective=_NUMBER,
        flags=0,
        nnz=0,
        tag=0,
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
