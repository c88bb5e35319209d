"""Value codecs on a GPU. The byte formats are specified in docs/wire-format.md.

Values go to and come from bytes at any address, so kernels move single bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsecomm.errors import WireError
from sparsecomm.kernels import reference_values
from sparsecomm.kernels.sizes import BLOCK, max_value_bytes
from sparsecomm.kernels.triton_launch import ceil_div, launch
from sparsecomm.types import ValueCodec

__all__ = ["decode_values", "encode_values", "pack_dense", "unpack_dense"]

_TILE = 1024
_INF = 0x7F800000


@triton.jit
def _bf16_bits(values):
    """Bits of the nearest bfloat16, ties to even; NaN becomes 0x7FC0."""
    bits = values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int32)


@triton.jit
def _half_exponent(largest):
    """The exponent field of the power of two that halves are scaled by, from the bits of the largest magnitude."""
    field = tl.maximum((largest >> 23) - 14, 1)
    return tl.where(largest == 0, 127, field)


@triton.jit
def _store_bytes(out, at, bits, mask, WIDTH: tl.constexpr):
    for byte in tl.static_range(WIDTH):
        tl.store(out + at * WIDTH + byte, ((bits >> (8 * byte)) & 255).to(tl.uint8), mask=mask)


@triton.jit
def _load_bytes(data, at, mask, WIDTH: tl.constexpr):
    bits = tl.load(data + at * WIDTH, mask=mask, other=0).to(tl.int32)
    for byte in tl.static_range(1, WIDTH):
        bits |= tl.load(data + at * WIDTH + byte, mask=mask, other=0).to(tl.int32) << (8 * byte)
    return bits


@triton.jit
def _write(values, n, largest, out, error, CODEC: tl.constexpr, ERROR: tl.constexpr, TILE: tl.constexpr):
    """FP32, FP16 or BF16; finite values stay finite. `error` may be `values`."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < n
    value = tl.load(values + at, mask=mask, other=0.0)
    finite = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    if CODEC == 0:
        decoded = value
        _store_bytes(out, at, value.to(tl.int32, bitcast=True), mask, 4)
    elif CODEC == 2:
        bits = _bf16_bits(value)
        bits -= (finite & ((bits & 0x7FFF) == 0x7F80)).to(tl.int32)
        decoded = (bits << 16).to(tl.float32, bitcast=True)
        _store_bytes(out, at, bits, mask, 2)
    else:
        field = _half_exponent(tl.load(largest))
        half = (value * ((254 - field) << 23).to(tl.float32, bitcast=True)).to(tl.float16)
        bits = half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        # 32768 * 2**113 would be infinite: saturate at the half below
        bits -= (finite & (field == 240) & ((bits & 0x7FFF) == 0x7800)).to(tl.int32)
        decoded = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        decoded = decoded * (field << 23).to(tl.float32, bitcast=True)
        _store_bytes(out, at, bits, mask, 2)
    if ERROR:
        tl.store(error + at, tl.where(finite, value - decoded, 0.0), mask=mask)


@triton.jit
def _read(data, n, scale, out, bad, CODEC: tl.constexpr, ADD: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < n
    if CODEC == 0:
        value = _load_bytes(data, at, mask, 4).to(tl.float32, bitcast=True)
    elif CODEC == 2:
        value = (_load_bytes(data, at, mask, 2) << 16).to(tl.float32, bitcast=True)
    else:
        value = _load_bytes(data, at, mask, 2).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        value = value * tl.load(scale)
    infinite = mask & ((value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000)
    if tl.sum(infinite.to(tl.int32), axis=0) > 0:
        tl.atomic_max(bad, 1)
    if ADD:
        value = tl.load(out + at, mask=mask, other=0.0) + value
    tl.store(out + at, value, mask=mask)


@triton.jit
def _write_int8(values, n, out, error, blocks, ERROR: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    value = tl.load(values + at, mask=mask, other=0.0)
    scale = tl.div_rn(tl.max(tl.abs(value), axis=0), 127.0)
    bits = scale.to(tl.int32, bitcast=True)
    # The quotient may round up so far that 127 * scale overflows.
    bits -= (((scale * 127.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000).to(tl.int32)
    scale = bits.to(tl.float32, bitcast=True)
    q = tl.div_rn(value, tl.where(scale == 0.0, float("inf"), scale) + value * 0.0)
    # To the nearest integer, ties to even: this sum has no bits below the point.
    q = (tl.minimum(tl.maximum(q, -127.0), 127.0) + 12582912.0) - 12582912.0
    _store_bytes(out, block, bits, block < blocks, 4)
    tl.store(out + 4 * blocks + at, q.to(tl.int32).to(tl.int8).to(tl.uint8, bitcast=True), mask=mask)
    if ERROR:
        tl.store(error + at, value - q * scale, mask=mask)


@triton.jit
def _read_int8(data, n, out, blocks, bad, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    bits = _load_bytes(data, block, block < blocks, 4)
    q = tl.load(data + 4 * blocks + at, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.int32)
    value = q.to(tl.float32) * bits.to(tl.float32, bitcast=True)
    negative = (bits < 0) & ((bits & 0x7FFFFFFF) != 0)
    wrong = mask & ((q == -128) | ((value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000))
    if negative | ((bits & 0x7FFFFFFF) >= 0x7F800000) | (tl.sum(wrong.to(tl.int32), axis=0) > 0):
        tl.atomic_max(bad, 1)
    tl.store(out + at, value, mask=mask)


def _largest(values: torch.Tensor) -> torch.Tensor:
    """int32, on the device: bits of the largest finite magnitude, 0 for none."""
    bits = values.view(torch.int32) & 0x7FFFFFFF
    return torch.where(bits < _INF, bits, 0).amax().reshape(1)


def _write_values(
    codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None
) -> torch.Tensor:
    """Writes FP32, FP16 or BF16; returns bits of the largest magnitude, which FP16 looks at."""
    largest = _largest(values) if codec == ValueCodec.FP16 else torch.empty(1, dtype=torch.int32, device=values.device)
    n, wanted = values.numel(), error is not None
    target = values if error is None else error
    launch(_write, ceil_div(n, _TILE), values, n, largest, out, target, CODEC=int(codec), ERROR=wanted, TILE=_TILE)
    return largest


def _scale_of(largest: torch.Tensor) -> torch.Tensor:
    """float32, on the device: the scale of halves."""
    field = ((largest >> 23) - 14).clamp(min=1)
    return (torch.where(largest == 0, 127, field) << 23).view(torch.float32)


def encode_values(
    codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None
) -> tuple[int, float]:
    """See `dispatch.encode_values`. Waits for the device only with FP16, for the scale."""
    n = values.numel()
    if n and codec == ValueCodec.INT8:
        blocks, target = ceil_div(n, BLOCK), values if error is None else error
        launch(_write_int8, blocks, values, n, out, target, blocks, ERROR=error is not None, BLOCK=BLOCK)
    elif n:
        largest = _write_values(codec, values, out, error)
        if codec == ValueCodec.FP16:
            return max_value_bytes(codec, n), float(_scale_of(largest))
    return max_value_bytes(codec, n), 1.0


def decode_values(codec: ValueCodec, data: torch.Tensor, nnz: int, scale: float, out_values: torch.Tensor) -> None:
    """See `dispatch.decode_values`. Waits for the device once, for the verdict."""
    bad = torch.zeros(1, dtype=torch.int32, device=data.device)
    good = data.numel() == max_value_bytes(codec, nnz)
    scale32 = float(torch.tensor(scale, dtype=torch.float32))
    if codec == ValueCodec.FP16:
        good = good and 0.0 < scale32 < float("inf")
    if good and codec == ValueCodec.INT8:
        blocks = ceil_div(nnz, BLOCK)
        launch(_read_int8, blocks, data, nnz, out_values, blocks, bad, BLOCK=BLOCK)
    elif good:
        factor = torch.full((1,), scale32, dtype=torch.float32, device=data.device)
        tiles = ceil_div(nnz, _TILE)
        launch(_read, tiles, data, nnz, factor, out_values, bad, CODEC=int(codec), ADD=False, TILE=_TILE)
    if good and not bool(bad):
        return
    reference_values.decode_values(codec, data.cpu(), nnz, scale, torch.empty(nnz))
    raise WireError("values", nnz, "the device and the reference disagree about these bytes")


def pack_dense(codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None) -> None:
    """See `dispatch.pack_dense`. Never waits for the device."""
    if not values.numel():
        return
    head = 4 if codec == ValueCodec.FP16 else 0
    largest = _write_values(codec, values, out[head:], error)
    if head:
        out[:head] = _scale_of(largest).view(torch.uint8)


def unpack_dense(codec: ValueCodec, data: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    """See `dispatch.unpack_dense`. Never waits for the device."""
    n = out.numel()
    if not n:
        return
    head = 4 if codec == ValueCodec.FP16 else 0
    scale = data[:head].clone().view(torch.float32)  # the clone is aligned
    verdict = torch.empty(1, dtype=torch.int32, device=data.device)  # NaN and infinity travel: nobody looks at it
    launch(_read, ceil_div(n, _TILE), data[head:], n, scale, out, verdict, CODEC=int(codec), ADD=add, TILE=_TILE)
