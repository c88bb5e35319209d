"""Bytes of messages with positions, and of a broadcast."""

from __future__ import annotations

from sparsecomm.kernels import dispatch as kernels
from sparsecomm.types import IndexCodec
from sparsecomm.wire import POSITIONS_HEADER_BYTES, choose_index_codec

__all__ = ["broadcast_bytes", "positions_bytes"]


def positions_bytes(nnz: int, numel: int, index_codec: IndexCodec | None) -> int:
    """Returns the expected bytes of nnz uniform positions in one message, header included."""
    codec = choose_index_codec(nnz, numel, index_codec)
    return POSITIONS_HEADER_BYTES + kernels.estimate_index_bytes(codec, nnz, numel)


def broadcast_bytes(nbytes: int, size: int) -> int:
    """Returns the bytes that the root of a broadcast sends."""
    return nbytes * (size - 1).bit_length()
