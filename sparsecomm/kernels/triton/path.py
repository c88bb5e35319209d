"""The Triton kernels as one path. Only `paths` imports it, once a GPU tensor or the user needs Triton."""

from __future__ import annotations

import torch

from sparsecomm.kernels import native, reference
from sparsecomm.kernels.triton.combine import add_dense, scatter_add, scatter_reduce
from sparsecomm.kernels.triton.indices import encode_indices
from sparsecomm.kernels.triton.pairs import decode_pairs, encode_pairs
from sparsecomm.kernels.triton.positions import decode_indices
from sparsecomm.kernels.triton.select import accumulate_dense, accumulate_norms, accumulate_select
from sparsecomm.kernels.triton.topk import cut_topk, exact_topk
from sparsecomm.kernels.triton.values import decode_values, encode_values, pack_dense, unpack_dense

__all__ = [
    "accumulate_dense",
    "accumulate_norms",
    "accumulate_select",
    "add_dense",
    "crc32c",
    "cut_topk",
    "decode_indices",
    "decode_pairs",
    "decode_values",
    "encode_indices",
    "encode_pairs",
    "encode_values",
    "exact_topk",
    "pack_dense",
    "release_scratch",
    "scatter_add",
    "scatter_reduce",
    "scratch_bytes",
    "unpack_dense",
]


def crc32c(data: torch.Tensor, seed: int = 0) -> int:
    """Computes on the host, because checksums are of bytes to be sent, which the host has anyway."""
    host = data.cpu()
    return reference.crc32c(host, seed) if native.problem else native.crc32c(host, seed)


def scratch_bytes() -> int:
    """Returns 0: work space belongs to torch's caching allocator."""
    return 0


def release_scratch() -> None:
    """Does nothing, because nothing is kept."""
