"""Which collective to use for a bucket: the one that moves fewer bytes from a rank.

Every rank computes the same answer from the same numbers, so nothing is exchanged to agree on it.
"""

from __future__ import annotations

import math

from sparsecomm.collectives.agree import DIGEST_ABOVE, DIGEST_BYTES
from sparsecomm.collectives.regions import LIFETIME, samples_of
from sparsecomm.collectives.split_reduce import ANNOUNCEMENT_BYTES
from sparsecomm.kernels import dispatch as kernels
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import HEADER_BYTES, PART_HEADER_BYTES, CollectiveKind, choose_index_codec

__all__ = ["allgather_bytes", "choose_collective", "dense_ring_bytes", "split_reduce_bytes"]


def dense_ring_bytes(numel: int, size: int) -> int:
    """Returns the bytes one rank sends in a ring allreduce of `numel` float32 values over `size` ranks."""
    return 2 * 4 * numel * (size - 1) // size


def allgather_bytes(k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None) -> int:
    """Returns the bytes one rank is expected to send in a sparse allgather. Arguments as in `choose_collective`."""
    return (size - 1) * (_body_bytes(k, numel, value_codec, index_codec) + HEADER_BYTES)


def split_reduce_bytes(
    k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None, *, keep_all: bool = False
) -> int:
    """Returns the bytes one rank is expected to send in a split-reduce of uniform positions.

    Making regions is spread over the steps that they serve.

    Args:
        k: nonzeros a rank expects to send.
        numel: elements of the bucket.
        size: number of ranks.
        value_codec: how values are written.
        index_codec: how indices are written; None for the smallest.
        keep_all: whether all sums are kept, of selections that are independent of each other.
    """
    region = -(-numel // size)
    sent = min(region, round(k / size))
    kept = round(region * -math.expm1(size * math.log1p(-k / numel))) if keep_all and k < numel else sent
    parts = sum(PART_HEADER_BYTES + _body_bytes(n, region, value_codec, index_codec) for n in (sent, kept))
    agreement = HEADER_BYTES * (size - 1) if size <= DIGEST_ABOVE else DIGEST_BYTES * (size - 1).bit_length()
    samples = (1 if keep_all else 2) * 4 * (samples_of(size) + 4) // LIFETIME
    return agreement + (size - 1) * (parts + ANNOUNCEMENT_BYTES + samples)


def _body_bytes(nnz: int, numel: int, value_codec: ValueCodec, index_codec: IndexCodec | None) -> int:
    codec = choose_index_codec(nnz, numel) if index_codec is None or nnz == numel else index_codec
    return kernels.estimate_index_bytes(codec, nnz, numel) + kernels.max_value_bytes(value_codec, nnz)


def choose_collective(
    k: int, numel: int, size: int, value_codec: ValueCodec, index_codec: IndexCodec | None
) -> CollectiveKind:
    """Returns the collective with the fewest bytes sent by a rank, of the sparse allgather and the dense ring.

    Args:
        k: nonzeros a rank expects to send.
        numel: elements of the bucket.
        size: number of ranks.
        value_codec: how values are written.
        index_codec: how indices are written; None for the smallest.
    """
    sparse = allgather_bytes(k, numel, size, value_codec, index_codec)
    return CollectiveKind.ALLGATHER if sparse <= dense_ring_bytes(numel, size) or size == 1 else CollectiveKind.DENSE
