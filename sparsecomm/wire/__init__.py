"""Sparse vectors to bytes and back. Knows no algorithm. docs/wire-format.md specifies it byte by byte."""

from sparsecomm.wire.header import (
    FLAG_ERROR,
    FLAG_NONFINITE,
    HEADER_BYTES,
    MAGIC,
    MAX_ERROR_BYTES,
    VERSION,
    CollectiveKind,
    Header,
    read_header,
    write_header,
)
from sparsecomm.wire.part import (
    PART_HEADER_BYTES,
    PartHeader,
    decode_part,
    encode_part,
    max_part_bytes,
    read_part_header,
)
from sparsecomm.wire.payload import (
    check_body,
    choose_index_codec,
    decode_body,
    encode_error,
    encode_payload,
    max_payload_bytes,
)
from sparsecomm.wire.positions import (
    POSITIONS_HEADER_BYTES,
    PositionsHeader,
    decode_positions,
    encode_positions,
    max_positions_bytes,
    read_positions_header,
)

__all__ = [
    "FLAG_ERROR",
    "FLAG_NONFINITE",
    "HEADER_BYTES",
    "MAGIC",
    "MAX_ERROR_BYTES",
    "PART_HEADER_BYTES",
    "POSITIONS_HEADER_BYTES",
    "VERSION",
    "CollectiveKind",
    "Header",
    "PartHeader",
    "PositionsHeader",
    "check_body",
    "choose_index_codec",
    "decode_body",
    "decode_part",
    "decode_positions",
    "encode_error",
    "encode_part",
    "encode_payload",
    "encode_positions",
    "max_part_bytes",
    "max_payload_bytes",
    "max_positions_bytes",
    "read_header",
    "read_part_header",
    "read_positions_header",
    "write_header",
]
