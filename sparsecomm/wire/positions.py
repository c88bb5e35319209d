"""Positions that a leader sends to all ranks: a header of 32 bytes, then index bytes.

The header does not contain step, bucket, sender and numel, since ranks agree on them before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsecomm import kernels
from sparsecomm.errors import WireError
from sparsecomm.types import IndexCodec
from sparsecomm.wire.pairs import choose_index_codec
from sparsecomm.wire.record import Record

__all__ = [
    "POSITIONS_HEADER_BYTES",
    "PositionsHeader",
    "decode_positions",
    "encode_positions",
    "max_positions_bytes",
    "positions_bytes",
    "read_positions_header",
]

_RECORD = Record(
    "positions header",
    (("nnz", "Q"), ("index_bytes", "Q"), ("index_codec", "B"), ("reserved", "7s"), ("body_crc", "I")),
    crc="header_crc",
)
POSITIONS_HEADER_BYTES = _RECORD.nbytes


@dataclass(frozen=True, slots=True)
class PositionsHeader:
    """The header of positions.

    Attributes:
        nnz: number of positions.
        index_bytes: bytes of the body.
        index_codec: codec of the positions.
        body_crc: CRC32C of the body.
    """

    nnz: int
    index_bytes: int
    index_codec: IndexCodec
    body_crc: int


def max_positions_bytes(nnz: int, numel: int, index_codec: IndexCodec | None) -> int:
    """Returns the largest possible length of positions in bytes, header included."""
    return POSITIONS_HEADER_BYTES + kernels.max_index_bytes(choose_index_codec(nnz, numel, index_codec), nnz, numel)


def encode_positions(indices: torch.Tensor, numel: int, index_codec: IndexCodec | None, out: torch.Tensor) -> int:
    """Writes positions.

    Args:
        indices: uint32, shape (nnz,), strictly ascending, all below numel.
        numel: elements of the bucket.
        index_codec: codec of the positions; None for the smallest.
        out: uint8, at least `max_positions_bytes` long. Mutated.

    Returns:
        Number of bytes written, header included.
    """
    nnz = indices.numel()
    codec = choose_index_codec(nnz, numel, index_codec)
    body = out[POSITIONS_HEADER_BYTES:]
    length = kernels.encode_indices(codec, indices, numel, body)
    _RECORD.write(out, (nnz, length, codec, kernels.crc32c(body[:length])))
    return POSITIONS_HEADER_BYTES + length


def read_positions_header(data: torch.Tensor, numel: int, most: int) -> PositionsHeader:
    """Reads and checks the header of positions. Its checksum is checked before any field is used.

    Args:
        data: uint8, at least POSITIONS_HEADER_BYTES long.
        numel: elements of the bucket.
        most: largest acceptable number of positions.

    Raises:
        WireError: a field is wrong. The error names the first such field and its value.
    """
    nnz, length, codec, body_crc = _RECORD.read(data)
    if nnz > most:
        raise WireError("nnz", nnz, f"at most {most} were asked for")
    try:
        index_codec = IndexCodec(codec)
    except ValueError:
        raise WireError("index_codec", codec, f"known are {[int(c) for c in IndexCodec]}") from None
    if index_codec == IndexCodec.DENSE and nnz != numel:
        raise WireError("nnz", nnz, f"the dense index codec needs nnz = {numel}")
    room = kernels.max_index_bytes(index_codec, nnz, numel)
    if length > room:
        raise WireError("index_bytes", length, f"{index_codec.name} needs at most {room}")
    return PositionsHeader(nnz, length, index_codec, body_crc)


def decode_positions(header: PositionsHeader, body: torch.Tensor, numel: int, indices: torch.Tensor) -> None:
    """Checks and decodes positions.

    Args:
        header: header of the positions, from `read_positions_header`.
        body: uint8, shape (header.index_bytes,).
        numel: elements of the bucket.
        indices: uint32, shape (nnz,). Mutated, on failure too.

    Raises:
        WireError: the body is damaged. The error names field and value.
    """
    crc = kernels.crc32c(body)
    if crc != header.body_crc:
        raise WireError("body_crc", hex(header.body_crc), f"the body's checksum is {crc:#x}")
    kernels.decode_indices(header.index_codec, body, header.nnz, numel, indices)


def positions_bytes(nnz: int, numel: int, index_codec: IndexCodec | None) -> int:
    """Returns the expected bytes of nnz uniform positions, header included."""
    codec = choose_index_codec(nnz, numel, index_codec)
    return POSITIONS_HEADER_BYTES + kernels.estimate_index_bytes(codec, nnz, numel)
