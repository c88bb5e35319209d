"""The rule of thumb until costs are measured: the method with the fewest bytes.

Every rank computes the same answer from the same numbers, so nothing is exchanged to agree on it.
"""

from __future__ import annotations

from sparsecomm.collectives import dense_ring_bytes
from sparsecomm.exchange.method import method_named
from sparsecomm.types import Sizes, ValueCodec

__all__ = ["choose_collective"]


def choose_collective(sizes: Sizes, *, dense_codec: ValueCodec = ValueCodec.FP32) -> str:
    """Returns the method with the fewest bytes sent by a rank, of the sparse allgather and the dense ring.

    Args:
        sizes: of the bucket.
        dense_codec: codec of the values if dense.
    """
    sparse = method_named("allgather").bytes_sent(sizes)
    cheaper = sparse <= dense_ring_bytes(sizes.numel, sizes.ranks, dense_codec)
    return "allgather" if cheaper or sizes.ranks == 1 else "dense"
