"""Value codecs on a GPU. The byte formats are specified in docs/wire-format.md.

Values are stored at any address, so kernels move single bytes. They are written behind the positions, whose length may
be known on the device alone. Decoders leave a verdict for each payload on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from sparsecomm.errors import WireError
from sparsecomm.kernels.reference import values as reference_values
from sparsecomm.kernels.sizes import BLOCK, max_value_bytes
from sparsecomm.kernels.triton.indices import STATE
from sparsecomm.kernels.triton.launch import ceil_div, launch, read, upload
from sparsecomm.kernels.triton.shared import COLUMNS, Batch, load_bytes, part_of, store_bytes
from sparsecomm.types import ValueCodec

__all__ = [
    "decode_values",
    "encode_values",
    "half_scale",
    "pack_dense",
    "plausible_values",
    "read_values",
    "scale_bits",
    "unpack_dense",
    "write_values",
]

_TILE = 1024


@triton.jit
def _bf16_bits(values):
    """Returns the bits of the nearest bfloat16, ties to even; NaN becomes 0x7FC0."""
    bits = values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int32)


@triton.jit
def _half_exponent(largest):
    """Returns the exponent field of the scale of halves, a power of two, from the bits of the largest magnitude."""
    field = tl.maximum((largest >> 23) - 14, 1)
    return tl.where(largest == 0, 127, field)


@triton.jit
def _largest(values, n, state, TILE: tl.constexpr):
    """Writes the bits of the largest finite magnitude to the state, 0 if there is none."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    bits = tl.load(values + at, mask=at < n, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(state + 2, tl.max(tl.where(bits < 0x7F800000, bits, 0), axis=0).to(tl.int64))


@triton.jit
def _write(values, n, state, out, error, CODEC: tl.constexpr, ERROR: tl.constexpr, TILE: tl.constexpr):
    """Writes FP32, FP16 or BF16; finite values stay finite. `error` may be `values`."""
    out += tl.load(state + 1)
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < n
    value = tl.load(values + at, mask=mask, other=0.0)
    finite = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    if CODEC == 0:
        decoded = value
        store_bytes(out, at, value.to(tl.int32, bitcast=True), mask, 4)
    elif CODEC == 2:
        bits = _bf16_bits(value)
        bits -= (finite & ((bits & 0x7FFF) == 0x7F80)).to(tl.int32)
        decoded = (bits << 16).to(tl.float32, bitcast=True)
        store_bytes(out, at, bits, mask, 2)
    else:
        field = _half_exponent(tl.load(state + 2).to(tl.int32))
        half = (value * ((254 - field) << 23).to(tl.float32, bitcast=True)).to(tl.float16)
        bits = half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        # 32768 * 2**113 is infinite: saturate at the half below
        bits -= (finite & (field == 240) & ((bits & 0x7FFF) == 0x7800)).to(tl.int32)
        decoded = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        decoded = decoded * (field << 23).to(tl.float32, bitcast=True)
        store_bytes(out, at, bits, mask, 2)
    if ERROR:
        tl.store(error + at, tl.where(finite, value - decoded, 0.0), mask=mask)


@triton.jit
def _decoded(data, at, mask, scale, CODEC: tl.constexpr):
    """Returns values of FP32, FP16 or BF16, and how many of them are not finite."""
    if CODEC == 0:
        value = load_bytes(data, at, mask, 4).to(tl.float32, bitcast=True)
    elif CODEC == 2:
        value = (load_bytes(data, at, mask, 2) << 16).to(tl.float32, bitcast=True)
    else:
        value = load_bytes(data, at, mask, 2).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        value = value * scale
    infinite = mask & ((value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000)
    return value, tl.sum(infinite.to(tl.int32), axis=0)


@triton.jit
def _read(data, table, tiles, out, bad, CODEC: tl.constexpr, TILE: tl.constexpr):
    """Reads the values of many payloads."""
    _payload, tile, row = part_of(table, tiles)
    i = tile * TILE + tl.arange(0, TILE)
    mask = i < tl.load(row + 2)
    scale = tl.load(row + 3).to(tl.int32).to(tl.float32, bitcast=True)
    value, infinite = _decoded(data + tl.load(row), i, mask, scale, CODEC)
    if infinite > 0:
        tl.atomic_max(bad + tl.load(row + 5), 1)
    tl.store(out + tl.load(row + 4) + i, value, mask=mask)


@triton.jit
def _read_dense(data, n, scale, out, CODEC: tl.constexpr, ADD: tl.constexpr, TILE: tl.constexpr):
    """Reads a segment of a dense vector, with NaN and infinity."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < n
    factor = 1.0
    if CODEC == 1:
        factor = tl.load(scale)
    value, _infinite = _decoded(data, at, mask, factor, CODEC)
    if ADD:
        value = tl.load(out + at, mask=mask, other=0.0) + value
    tl.store(out + at, value, mask=mask)


@triton.jit
def _write_int8(values, n, state, out, error, blocks, ERROR: tl.constexpr, BLOCK: tl.constexpr):
    out += tl.load(state + 1)
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
    # Rounds to the nearest integer, ties to even, because the sum has no fractional bits.
    q = (tl.minimum(tl.maximum(q, -127.0), 127.0) + 12582912.0) - 12582912.0
    store_bytes(out, block, bits, block < blocks, 4)
    tl.store(out + 4 * blocks + at, q.to(tl.int32).to(tl.int8).to(tl.uint8, bitcast=True), mask=mask)
    if ERROR:
        tl.store(error + at, value - q * scale, mask=mask)


@triton.jit
def _read_int8(data, table, most, out, bad, BLOCK: tl.constexpr):
    """Reads the values of many payloads, in blocks with a scale each."""
    _payload, block, row = part_of(table, most)
    base, n = tl.load(row), tl.load(row + 2)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    bits = load_bytes(data + base, block, block * BLOCK < n, 4)
    head = 4 * ((n + BLOCK - 1) // BLOCK)
    q = tl.load(data + base + head + at, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.int32)
    value = q.to(tl.float32) * bits.to(tl.float32, bitcast=True)
    negative = (bits < 0) & ((bits & 0x7FFFFFFF) != 0)
    wrong = mask & ((q == -128) | ((value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000))
    if negative | ((bits & 0x7FFFFFFF) >= 0x7F800000) | (tl.sum(wrong.to(tl.int32), axis=0) > 0):
        tl.atomic_max(bad + tl.load(row + 5), 1)
    tl.store(out + tl.load(row + 4) + at, value, mask=mask)


def write_values(
    codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, state: torch.Tensor, error: torch.Tensor | None
) -> None:
    """Writes values as `kernels.encode_values` does; never waits for the device.

    Args:
        codec: value codec.
        values: float32, shape (n,).
        out: uint8. Mutated from the end of the positions on, an offset that the state holds.
        state: int64, on the device, as `write_indices` leaves it. Mutated: FP16 stores the largest magnitude there.
        error: float32, shape (n,), or None. Mutated: receives the rounding errors.
    """
    n = values.numel()
    tiles, target, how = ceil_div(n, _TILE), values if error is None else error, {"ERROR": error is not None}
    if codec == ValueCodec.INT8:
        blocks = ceil_div(n, BLOCK)
        launch(_write_int8, blocks, values, n, state, out, target, blocks, BLOCK=BLOCK, **how)
        return
    if codec == ValueCodec.FP16:
        launch(_largest, tiles, values, n, state, TILE=_TILE)
    launch(_write, tiles, values, n, state, out, target, CODEC=int(codec), TILE=_TILE, **how)


def half_scale(largest: int) -> float:
    """Returns the scale of halves, from the bits of the largest magnitude."""
    return math.ldexp(1.0, max((largest >> 23) - 14, 1) - 127) if largest else 1.0


def encode_values(
    codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None
) -> tuple[int, float]:
    """Encodes on the device; waits for it only with FP16, for the scale."""
    n = values.numel()
    state = torch.zeros(STATE, dtype=torch.int64, device=values.device)
    write_values(codec, values, out, state, error)
    scale = half_scale(read(state)[2]) if n and codec == ValueCodec.FP16 else 1.0
    return max_value_bytes(codec, n), scale


def scale_bits(scale: float) -> int:
    """Returns the bits of a scale as float32."""
    with np.errstate(over="ignore"):
        return int(np.float32(scale).view(np.int32))


def plausible_values(codec: ValueCodec, length: int, nnz: int, scale: float) -> bool:
    """Returns whether `length` bytes and a scale can be a payload's values; the kernels rely on that."""
    return length == max_value_bytes(codec, nnz) and (codec != ValueCodec.FP16 or 0 < scale_bits(scale) < 0x7F800000)


def read_values(codec: ValueCodec, batch: Batch, counts: Sequence[int], out: torch.Tensor) -> None:
    """Reads the values of many payloads, each plausible; never waits for the device.

    Args:
        codec: value codec of all of them.
        batch: the payloads. Mutated: verdicts.
        counts: number of values of each payload.
        out: float32, on the device. Mutated where the table says.
    """
    size = BLOCK if codec == ValueCodec.INT8 else _TILE
    most = ceil_div(max(counts), size)
    args = (len(counts) * most, batch.data, batch.table, most, out, batch.bad)
    if codec == ValueCodec.INT8:
        launch(_read_int8, *args, BLOCK=BLOCK)
    else:
        launch(_read, *args, CODEC=int(codec), TILE=_TILE)


def decode_values(codec: ValueCodec, data: torch.Tensor, nnz: int, scale: float, out_values: torch.Tensor) -> None:
    """Decodes on the device; waits for it once, for the verdict."""
    good = plausible_values(codec, data.numel(), nnz, scale)
    if good and nnz:
        table = upload([0, data.numel(), nnz, scale_bits(scale), 0, 0, 0], data.device)
        verdict = table[COLUMNS:]
        read_values(codec, Batch(data, table, verdict), [nnz], out_values)
        good = read(verdict) == [0]
    if not good:
        reference_values.decode_values(codec, data.cpu(), nnz, scale, torch.empty(nnz, dtype=torch.float32))
        raise WireError("values", nnz, "the device and the reference disagree about these bytes")


def pack_dense(codec: ValueCodec, values: torch.Tensor, out: torch.Tensor, error: torch.Tensor | None) -> None:
    """Packs on the device; never waits for it."""
    if not values.numel():
        return
    head = 4 if codec == ValueCodec.FP16 else 0
    state = torch.zeros(STATE, dtype=torch.int64, device=values.device)
    write_values(codec, values, out[head:], state, error)
    if head:
        largest = state[2:3].to(torch.int32)
        field = torch.where(largest == 0, 127, ((largest >> 23) - 14).clamp(min=1))
        out[:head] = (field << 23).view(torch.uint8)


def unpack_dense(codec: ValueCodec, data: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    """Unpacks on the device; never waits for it."""
    n = out.numel()
    if not n:
        return
    head = 4 if codec == ValueCodec.FP16 else 0
    scale = data[:head].clone().view(torch.float32)  # the clone is aligned
    launch(_read_dense, ceil_div(n, _TILE), data[head:], n, scale, out, CODEC=int(codec), ADD=add, TILE=_TILE)
