"""Which collective to use for a bucket: the one that moves fewer bytes from a rank.

Every rank computes the same answer from the same numbers, so nothing is exchanged to agree on it.
"""

from __future__ import annotations

from sparsecomm.kernels import dispatch as kernels
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import HEADER_BYTES, CollectiveKind, choose_index_codec

__all__ = ["choose_collective", "dense_ring_bytes"]


def dense_ring_bytes(numel: int, size: int) -> int:
    """Returns the bytes one rank sends in a ring allreduce of `numel` float32 values over `size` ranks."""
    return 2 * 4 * numel * (size - 1) // size


def choose_collective(
    k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
) -> CollectiveKind:
    """Returns the collective with the fewest bytes sent by a rank.

    Args:
        k: nonzeros a rank expects to send.
        numel: elements of the bucket.
        size: number of ranks.
        value_codec: how values are written.
        index_codec: how indices are written; None for the smallest.
    """
    codec = choose_index_codec(k, numel) if index_codec is None else index_codec
    payload = kernels.estimate_index_bytes(codec, k, numel) + kernels.max_value_bytes(value_codec, k)
    sparse = (size - 1) * (payload + HEADER_BYTES)
    return CollectiveKind.ALLGATHER if sparse <= dense_ring_bytes(numel, size) or size == 1 else CollectiveKind.DENSE
