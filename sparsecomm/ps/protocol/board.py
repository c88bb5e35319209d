"""Where a server's window holds which numbers (a seqlock)."""

from __future__ import annotations

__all__ = ["EVERYBODY", "HEAD_BYTES", "board_bytes"]

HEAD_BYTES = 64  # bytes, so that values are aligned


EVERYBODY = 1 << 62  # clock of the slowest worker when nobody is left


def board_bytes(numel: int) -> int:
    """Returns the bytes of window that a shard needs."""
    return HEAD_BYTES + 4 * numel
