"""The truth: every kernel in plain numpy, readable rather than fast. All other paths equal it bit for bit."""

from sparsecomm.kernels.reference.bodies import decode_body, encode_body
from sparsecomm.kernels.reference.crc import crc32c
from sparsecomm.kernels.reference.dense import pack_dense, unpack_dense
from sparsecomm.kernels.reference.indices import decode_indices, encode_indices
from sparsecomm.kernels.reference.select import (
    accumulate_dense,
    accumulate_norms,
    accumulate_select,
    add_dense,
    cut_topk,
    exact_topk,
    release_scratch,
    scatter_add,
    scatter_reduce,
    scratch_bytes,
)
from sparsecomm.kernels.reference.values import decode_values, encode_values

__all__ = [
    "accumulate_dense",
    "accumulate_norms",
    "accumulate_select",
    "add_dense",
    "crc32c",
    "cut_topk",
    "decode_body",
    "decode_indices",
    "decode_values",
    "encode_body",
    "encode_indices",
    "encode_values",
    "exact_topk",
    "pack_dense",
    "release_scratch",
    "scatter_add",
    "scatter_reduce",
    "scratch_bytes",
    "unpack_dense",
]
