"""Exchanges between ranks, one algorithm a file, each a generator over a channel."""

from sparsecomm.collectives.agree import Agreement, agree
from sparsecomm.collectives.allgather import allgather_blocks, allgather_bodies, allgather_fixed
from sparsecomm.collectives.broadcast import broadcast
from sparsecomm.collectives.choose import (
    DenseAlgorithm,
    agreement_bytes,
    allgather_bytes,
    choose_collective,
    choose_dense,
    choose_leaders_collective,
    dense_allreduce_bytes,
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
from sparsecomm.collectives.packed import broadcast_bytes, positions_bytes
from sparsecomm.collectives.parts import Codecs, Pairs
from sparsecomm.collectives.payloads import read_vector, receive_payload, send_payload, vector_header, write_vector
from sparsecomm.collectives.regions import Regions
from sparsecomm.collectives.ring import ring_allreduce
from sparsecomm.collectives.split import Split
from sparsecomm.collectives.split_reduce import Reduced, split_reduce
from sparsecomm.collectives.tree import Tree

__all__ = [
    "Agreement",
    "Codecs",
    "DenseAlgorithm",
    "Pairs",
    "Reduced",
    "Regions",
    "Split",
    "Tree",
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
    "choose_leaders_collective",
    "dense_allreduce",
    "dense_allreduce_bytes",
    "dense_ring_bytes",
    "dense_seconds",
    "doubling_allreduce",
    "halving_allreduce",
    "node_sum",
    "positions_bytes",
    "read_vector",
    "receive_payload",
    "ring_allreduce",
    "send_payload",
    "split_reduce",
    "split_reduce_bytes",
    "tree_bytes",
    "two_level_bytes",
    "vector_header",
    "write_vector",
]
