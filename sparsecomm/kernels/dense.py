"""Segments of a dense vector on the wire: 32 or 16 bits a value, summed in float32.

NaN and infinity are kept, unlike in the values of a sparse payload, because a dense exchange that keeps no residual
passes them on as a plain allreduce does.
"""

from __future__ import annotations

import torch

from sparsecomm.kernels import checks
from sparsecomm.kernels.paths import kernels_for
from sparsecomm.types import ValueCodec

__all__ = ["pack_dense", "packed_bytes", "unpack_dense"]

_WIDTH = {ValueCodec.FP32: 4, ValueCodec.FP16: 2, ValueCodec.BF16: 2}
_SCALE_BYTES = 4


def packed_bytes(codec: ValueCodec, n: int) -> int:
    """Returns the bytes of a segment of n values; 0 for n = 0.

    FP32 and BF16 store the values, little-endian. FP16 stores a float32 scale in front of them, a power of two, so that
    neither end of the range is lost: the largest finite magnitude becomes a half in [16384, 32768].

    Raises:
        KernelError: for a codec that cannot encode a dense vector.

    Example:
        >>> packed_bytes(ValueCodec.FP16, 3), packed_bytes(ValueCodec.BF16, 3), packed_bytes(ValueCodec.FP16, 0)
        (10, 6, 0)
    """
    width = _WIDTH.get(codec)
    if width is None:
        checks.refuse(f"codec must be FP32, FP16 or BF16 for a dense vector, got {codec!r}")
    return width * n + (_SCALE_BYTES if codec == ValueCodec.FP16 and n else 0)


def pack_dense(codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None = None) -> None:
    """Writes values as a segment, rounded to nearest even; finite values stay finite.

    Args:
        codec: FP32, FP16 or BF16.
        values: float32, shape (n,).
        out: uint8, shape (packed_bytes(codec, n),). Overwritten.
        error: float32, shape (n,), or None. Overwritten with the rounding errors; 0 for NaN and infinity.

    Raises:
        KernelError: for unfit tensors.

    Example:
        >>> values, out, error = torch.tensor([1.0, 1.00390625]), torch.empty(4, dtype=torch.uint8), torch.empty(2)
        >>> pack_dense(ValueCodec.BF16, values, out, error)
        >>> out.view(torch.bfloat16).tolist(), error.tolist()
        ([1.0, 1.0], [0.0, 0.00390625])
    """
    n = checks.value_vec("values", values)
    _check_segment("out", codec, out, n)
    if error is not None and checks.value_vec("error", error) != n:
        checks.refuse(f"error has {error.numel()} elements, values {n}: they must be equally long")
    others = (out,) if error is None else (out, error)
    kernels_for(values, *others).pack_dense(codec, values, out, error)


def unpack_dense(codec: ValueCodec, data: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
    """Reads a segment: ``out = values``, or ``out += values``.

    Args:
        codec: FP32, FP16 or BF16.
        data: uint8, shape (packed_bytes(codec, n),), at any alignment.
        out: float32, shape (n,). Mutated.
        add: whether to add to `out` instead of overwriting it.

    Raises:
        KernelError: for unfit tensors.

    Example:
        >>> out = torch.ones(2)
        >>> unpack_dense(ValueCodec.BF16, torch.tensor([0.5, -2.0]).bfloat16().view(torch.uint8), out, add=True)
        >>> out.tolist()
        [1.5, -1.0]
    """
    n = checks.value_vec("out", out)
    _check_segment("data", codec, data, n)
    kernels_for(data, out).unpack_dense(codec, data, out, add)


def _check_segment(name: str, codec: ValueCodec, data: torch.Tensor, n: int) -> None:
    want = packed_bytes(codec, n)
    if checks.byte_vec(name, data) != want:
        checks.refuse(f"{name} has {data.numel()} bytes, {n} values as {codec.name} need {want}")
