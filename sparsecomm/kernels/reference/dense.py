"""Segments of a dense vector in numpy. The format is that of `sparsecomm.kernels.dense`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sparsecomm.kernels.reference.arrays import array
from sparsecomm.kernels.reference.values import bf16_from_f32, half_scale
from sparsecomm.types import ValueCodec

__all__ = ["pack_dense", "unpack_dense"]

_F32 = npt.NDArray[np.float32]
_TOP_SCALE = 2.0**113  # 32768 times this is infinite
_TOP_HALF = np.float16(32752)


def _pack_f16(values: _F32, finite: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    scale = half_scale(float(np.abs(values[finite]).max(initial=0)))
    halves = (values * np.float32(1.0 / scale)).astype(np.float16)
    if scale == _TOP_SCALE:
        halves = np.where(finite, np.clip(halves, -_TOP_HALF, _TOP_HALF), halves)
    head = np.array([scale], dtype="<f4").view(np.uint8)
    return np.concatenate([head, halves.astype("<f2").view(np.uint8)])


def _pack_bf16(values: _F32, finite: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    halves = bf16_from_f32(values)
    halves -= finite & ((halves & np.uint16(0x7FFF)) == 0x7F80)  # saturate, so that finite values stay finite
    return halves.astype("<u2").view(np.uint8)


def _read(codec: ValueCodec, data: npt.NDArray[np.uint8]) -> _F32:
    if codec == ValueCodec.FP16:
        read: _F32 = data[4:].view("<f2").astype(np.float32) * data[:4].view("<f4").astype(np.float32)
    elif codec == ValueCodec.BF16:
        read = (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        read = data.view("<f4").astype(np.float32)
    return read


def pack_dense(codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None) -> None:
    """Rounds with numpy; the scale of FP16 comes from the largest finite magnitude."""
    if not values.numel():
        return
    val: _F32 = array(values)
    finite = np.isfinite(val)
    with np.errstate(all="ignore"):
        if codec == ValueCodec.FP16:
            packed = _pack_f16(val, finite)
        elif codec == ValueCodec.BF16:
            packed = _pack_bf16(val, finite)
        else:
            packed = val.astype("<f4").view(np.uint8)
        if error is not None:
            array(error)[:] = np.where(finite, val - _read(codec, packed), np.float32(0))
    array(out)[:] = packed


def unpack_dense(codec: ValueCodec, data: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    """Decodes into a temporary array, then copies it or adds it."""
    if not out.numel():
        return
    target: _F32 = array(out)
    with np.errstate(all="ignore"):
        values = _read(codec, np.array(array(data)))
        target[:] = target + values if add else values
