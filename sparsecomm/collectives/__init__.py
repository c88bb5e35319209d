"""Exchanges between ranks, one algorithm a file, each a generator over a channel."""

from sparsecomm.collectives.agree import agree
from sparsecomm.collectives.allgather import allgather_bodies, allgather_fixed
from sparsecomm.collectives.choose import DenseAlgorithm, choose_collective, choose_dense, dense_ring_bytes
from sparsecomm.collectives.dense import dense_allreduce
from sparsecomm.collectives.doubling import doubling_allreduce
from sparsecomm.collectives.halving import halving_allreduce
from sparsecomm.collectives.ring import ring_allreduce

__all__ = [
    "DenseAlgorithm",
    "agree",
    "allgather_bodies",
    "allgather_fixed",
    "choose_collective",
    "choose_dense",
    "dense_allreduce",
    "dense_ring_bytes",
    "doubling_allreduce",
    "halving_allreduce",
    "ring_allreduce",
]
