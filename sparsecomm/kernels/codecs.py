"""Positions and values to bytes and back. Formats: docs/wire-format.md."""

from __future__ import annotations

import torch

from sparsecomm.kernels import checks
from sparsecomm.kernels.paths import kernels_for
from sparsecomm.kernels.sizes import max_index_bytes, max_value_bytes
from sparsecomm.types import IndexCodec, ValueCodec

__all__ = ["decode_indices", "decode_values", "encode_indices", "encode_values"]


def encode_indices(codec: IndexCodec, indices: torch.Tensor, numel: int, out: torch.Tensor) -> int:
    """Writes ascending positions as bytes, in the format that docs/wire-format.md specifies.

    Args:
        codec: index codec.
        indices: uint32, shape (nnz,), strictly ascending, below numel; for DENSE exactly 0..numel-1.
        numel: length of the dense vector, at most 2**32.
        out: uint8, at least ``max_index_bytes(codec, nnz, numel)`` long. Mutated; bytes behind the encoded ones may be
            overwritten with anything.

    Returns:
        Bytes written.

    Raises:
        KernelError: for unfit tensors, too small an output, or indices that are not ascending and below numel.

    Example:
        Gaps minus one 2, 0, 3 need two bits each, 2 | 0 << 2 | 3 << 4 = 0x32:

        >>> out = torch.empty(8, dtype=torch.uint8)
        >>> encode_indices(IndexCodec.BITPACK, torch.tensor([2, 3, 7], dtype=torch.uint32), 10, out)
        2
        >>> out[:2].tolist()
        [2, 50]
    """
    nnz = checks.index_vec("indices", indices)
    need = max_index_bytes(codec, nnz, numel)
    if checks.byte_vec("out", out) < need:
        checks.refuse(f"out has {out.numel()} bytes, {codec!r} may need {need}")
    if codec == IndexCodec.DENSE and nnz != numel:
        checks.refuse(f"the dense codec needs nnz == numel, got nnz = {nnz}, numel = {numel}")
    return kernels_for(indices, out).encode_indices(codec, indices, numel, out)


def decode_indices(codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int, out_indices: torch.Tensor) -> None:
    """Reads positions that `encode_indices` wrote; trusts nothing in `data`, `nnz` and `numel`.

    Args:
        codec: index codec.
        data: uint8, exactly the encoded bytes.
        nnz: number of positions, from the header.
        numel: length of the dense vector, from the header.
        out_indices: uint32, at least nnz long. The first nnz are filled; after an error they hold garbage.

    Raises:
        WireError: if the bytes are not a strictly ascending list of nnz positions below numel in this codec: wrong
            length, parameters out of range, too many or too few positions, padding bits that are not zero.
        KernelError: for unfit tensors.

    Example:
        >>> out = torch.empty(3, dtype=torch.uint32)
        >>> decode_indices(IndexCodec.BITMAP, torch.tensor([0b10001100, 0], dtype=torch.uint8), 3, 10, out)
        >>> out.tolist()
        [2, 3, 7]
    """
    checks.wire_counts(nnz, numel)
    checks.byte_vec("data", data)
    if checks.index_vec("out_indices", out_indices) < nnz:
        checks.refuse(f"out_indices has {out_indices.numel()} elements, need nnz = {nnz}")
    kernels_for(data, out_indices).decode_indices(codec, data, nnz, numel, out_indices)


def encode_values(
    codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None = None
) -> tuple[int, float]:
    """Writes values as bytes, and their rounding errors to `error`, so that these can return to the residual.

    Args:
        codec: value codec.
        values: float32, shape (nnz,), finite.
        out: uint8, at least ``max_value_bytes(codec, nnz)`` long. Mutated.
        error: float32, at least nnz long, or None. Mutated: receives value minus decoded value (in float32; exact for
            FP16 and BF16). May be `values` itself.

    Returns:
        Bytes written, and the scale that `decode_values` needs (a power of two for FP16, else 1).

    Raises:
        KernelError: for unfit tensors or too small an output.

    Example:
        >>> out, error = torch.empty(4, dtype=torch.uint8), torch.empty(2)
        >>> encode_values(ValueCodec.BF16, torch.tensor([1.0, 1.00390625]), out, error)  # 1 + 2**-8 ties to even
        (4, 1.0)
        >>> out.tolist(), error.tolist()
        ([128, 63, 128, 63], [0.0, 0.00390625])
    """
    nnz = checks.value_vec("values", values)
    need = max_value_bytes(codec, nnz)
    if checks.byte_vec("out", out) < need:
        checks.refuse(f"out has {out.numel()} bytes, {codec!r} needs {need}")
    if error is not None and checks.value_vec("error", error) < nnz:
        checks.refuse(f"error has {error.numel()} elements, need nnz = {nnz}")
    others = (out,) if error is None else (out, error)
    return kernels_for(values, *others).encode_values(codec, values, out, error)


def decode_values(codec: ValueCodec, data: torch.Tensor, nnz: int, scale: float, out_values: torch.Tensor) -> None:
    """Reads values that `encode_values` wrote; trusts nothing in `data` and `scale`.

    Args:
        codec: value codec.
        data: uint8, exactly the encoded bytes.
        nnz: number of values.
        scale: scale that `encode_values` returned; only FP16 uses it.
        out_values: float32, at least nnz long. The first nnz are filled; after an error they hold garbage.

    Raises:
        WireError: for a wrong length, a scale that is not finite and positive (INT8 block scales may be 0), an INT8
            -128, or values that are not finite.
        KernelError: for unfit tensors.

    Example:
        >>> out = torch.empty(2)
        >>> decode_values(ValueCodec.FP16, torch.tensor([0, 60, 0, 192], dtype=torch.uint8), 2, 0.5, out)
        >>> out.tolist()  # halves 1.0 and -2.0
        [0.5, -1.0]
    """
    checks.count("nnz", nnz)
    checks.byte_vec("data", data)
    if checks.value_vec("out_values", out_values) < nnz:
        checks.refuse(f"out_values has {out_values.numel()} elements, need nnz = {nnz}")
    kernels_for(data, out_values).decode_values(codec, data, nnz, scale, out_values)
