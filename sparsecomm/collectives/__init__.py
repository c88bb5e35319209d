"""Exchanges between ranks, one algorithm a file, each a generator over a channel."""

from sparsecomm.collectives.agree import Agreement, agree
from sparsecomm.collectives.allgather import allgather_blocks, allgather_bodies, allgather_fixed
from sparsecomm.collectives.choose import allgather_bytes, choose_collective, dense_ring_bytes, split_reduce_bytes
from sparsecomm.collectives.parts import Codecs
from sparsecomm.collectives.regions import Regions
from sparsecomm.collectives.ring import ring_allreduce
from sparsecomm.collectives.split import Split
from sparsecomm.collectives.split_reduce import Reduced, split_reduce

__all__ = [
    "Agreement",
    "Codecs",
    "Reduced",
    "Regions",
    "Split",
    "agree",
    "allgather_blocks",
    "allgather_bodies",
    "allgather_bytes",
    "allgather_fixed",
    "choose_collective",
    "dense_ring_bytes",
    "ring_allreduce",
    "split_reduce",
    "split_reduce_bytes",
]
