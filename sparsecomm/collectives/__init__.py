"""Exchanges between ranks, one algorithm a file, each a generator over a channel."""

from sparsecomm.collectives.agree import agree
from sparsecomm.collectives.allgather import allgather_bodies, allgather_fixed
from sparsecomm.collectives.choose import choose_collective, dense_ring_bytes
from sparsecomm.collectives.ring import ring_allreduce

__all__ = [
    "agree",
    "allgather_bodies",
    "allgather_fixed",
    "choose_collective",
    "dense_ring_bytes",
    "ring_allreduce",
]
