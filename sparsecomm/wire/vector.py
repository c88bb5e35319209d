"""A sparse vector as a payload, sent to a rank that knows neither its length nor whether it is finite.

Cost: two messages, the header and the body; only the header if the body is empty.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from sparsecomm.runtime.arena import Arena
from sparsecomm.types import Codecs, IndexCodec, Pairs, ValueCodec
from sparsecomm.wire.header import FLAG_NONFINITE, HEADER_BYTES, Header, write_header
from sparsecomm.wire.pairs import choose_index_codec, decode_body, encode_payload, max_payload_bytes

_NUMBER = 1  # number in the header of a vector, for any exchange method: the body consists of pairs

__all__ = ["Vector", "read_vector", "vector_header", "write_vector"]


@dataclass(frozen=True, slots=True)
class Vector:
    """A sparse vector as a payload.

    Attributes:
        header: header of the payload.
        payload: uint8, header and body.
        error: float32, shape (nnz,), rounding of the values.
    """

    header: Header
    payload: torch.Tensor
    error: torch.Tensor


def vector_header(like: Header) -> Header:
    """Returns a blank header for a sparse vector that is sent in the exchange of header `like`."""
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
        like: header of this rank in the exchange.
        pairs: indices and values; None for a sum that is not finite, which is sent as a header with FLAG_NONFINITE.
        codecs: codecs of values and positions.
        arena: allocates the buffers.
        key: name of the buffers.
    """
    header = vector_header(like)
    if pairs is None:
        header.flags = FLAG_NONFINITE
        payload = arena.get((key, "vector"), HEADER_BYTES, torch.uint8)
        write_header(header, payload)
        return Vector(header, payload, torch.empty(0, dtype=torch.float32))
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
    """Checks and decodes a sparse vector. The result is valid until the next use of the key.

    Raises:
        WireError: the payload is damaged. The error names its author and the bucket.
    """
    indices = arena.get((key, "indices"), header.nnz, torch.uint32, reserve=2 * header.nnz)
    values = arena.get((key, "values"), header.nnz, torch.float32, reserve=2 * header.nnz)
    decode_body(header, payload[HEADER_BYTES:], indices, values)
    return indices, values
