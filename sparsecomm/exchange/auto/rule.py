"""The collective with the fewest bytes: the rule of thumb until costs are measured."""

from __future__ import annotations

from sparsecomm.collectives import dense_ring_bytes
from sparsecomm.exchange.methods.allgather import allgather_bytes
from sparsecomm.types import IndexCodec, ValueCodec
from sparsecomm.wire import CollectiveKind

__all__ = ["choose_collective"]


def choose_collective(
    k: int,
    numel: int,
    size: int,
    value_codec: ValueCodec,
    index_codec: IndexCodec | None,
    *,
    dense_codec: ValueCodec = ValueCodec.FP32,
) -> CollectiveKind:
    """Returns the collective with the fewest bytes sent by a rank, of the sparse allgather and the dense ring.

    Args:
        k: nonzeros a rank expects to send.
        numel: elements of the bucket.
        size: number of ranks.
        value_codec: how values are written.
        index_codec: how indices are written; None for the smallest.
        dense_codec: how values travel if dense.
    """
    cheaper = allgather_bytes(k, numel, size, value_codec, index_codec) <= dense_ring_bytes(numel, size, dense_codec)
    return CollectiveKind.ALLGATHER if cheaper or size == 1 else CollectiveKind.DENSE
