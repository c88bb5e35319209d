"""Positions to bytes on a GPU. The byte formats are specified in docs/wire-format.md.

For BITPACK and RICE each program encodes one block of 128 gaps; a scan of the blocks' lengths tells where the bytes of
each go. RICE's unary stream is set bit by bit in whole words, by an atomic or of integers, whose order is irrelevant.

The number of bytes, and whether positions ascend, stay on the device in a state of `STATE` int64. The kernels that
write the values behind the positions read it there; the host learns both when it fetches the bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsecomm.kernels.reference import indices as reference_indices
from sparsecomm.kernels.sizes import BLOCK, max_index_bytes
from sparsecomm.kernels.triton.launch import ceil_div, launch, read
from sparsecomm.kernels.triton.shared import store_bytes
from sparsecomm.types import IndexCodec

__all__ = ["STATE", "encode_indices", "refuse_unsorted", "write_indices"]

STATE = 4
"""int64 in the state of an encoding: whether positions are wrong, their bytes, the largest magnitude, unused."""

_TILE = 1024


@triton.jit
def _gaps(indices, nnz, block, BLOCK: tl.constexpr):
    """Returns the gaps minus one of a block, zeros after the last, with their mask and the positions."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < nnz
    here = tl.load(indices + i, mask=mask, other=0).to(tl.int64) & 0xFFFFFFFF
    prior = tl.load(indices + i - 1, mask=mask & (i > 0), other=0).to(tl.int64) & 0xFFFFFFFF
    prior = tl.where(i > 0, prior, -1)
    return tl.where(mask, here - prior - 1, 0), mask, here


@triton.jit
def _ascending(indices, i, nnz, numel, state):
    """Returns positions and their mask; sets the state's flag if they do not ascend below numel."""
    mask = i < nnz
    here = tl.load(indices + i, mask=mask, other=0).to(tl.int64) & 0xFFFFFFFF
    prior = tl.load(indices + i - 1, mask=mask & (i > 0), other=0).to(tl.int64) & 0xFFFFFFFF
    wrong = mask & ((here >= numel) | ((i > 0) & (prior >= here)))
    if tl.sum(wrong.to(tl.int32), axis=0) > 0:
        tl.atomic_max(state, 1)
    return here, mask


@triton.jit
def _measure(indices, nnz, numel, params, sizes, quotients, state, RICE: tl.constexpr, BLOCK: tl.constexpr):
    """Computes the parameter, the packed bytes and the bits of the quotients of each block."""
    block = tl.program_id(0).to(tl.int64)
    gaps, mask, here = _gaps(indices, nnz, block, BLOCK)
    wrong = mask & ((gaps < 0) | (here >= numel))
    if tl.sum(wrong.to(tl.int32), axis=0) > 0:
        tl.atomic_max(state, 1)
    gaps = tl.maximum(gaps, 0)
    count = tl.minimum(nnz - block * BLOCK, BLOCK)
    if RICE:
        ratio = ((tl.sum(gaps, axis=0) * 45426) >> 16) // count
        powers = tl.arange(0, 32).to(tl.int64)
        low = tl.sum((ratio >> powers > 1).to(tl.int64), axis=0)
        low = tl.where(low > 31, 31, low)
        high = tl.minimum(low + 1, 31)
        low_sum = tl.sum(gaps >> low, axis=0)
        high_sum = tl.sum(gaps >> high, axis=0)
        better = count * (high + 1) + high_sum < count * (low + 1) + low_sum
        param = tl.where(better, high, low)
        tl.store(quotients + block, tl.where(better, high_sum, low_sum) + count)
    else:
        largest = tl.max(gaps, axis=0)
        powers = tl.arange(0, 64).to(tl.int64)
        param = tl.sum(((largest >> powers) > 0).to(tl.int64), axis=0)
        tl.store(quotients + block, 0)
    tl.store(params + block, param.to(tl.uint8))
    tl.store(sizes + block, tl.where(count == BLOCK, param * (BLOCK // 8), (count * param + 7) // 8))


@triton.jit
def _pack(
    indices, nnz, params, ends, sizes, out, low, unary_ends, quotients, unary, state, RICE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the low bits of a block's gaps as bytes, and its quotients into the unary stream."""
    if tl.load(state) == 0:
        block = tl.program_id(0).to(tl.int64)
        param = tl.load(params + block).to(tl.int64)
        gaps, mask, _here = _gaps(indices, nnz, block, BLOCK)
        size = tl.load(sizes + block)
        start = tl.load(ends + block) - size
        tl.store(low + block * BLOCK + tl.arange(0, BLOCK), gaps)
        tl.debug_barrier()
        byte = tl.arange(0, 4 * BLOCK).to(tl.int64)
        width = tl.maximum(param, 1)
        packed = byte * 0
        for bit in tl.static_range(8):
            which = (byte * 8 + bit) // width
            gap = tl.load(low + block * BLOCK + which, mask=(byte < size) & (which < BLOCK), other=0)
            packed |= ((gap >> ((byte * 8 + bit) % width)) & 1) << bit
        tl.store(out + start + byte, packed.to(tl.uint8), mask=byte < size)
        if RICE:
            quotient = tl.where(mask, (gaps >> param) + 1, 0)
            at = tl.load(unary_ends + block) - tl.load(quotients + block) + tl.cumsum(quotient, axis=0) - 1
            tl.atomic_or(unary + (at >> 5), (1 << (at & 31)).to(tl.int32), mask=mask)


@triton.jit
def _close(ends, unary_ends, blocks, unary, out, state, RICE: tl.constexpr, TILE: tl.constexpr):
    """Copies the unary stream behind the packed bits and stores the length of everything."""
    if tl.load(state) == 0:
        low = tl.load(ends + blocks - 1)
        size = low * 0
        if RICE:
            size = (tl.load(unary_ends + blocks - 1) + 7) // 8
            byte = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
            mask = byte < size
            tl.store(out + low + byte, tl.load(unary + byte, mask=mask, other=0), mask=mask)
        if tl.program_id(0) == 0:
            tl.store(state + 1, blocks + low + size)


@triton.jit
def _bitmap(indices, nnz, numel, words, state, TILE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here, mask = _ascending(indices, i, nnz, numel, state)
    tl.atomic_or(words + (here >> 5), (1 << (here & 31)).to(tl.int32), mask=mask & (here < numel))


@triton.jit
def _plain(indices, nnz, numel, out, state, WRITE: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here, mask = _ascending(indices, i, nnz, numel, state)
    if WRITE:
        store_bytes(out, i, here, mask, 4)


def write_indices(
    codec: IndexCodec, indices: torch.Tensor, numel: int, out: torch.Tensor, state: torch.Tensor
) -> int | None:
    """Writes positions as `kernels.encode_indices` does; never waits for the device.

    Args:
        codec: index codec.
        indices: uint32, shape (nnz,).
        numel: length of the dense vector.
        out: uint8, at least `max_index_bytes` long. Mutated.
        state: int64, shape (STATE,), zeros, on the device. Mutated: whether positions are wrong; bytes written.

    Returns:
        Bytes written if they do not depend on the positions, in which case the state says 0; else None.
    """
    nnz, raw = indices.numel(), indices.view(torch.int32)
    if codec in (IndexCodec.BITPACK, IndexCodec.RICE):
        if not nnz:
            return 0
        _write_gaps(raw, numel, out, state, rice=codec == IndexCodec.RICE)
        return None
    tiles = ceil_div(nnz, _TILE)
    if codec == IndexCodec.BITMAP:
        words = torch.zeros(ceil_div(numel, 32), dtype=torch.int32, device=indices.device)
        launch(_bitmap, tiles, raw, nnz, numel, words, state, TILE=_TILE)
        length = ceil_div(numel, 8)
        out[:length] = words.view(torch.uint8)[:length]
        return length
    launch(_plain, tiles, raw, nnz, numel, out, state, WRITE=codec == IndexCodec.RAW, TILE=_TILE)
    return 4 * nnz if codec == IndexCodec.RAW else 0


def _write_gaps(raw: torch.Tensor, numel: int, out: torch.Tensor, state: torch.Tensor, *, rice: bool) -> None:
    nnz, device = raw.numel(), raw.device
    blocks = ceil_div(nnz, BLOCK)
    sums = torch.empty((2, blocks), dtype=torch.int64, device=device)
    launch(_measure, blocks, raw, nnz, numel, out, sums[0], sums[1], state, RICE=rice, BLOCK=BLOCK)
    ends = torch.cumsum(sums, 1)
    # Room for the worst placement, because only the device knows the real number of bytes.
    most = max_index_bytes(IndexCodec.RICE, nnz, numel) if rice else 0
    unary = torch.zeros(ceil_div(most, 4), dtype=torch.int32, device=device)
    low = torch.empty(blocks * BLOCK, dtype=torch.int64, device=device)
    body, sizes, quotients = out[blocks:], sums[0], sums[1]
    how = {"RICE": rice, "BLOCK": BLOCK}
    launch(_pack, blocks, raw, nnz, out, ends[0], sizes, body, low, ends[1], quotients, unary, state, **how)
    octets, tiles = unary.view(torch.uint8), max(1, ceil_div(most, _TILE))
    launch(_close, tiles, ends[0], ends[1], blocks, octets, body, state, RICE=rice, TILE=_TILE)


def encode_indices(codec: IndexCodec, indices: torch.Tensor, numel: int, out: torch.Tensor) -> int:
    """Encodes on the device; waits for it once, for the length and whether positions ascend."""
    state = torch.zeros(STATE, dtype=torch.int64, device=indices.device)
    known = write_indices(codec, indices, numel, out, state)
    wrong, length, *_ = read(state)
    if wrong:
        refuse_unsorted(codec, indices, numel)
    return int(length) if known is None else known


def refuse_unsorted(codec: IndexCodec, indices: torch.Tensor, numel: int) -> None:
    """Raises the reference's error for positions that the device has refused."""
    room = torch.empty(max_index_bytes(codec, indices.numel(), numel), dtype=torch.uint8)
    reference_indices.encode_indices(codec, indices.cpu(), numel, room)
    raise AssertionError("the reference finds nothing wrong with positions that the device refused")
