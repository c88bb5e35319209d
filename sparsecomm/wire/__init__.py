"""Sparse vectors to bytes and back. Knows no algorithm. docs/wire-format.md specifies it byte by byte."""

from sparsecomm.wire.header import (
    FLAG_ERROR,
    FLAG_NONFINITE,
    HEADER_BYTES,
    MAGIC,
    MAX_ERROR_BYTES,
    SPAN_BYTES,
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
from sparsecomm.wire.signs import add_signs, encode_signs, max_signs_bytes, read_spans

__all__ = [
    "FLAG_ERROR",
    "FLAG_NONFINITE",
    "HEADER_BYTES",
    "MAGIC",
    "MAX_ERROR_BYTES",
    "PART_HEADER_BYTES",
    "SPAN_BYTES",
    "VERSION",
    "CollectiveKind",
    "Header",
    "PartHeader",
    "add_signs",
    "check_body",
    "choose_index_codec",
    "decode_body",
    "decode_part",
    "encode_error",
    "encode_part",
    "encode_payload",
    "encode_signs",
    "max_part_bytes",
    "max_payload_bytes",
    "max_signs_bytes",
    "read_header",
    "read_part_header",
    "read_spans",
    "write_header",
]
