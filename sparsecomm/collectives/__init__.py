"""Exchanges between ranks, one algorithm a file, each a generator over a channel."""

from sparsecomm.collectives.agree import Agreement, agree
from sparsecomm.collectives.allgather import allgather_blocks, allgather_bodies, allgather_fixed
from sparsecomm.collectives.choose import (
    DenseAlgorithm,
    agreement_bytes,
    allgather_bytes,
    choose_collective,
    choose_dense,
    choose_leaders_collective,
    dense_ring_bytes,
    dense_seconds,
    split_reduce_bytes,
    tree_bytes,
    two_level_bytes,
)
from sparsecomm.collectives.dense import dense_allreduce
from sparsecomm.collectives.doubling import doubling_allreduce
from sparsecomm.collectives.halving import halving_allreduce
from sparsecomm.collectives.node_sum import node_sum
from sparsecomm.collectives.parts import Codecs
from sparsecomm.collectives.payloads import receive_payload, send_payload
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
    "choose_collective",
    "choose_dense",
    "choose_leaders_collective",
    "dense_allreduce",
    "dense_ring_bytes",
    "dense_seconds",
    "doubling_allreduce",
    "halving_allreduce",
    "node_sum",
    "receive_payload",
    "ring_allreduce",
    "send_payload",
    "split_reduce",
    "split_reduce_bytes",
    "tree_bytes",
    "two_level_bytes",
]
