"""Whole bodies, made of the reference's codecs."""

from __future__ import annotations

import torch

from sparsecomm.kernels.api import BodyFormat, Described
from sparsecomm.kernels.reference.crc import crc32c
from sparsecomm.kernels.reference.indices import decode_indices, encode_indices
from sparsecomm.kernels.reference.values import decode_values, encode_values

__all__ = ["decode_body", "encode_body"]


def encode_body(
    form: BodyFormat,
    indices: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    error: torch.Tensor | None,
) -> tuple[int, int, float, int]:
    """Encodes positions, values and checksum one after the other."""
    index_bytes = encode_indices(form.index_codec, indices, form.numel, out)
    value_bytes, scale = encode_values(form.value_codec, values, out[index_bytes:], error)
    return index_bytes, value_bytes, scale, crc32c(out[: index_bytes + value_bytes], 0)


def decode_body(
    payload: Described, body: torch.Tensor, out_indices: torch.Tensor | None, out_values: torch.Tensor
) -> None:
    """Decodes the positions, unless they are known, then the values."""
    split, nnz = payload.index_bytes, payload.nnz
    if out_indices is not None:
        decode_indices(payload.index_codec, body[:split], nnz, payload.numel, out_indices)
    decode_values(payload.value_codec, body[split:], nnz, payload.value_scale, out_values)
