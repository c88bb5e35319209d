"""Compute kernels: tensors in, tensors out, by the fastest implementation that this machine can run.

All functions read and fill tensors that the caller allocated, so that a training step allocates nothing. The Triton
kernels (docs/gpu.md) work on tensors of a GPU. `reference` (plain numpy) is the truth; every other path equals it bit
for bit.

For CPU tensors the path is chosen once, at first use: the first of avx512, avx2, portable and reference that can run,
or the one that the environment variable ``SPARSECOMM_KERNELS`` names. If that one cannot run, the call raises an
error; it never falls back silently.

Every function checks its tensors and raises KernelError, which names the argument and the offending value. Tensors are
contiguous, one-dimensional and all on one device; indices are uint32 and strictly ascending; values are float32.
"""

from __future__ import annotations

from sparsecomm.kernels.checksum import check_body, crc32c
from sparsecomm.kernels.codecs import decode_indices, decode_values, encode_indices, encode_values
from sparsecomm.kernels.combine import (
    accumulate_dense,
    accumulate_norms,
    add_dense,
    scatter_add,
    scatter_reduce,
)
from sparsecomm.kernels.dense import pack_dense, packed_bytes, unpack_dense
from sparsecomm.kernels.pairs import decode_pairs, encode_pairs
from sparsecomm.kernels.paths import (
    PATHS,
    available_paths,
    current_path,
    native_problem,
    release_scratch,
    scratch_bytes,
    set_path,
)
from sparsecomm.kernels.select import accumulate_select, cut_topk, exact_topk
from sparsecomm.kernels.sizes import entropy_bits, estimate_index_bytes, max_index_bytes, max_value_bytes
from sparsecomm.kernels.triton.launch import triton_problem

__all__ = [
    "PATHS",
    "accumulate_dense",
    "accumulate_norms",
    "accumulate_select",
    "add_dense",
    "available_paths",
    "check_body",
    "crc32c",
    "current_path",
    "cut_topk",
    "decode_indices",
    "decode_pairs",
    "decode_values",
    "encode_indices",
    "encode_pairs",
    "encode_values",
    "entropy_bits",
    "estimate_index_bytes",
    "exact_topk",
    "max_index_bytes",
    "max_value_bytes",
    "native_problem",
    "pack_dense",
    "packed_bytes",
    "release_scratch",
    "scatter_add",
    "scatter_reduce",
    "scratch_bytes",
    "set_path",
    "triton_problem",
    "unpack_dense",
]
