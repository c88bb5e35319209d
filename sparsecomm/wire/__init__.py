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
from sparsecomm.wire.payload import (
    check_body,
    choose_index_codec,
    decode_body,
    encode_error,
    encode_payload,
    max_payload_bytes,
)

__all__ = [
    "FLAG_ERROR",
    "FLAG_NONFINITE",
    "HEADER_BYTES",
    "MAGIC",
    "MAX_ERROR_BYTES",
    "VERSION",
    "CollectiveKind",
    "Header",
    "check_body",
    "choose_index_codec",
    "decode_body",
    "encode_error",
    "encode_payload",
    "max_payload_bytes",
    "read_header",
    "write_header",
]
