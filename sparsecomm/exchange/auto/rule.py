"""The rule of thumb before costs are measured: the method with the fewest bytes.

Every rank computes the same answer from the same numbers, so ranks need no messages to agree on it.
"""

from __future__ import annotations

from sparsecomm.collectives import dense_ring_bytes
from sparsecomm.exchange.method import method_named
from sparsecomm.types import Sizes, ValueCodec

__all__ = ["choose_collective"]


def choose_collective(sizes: Sizes, *, dense_codec: ValueCodec = ValueCodec.FP32) -> str:
    """Returns "allgather" or "dense", whichever sends fewer bytes per rank.

    Args:
        sizes: sizes of the bucket in a sparse exchange.
        dense_codec: codec of the values in a dense exchange.
    """
    sparse = method_named("allgather").bytes_sent(sizes)
    cheaper = sparse <= dense_ring_bytes(sizes.numel, sizes.ranks, dense_codec)
    return "allgather" if cheaper or sizes.ranks == 1 else "dense"
