"""Collectives as MPI defines them, one per file: generators over a channel that know no header and no compressor."""

from sparsecomm.collectives.allreduce import dense_allreduce
from sparsecomm.collectives.allreduce_costs import (
    DenseAlgorithm,
    choose_dense,
    dense_allreduce_bytes,
    dense_ring_bytes,
    dense_seconds,
)
from sparsecomm.collectives.broadcast import broadcast, broadcast_bytes
from sparsecomm.collectives.doubling import doubling_allreduce
from sparsecomm.collectives.gather import allgather, allgatherv, allgatherv_direct
from sparsecomm.collectives.halving import halving_allreduce
from sparsecomm.collectives.link import agreed_maximum, link_between_hosts, measure_link, rings
from sparsecomm.collectives.partial_sums import DenseSum
from sparsecomm.collectives.reduce import reduce
from sparsecomm.collectives.ring import ring_allreduce

__all__ = [
    "DenseAlgorithm",
    "DenseSum",
    "agreed_maximum",
    "allgather",
    "allgatherv",
    "allgatherv_direct",
    "broadcast",
    "broadcast_bytes",
    "choose_dense",
    "dense_allreduce",
    "dense_allreduce_bytes",
    "dense_ring_bytes",
    "dense_seconds",
    "doubling_allreduce",
    "halving_allreduce",
    "link_between_hosts",
    "measure_link",
    "reduce",
    "ring_allreduce",
    "rings",
]
