"""What exchanges cost in which values travel packed, without positions: bytes that a rank is expected to send."""

from __future__ import annotations

from sparsecomm.collectives.agree import DIGEST_ABOVE, DIGEST_BYTES
from sparsecomm.collectives.choose import DenseAlgorithm, choose_dense, dense_ring_bytes
from sparsecomm.kernels import dispatch as kernels
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import HEADER_BYTES, POSITIONS_HEADER_BYTES, choose_index_codec

__all__ = ["agreement_bytes", "broadcast_bytes", "dense_allreduce_bytes", "positions_bytes"]


def agreement_bytes(size: int) -> int:
    """Returns the bytes that a rank sends to agree, where headers need not be gathered."""
    return HEADER_BYTES * (size - 1) if size <= DIGEST_ABOVE else DIGEST_BYTES * (size - 1).bit_length()


def dense_allreduce_bytes(numel: int, size: int, wire: ValueCodec) -> int:
    """Returns the bytes that the busiest rank sends in a dense allreduce between hosts.

    Args:
        numel: elements of the vector.
        size: number of ranks.
        wire: FP32, FP16 or BF16.
    """
    algorithm = choose_dense(numel, size, wire, one_host=False)
    if algorithm == DenseAlgorithm.RING or size == 1:
        return dense_ring_bytes(numel, size, wire)
    rounds = size.bit_length() - 1
    core = 1 << rounds
    folded = 1 if size > core else 0  # a rank that has taken another's vector sends it the result
    if algorithm == DenseAlgorithm.DOUBLING:
        return 4 * numel * (rounds + folded)
    moved = (4 if wire == ValueCodec.FP32 else 2) * numel
    return 2 * moved * (core - 1) // core + folded * moved


def positions_bytes(nnz: int, numel: int, index_codec: IndexCodec | None) -> int:
    """Returns the expected bytes of nnz uniform positions in one message, header included."""
    codec = choose_index_codec(nnz, numel) if index_codec is None or nnz == numel else index_codec
    return POSITIONS_HEADER_BYTES + kernels.estimate_index_bytes(codec, nnz, numel)


def broadcast_bytes(nbytes: int, size: int) -> int:
    """Returns the bytes that the root of a broadcast sends."""
    return nbytes * (size - 1).bit_length()
