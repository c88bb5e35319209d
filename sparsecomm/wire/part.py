"""Parts, the messages of a split-reduce for one region: a header of 24 bytes, then index bytes, then value bytes.

The header does not contain step, bucket, sender and span, since ranks agree on them before a part travels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparsecomm import kernels
from sparsecomm.errors import ConfigError, WireError
from sparsecomm.types import Codecs, IndexCodec, ValueCodec
from sparsecomm.wire.record import Record

__all__ = ["PART_HEADER_BYTES", "PartHeader", "decode_part", "encode_part", "max_part_bytes", "read_part_header"]

_RECORD = Record(
    "part's header",
    (
        ("nnz", "I"),
        ("index_bytes", "I"),
        ("index_codec", "B"),
        ("value_codec", "B"),
        ("reserved", "H"),
        ("value_scale", "f"),
        ("body_crc", "I"),
    ),
    crc="header_crc",
)
PART_HEADER_BYTES = _RECORD.nbytes
_MOST = 2**32 - 1


@dataclass(frozen=True, slots=True)
class PartHeader:
    """The header of a part.

    Attributes:
        nnz: number of nonzeros.
        index_bytes: bytes of the indices.
        index_codec: codec of the positions, which are relative to the start of the span.
        value_codec: codec of the values.
        value_scale: factor on decoded FP16 values; 1 otherwise.
        body_crc: CRC32C of the body.
    """

    nnz: int
    index_bytes: int
    index_codec: IndexCodec
    value_codec: ValueCodec
    value_scale: float
    body_crc: int

    @property
    def body_bytes(self) -> int:
        """Bytes of the body."""
        return self.index_bytes + kernels.max_value_bytes(self.value_codec, self.nnz)


def _codec_of(nnz: int, span: int, index_codec: IndexCodec | None) -> IndexCodec:
    """Returns the index codec of a part. If none is given, a simple rule chooses between RICE and BITMAP.

    With P parts per exchange, the estimates of `choose_index_codec` would take longer than encoding a small part.
    """
    if nnz == span:
        return IndexCodec.DENSE
    if index_codec is not None:
        return index_codec
    return IndexCodec.BITMAP if 8 * nnz > 3 * span else IndexCodec.RICE  # equal bytes for uniform nnz = 0.38 span


def max_part_bytes(nnz: int, span: int, codecs: Codecs) -> int:
    """Returns the largest possible length of a part in bytes, header included. An empty part still has a header."""
    codec = _codec_of(nnz, span, codecs.indices)
    return PART_HEADER_BYTES + kernels.max_index_bytes(codec, nnz, span) + kernels.max_value_bytes(codecs.values, nnz)


def encode_part(
    indices: torch.Tensor,
    values: torch.Tensor,
    span: int,
    codecs: Codecs,
    out: torch.Tensor,
    error: torch.Tensor,
) -> int:
    """Writes a part.

    Args:
        indices: uint32, shape (nnz,), strictly ascending, relative to the start of the span, below `span`.
        values: float32, shape (nnz,), finite.
        span: length of the span of the part, in elements.
        codecs: codecs of values and positions.
        out: uint8, at least `max_part_bytes` long. Mutated.
        error: float32, shape (nnz,). Mutated: receives the rounding, value minus decoded value.

    Returns:
        Number of bytes written, header included.

    Raises:
        ConfigError: the nonzeros or their bytes exceed the limit of a part.
    """
    nnz = values.numel()
    codec = _codec_of(nnz, span, codecs.indices)
    body = out[PART_HEADER_BYTES:]
    index_bytes = kernels.encode_indices(codec, indices, span, body) if nnz else 0
    value_bytes, scale = kernels.encode_values(codecs.values, values, body[index_bytes:], error)
    if max(nnz, index_bytes) > _MOST:
        raise ConfigError(
            f"a part of {nnz} nonzeros and {index_bytes} index bytes: at most {_MOST} fit; use more ranks"
        )
    crc = kernels.crc32c(body[: index_bytes + value_bytes])
    _RECORD.write(out, (nnz, index_bytes, codec, codecs.values, scale, crc))
    return PART_HEADER_BYTES + index_bytes + value_bytes


def read_part_header(data: torch.Tensor, span: int) -> PartHeader:
    """Reads and checks the header of a part. Its checksum is checked before any field is used.

    Args:
        data: uint8, at least PART_HEADER_BYTES long.
        span: length of the span of the part, in elements.

    Raises:
        WireError: a field is wrong. The error names the first such field and its value.
    """
    nnz, index_bytes, index_codec, value_codec, scale, body_crc = _RECORD.read(data)
    if nnz > span:
        raise WireError("nnz", nnz, f"more than the {span} elements of its region")
    if index_codec not in _INDEX_CODECS:
        raise WireError("index_codec", index_codec, f"known are {sorted(_INDEX_CODECS)}")
    if value_codec not in _VALUE_CODECS:
        raise WireError("value_codec", value_codec, f"known are {sorted(_VALUE_CODECS)}")
    header = PartHeader(nnz, index_bytes, IndexCodec(index_codec), ValueCodec(value_codec), scale, body_crc)
    if not (math.isfinite(scale) and scale > 0.0) or (header.value_codec != ValueCodec.FP16 and scale != 1.0):
        raise WireError("value_scale", scale, f"invalid for {header.value_codec.name} values")
    if header.index_codec == IndexCodec.DENSE and nnz not in (0, span):
        raise WireError("nnz", nnz, f"the dense index codec needs nnz = {span}")
    most = kernels.max_index_bytes(header.index_codec, nnz, span) if nnz else 0
    if index_bytes > most:
        raise WireError("index_bytes", index_bytes, f"{header.index_codec.name} needs at most {most}")
    return header


_INDEX_CODECS = {int(c) for c in IndexCodec}
_VALUE_CODECS = {int(c) for c in ValueCodec}


def decode_part(header: PartHeader, body: torch.Tensor, span: int, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Checks and decodes the body of a part.

    Args:
        header: header of the part, from `read_part_header`.
        body: uint8, shape (header.body_bytes,).
        span: length of the span of the part, in elements.
        indices: uint32, shape (nnz,), relative to the start of the span. Mutated, on failure too.
        values: float32, shape (nnz,). Mutated, on failure too.

    Raises:
        WireError: the body is damaged. The error names field and value.
    """
    crc = kernels.crc32c(body)
    if crc != header.body_crc:
        raise WireError("body_crc", hex(header.body_crc), f"the part's body has the checksum {crc:#x}")
    if header.nnz == 0:
        return
    kernels.decode_indices(header.index_codec, body[: header.index_bytes], header.nnz, span, indices)
    kernels.decode_values(header.value_codec, body[header.index_bytes :], header.nnz, header.value_scale, values)
