"""The value codecs in numpy. The byte formats are specified in docs/wire-format.md."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsecomm.errors import WireError
from sparsecomm.kernels.reference.arrays import array
from sparsecomm.kernels.sizes import BLOCK, max_value_bytes
from sparsecomm.types import ValueCodec

__all__ = ["bf16_from_f32", "decode_values", "encode_values", "half_scale"]

_U8 = npt.NDArray[np.uint8]
_U16 = npt.NDArray[np.uint16]
_F32 = npt.NDArray[np.float32]


def bf16_from_f32(values: _F32) -> _U16:
    """Returns the bits of the nearest bfloat16, ties to even; NaN becomes 0x7FC0."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), np.uint64(0x7FC0), rounded).astype(np.uint16)


def _f32_from_bf16(halves: _U16) -> _F32:
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def half_scale(largest: float) -> float:
    """Returns the power of two s with largest / s in [16384, 32768), at least 2**-126; 1 for 0."""
    if largest == 0.0:
        return 1.0
    return math.ldexp(1.0, max(math.frexp(largest)[1] - 15, -126))


def _blocks(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns the values in shape (blocks, 128), padded with zeros."""
    padded = np.zeros(-(-len(values) // BLOCK) * BLOCK, dtype=values.dtype)
    padded[: len(values)] = values
    return padded.reshape(-1, BLOCK)


def _encode_int8(values: _F32) -> tuple[_F32, npt.NDArray[np.int8]]:
    blocks: _F32 = _blocks(values)
    scales: _F32 = np.abs(blocks).max(axis=1, initial=0) / np.float32(127)
    # The quotient may round up so far that 127 * scale overflows.
    scales = np.where(np.isinf(scales * np.float32(127)), np.nextafter(scales, np.float32(0)), scales)
    divisors = np.where(scales == 0, np.float32(np.inf), scales)
    q = np.clip(np.rint(blocks / divisors[:, None]), -127, 127).astype(np.int8)
    return scales, q.ravel()[: len(values)]


def _decode_int8(scales: _F32, q: npt.NDArray[np.int8]) -> _F32:
    decoded: _F32 = (_blocks(q).astype(np.float32) * scales[:, None]).ravel()[: len(q)]
    return decoded


def encode_values(
    codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None
) -> tuple[int, float]:
    """Rounds with numpy and computes the errors from the decoded values."""
    val: _F32 = array(values)
    scale = 1.0
    with np.errstate(all="ignore"):
        if codec == ValueCodec.FP32:
            decoded, encoded = val, val.astype("<f4").view(np.uint8)
        elif codec == ValueCodec.BF16:
            halves = bf16_from_f32(val)
            halves -= (halves & np.uint16(0x7FFF)) == 0x7F80  # saturate: the largest finite is one below infinity
            decoded, encoded = _f32_from_bf16(halves), halves.astype("<u2").view(np.uint8)
        elif codec == ValueCodec.FP16:
            scale = half_scale(float(np.abs(val).max(initial=0)))
            f16 = (val * np.float32(1.0 / scale)).astype(np.float16)
            if scale == 2.0**113:  # 32768 * 2**113 is infinite: saturate at the half below
                f16 = np.clip(f16, np.float16(-32752), np.float16(32752))
            decoded, encoded = f16.astype(np.float32) * np.float32(scale), f16.astype("<f2").view(np.uint8)
        else:
            scales, q = _encode_int8(val)
            decoded = _decode_int8(scales, q)
            encoded = np.concatenate([scales.astype("<f4").view(np.uint8), q.view(np.uint8)])
        if error is not None:
            array(error)[: len(val)] = val - decoded
    array(out)[: len(encoded)] = encoded
    return len(encoded), scale


def decode_values(codec: ValueCodec, data: torch.Tensor, nnz: int, scale: float, out_values: torch.Tensor) -> None:
    """Decodes into a temporary array and copies it once all values are known to be finite."""
    octets: _U8 = array(data)
    want = max_value_bytes(codec, nnz)
    if len(octets) != want:
        raise WireError("value_bytes", len(octets), f"must be {want}")
    with np.errstate(all="ignore"):
        if codec == ValueCodec.FP32:
            decoded: _F32 = octets.view("<f4").astype(np.float32)
        elif codec == ValueCodec.BF16:
            decoded = _f32_from_bf16(octets.view("<u2").astype(np.uint16))
        elif codec == ValueCodec.FP16:
            scale32 = np.float32(scale)
            if not (scale32 > 0 and np.isfinite(scale32)):
                raise WireError("value_scale", scale, "must be positive and finite in float32")
            decoded = octets.view("<f2").astype(np.float32) * scale32
        else:
            head = 4 * -(-nnz // BLOCK)
            scales: _F32 = octets[:head].view("<f4").astype(np.float32)
            bad = ~((scales >= 0) & np.isfinite(scales))
            if bad.any():
                raise WireError("value_scale", float(scales[bad][0]), "must be finite and not negative")
            q = octets[head:].view(np.int8)
            if (q == -128).any():
                raise WireError("values", -128, "quantized values must be between -127 and 127")
            decoded = _decode_int8(scales, q)
    bad = ~np.isfinite(decoded)
    if bad.any():
        raise WireError("values", float(decoded[bad][0]), "must be finite")
    array(out_values)[:nnz] = decoded
