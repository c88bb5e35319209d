"""Exchanges between ranks, one algorithm a file, each a generator over a channel."""

from sparsecomm.collectives.agree import Agreement, agree
from sparsecomm.collectives.allgather import allgather_blocks, allgather_bodies, allgather_fixed
from sparsecomm.collectives.broadcast import broadcast
from sparsecomm.collectives.choose import (
    DenseAlgorithm,
    allgather_bytes,
    choose_collective,
    choose_dense,
    dense_ring_bytes,
    dense_seconds,
    split_reduce_bytes,
)
from sparsecomm.collectives.dense import dense_allreduce
from sparsecomm.collectives.doubling import doubling_allreduce
from sparsecomm.collectives.halving import halving_allreduce
from sparsecomm.collectives.packed import agreement_bytes, broadcast_bytes, dense_allreduce_bytes, positions_bytes
from sparsecomm.collectives.parts import Codecs
from sparsecomm.collectives.regions import Regions
from sparsecomm.collectives.ring import ring_allreduce
from sparsecomm.collectives.split import Split
from sparsecomm.collectives.split_reduce import Reduced, split_reduce

__all__ = [
    "Agreement",
    "Codecs",
    "DenseAlgorithm",
    "Reduced",
    "Regions",
    "Split",
    "agree",
    "agreement_bytes",
    "allgather_blocks",
    "allgather_bodies",
    "allgather_bytes",
    "allgather_fixed",
    "broadcast",
    "broadcast_bytes",
    "choose_collective",
    "choose_dense",
    "dense_allreduce",
    "dense_allreduce_bytes",
    "dense_ring_bytes",
    "dense_seconds",
    "doubling_allreduce",
    "halving_allreduce",
    "positions_bytes",
    "ring_allreduce",
    "split_reduce",
    "split_reduce_bytes",
]
