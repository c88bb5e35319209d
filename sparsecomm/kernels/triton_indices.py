"""Index codecs on a GPU. The byte formats are specified in docs/wire-format.md.

BITPACK and RICE: a program a block of 128 gaps; where a block's bytes go is a scan of their lengths. RICE's unary
stream is set bit by bit in whole words (an atomic or of integers: no order matters), and read by finding its ones.

Decoders trust nothing: they read only inside the data, write only inside the output, and leave a verdict on the device.
If that is bad, the reference judges the same bytes again, so that the error is the reference's own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsecomm.errors import WireError
from sparsecomm.kernels import reference_indices
from sparsecomm.kernels.sizes import BLOCK
from sparsecomm.kernels.triton_launch import ceil_div, launch
from sparsecomm.types import IndexCodec

__all__ = ["decode_indices", "encode_indices"]

_BITS = 4096


@triton.jit
def _gaps(indices, nnz, block, BLOCK: tl.constexpr):
    """Gaps minus one of a block, zeros after the last, and whether the positions ascend."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < nnz
    here = tl.load(indices + i, mask=mask, other=0).to(tl.int64) & 0xFFFFFFFF
    prior = tl.load(indices + i - 1, mask=mask & (i > 0), other=0).to(tl.int64) & 0xFFFFFFFF
    prior = tl.where(i > 0, prior, -1)
    return tl.where(mask, here - prior - 1, 0), mask, here


@triton.jit
def _measure(indices, nnz, numel, params, sizes, quotients, bad, RICE: tl.constexpr, BLOCK: tl.constexpr):
    """The parameter, packed bytes and sum of quotients of each block."""
    block = tl.program_id(0).to(tl.int64)
    gaps, mask, here = _gaps(indices, nnz, block, BLOCK)
    wrong = mask & ((gaps < 0) | (here >= numel))
    if tl.sum(wrong.to(tl.int32), axis=0) > 0:
        tl.atomic_max(bad, 1)
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
    tl.store(params + block, param.to(tl.uint8))
    tl.store(sizes + block, tl.where(count == BLOCK, param * (BLOCK // 8), (count * param + 7) // 8))


@triton.jit
def _pack(
    indices, nnz, params, ends, sizes, out, low, unary_ends, quotients, unary, RICE: tl.constexpr, BLOCK: tl.constexpr
):
    """The low bits of a block's gaps to bytes, and its quotients to the unary stream."""
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


def encode_indices(codec: IndexCodec, indices: torch.Tensor, numel: int, out: torch.Tensor) -> int:
    """See `dispatch.encode_indices`. Waits for the device once, for the length and whether positions ascend."""
    nnz, device, raw = indices.numel(), indices.device, indices.view(torch.int32)
    if codec not in (IndexCodec.BITPACK, IndexCodec.RICE):
        return _encode_plain(codec, indices, numel, out)
    blocks, rice = ceil_div(nnz, BLOCK), codec == IndexCodec.RICE
    if not nnz:
        return 0
    sums = torch.zeros((2, blocks), dtype=torch.int64, device=device)
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    launch(_measure, blocks, raw, nnz, numel, out, sums[0], sums[1], bad, RICE=rice, BLOCK=BLOCK)
    ends = torch.cumsum(sums, 1)
    # What the host learns here, the length, is what it is asked for; it also sizes the unary stream.
    length, ones, wrong = torch.stack([ends[0, -1], ends[1, -1], bad[0].to(torch.int64)]).tolist()
    if wrong:
        _refuse_unsorted(codec, indices, numel, out)
    unary = torch.zeros(ceil_div(ones, 32), dtype=torch.int32, device=device)
    low = torch.empty(blocks * BLOCK, dtype=torch.int64, device=device)
    body = out[blocks:]
    launch(_pack, blocks, raw, nnz, out, ends[0], sums[0], body, low, ends[1], sums[1], unary, RICE=rice, BLOCK=BLOCK)
    if rice:
        size = ceil_div(ones, 8)
        body[length : length + size] = unary.view(torch.uint8)[:size]
        length += size
    return blocks + int(length)


def _refuse_unsorted(codec: IndexCodec, indices: torch.Tensor, numel: int, out: torch.Tensor) -> None:
    reference_indices.encode_indices(codec, indices.cpu(), numel, torch.empty(out.numel(), dtype=torch.uint8))
    raise AssertionError("the reference finds nothing wrong with positions that the device refused")


@triton.jit
def _bitmap(indices, nnz, numel, words, bad, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < nnz
    here = tl.load(indices + i, mask=mask, other=0).to(tl.int64) & 0xFFFFFFFF
    prior = tl.load(indices + i - 1, mask=mask & (i > 0), other=0).to(tl.int64) & 0xFFFFFFFF
    wrong = mask & ((here >= numel) | ((i > 0) & (prior >= here)))
    if tl.sum(wrong.to(tl.int32), axis=0) > 0:
        tl.atomic_max(bad, 1)
    tl.atomic_or(words + (here >> 5), (1 << (here & 31)).to(tl.int32), mask=mask & (here < numel))


def _encode_plain(codec: IndexCodec, indices: torch.Tensor, numel: int, out: torch.Tensor) -> int:
    """RAW, DENSE and BITMAP; the last one's words also tell whether positions ascend."""
    nnz, device, raw = indices.numel(), indices.device, indices.view(torch.int32)
    bitmap = codec == IndexCodec.BITMAP
    words = torch.zeros(ceil_div(numel, 32) if bitmap else 0, dtype=torch.int32, device=device)
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    if bitmap:
        launch(_bitmap, ceil_div(nnz, 1024), raw, nnz, numel, words, bad, BLOCK=1024)
    elif nnz:
        wide = raw.to(torch.int64) & 0xFFFFFFFF
        bad[0] = (wide[-1] >= numel) | (wide[1:] <= wide[:-1]).any()
    if int(bad):
        _refuse_unsorted(codec, indices, numel, out)
    if codec == IndexCodec.DENSE:
        return 0
    length = ceil_div(numel, 8) if bitmap else 4 * nnz
    # A tensor of one element may have any stride, and only stride 1 can be viewed as bytes.
    source = words if bitmap else raw.as_strided((nnz,), (1,))
    out[:length] = source.view(torch.uint8)[:length]
    return length


@triton.jit
def _unpack(data, length, params, ends, sizes, low, nnz, bad, most, BLOCK: tl.constexpr):
    """The packed bits of a block: `low`, and whether parameter and padding are in order."""
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    param = tl.load(params + block).to(tl.int64)
    size = tl.load(sizes + block)
    start = tl.load(ends + block) - size
    first = lane * param
    here = block * BLOCK + lane < nnz
    word = lane * 0
    for byte in tl.static_range(5):
        at = start + (first >> 3) + byte
        octet = tl.load(data + at, mask=here & (at >= 0) & (at < length), other=0).to(tl.int64)
        word |= octet << (8 * byte)
    width = tl.minimum(param, 32)
    tl.store(low + block * BLOCK + lane, (word >> (first & 7)) & ((width * 0 + 1 << width) - 1), mask=here)
    used = tl.minimum(nnz - block * BLOCK, BLOCK) * param
    final = start + size - 1
    last = tl.load(data + final, mask=(size > 0) & (final >= 0) & (final < length), other=0).to(tl.int64)
    padded = ((used & 7) != 0) & ((last >> (used & 7)) != 0)
    if padded | (param > most):
        tl.atomic_max(bad, 1)


@triton.jit
def _count_ones(data, start, length, counts, BITS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    bit = block * BITS + tl.arange(0, BITS)
    at = tl.load(start) + (bit >> 3)
    octet = tl.load(data + at, mask=(at >= 0) & (at < length), other=0).to(tl.int32)
    tl.store(counts + block, tl.sum((octet >> (bit & 7).to(tl.int32)) & 1, axis=0))


@triton.jit
def _find_ones(data, start, length, counts, ends, ones, nnz, BITS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    bit = block * BITS + tl.arange(0, BITS)
    at = tl.load(start) + (bit >> 3)
    octet = tl.load(data + at, mask=(at >= 0) & (at < length), other=0).to(tl.int32)
    one = (octet >> (bit & 7).to(tl.int32)) & 1
    rank = tl.load(ends + block) - tl.load(counts + block) + tl.cumsum(one, axis=0) - 1
    tl.store(ones + rank, bit, mask=(one == 1) & (rank < nnz))


@triton.jit
def _sum_gaps(low, ones, params, nnz, totals, RICE: tl.constexpr, BLOCK: tl.constexpr):
    """Whole gaps into `low` as sums inside the block, and the block's total; past any position all is the same."""
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < nnz
    gap = tl.load(low + i, mask=mask, other=0)
    if RICE:
        param = tl.minimum(tl.load(params + block).to(tl.int64), 31)
        prior = tl.where(i > 0, tl.load(ones + i - 1, mask=mask & (i > 0), other=0), -1)
        quotient = tl.load(ones + i, mask=mask, other=0) - prior - 1
        whole = (tl.minimum(tl.maximum(quotient, 0), 4294967295) << param) + gap
        gap = tl.where(quotient > 4294967295, 4294967296, whole)
    step = tl.where(mask, tl.minimum(gap, 4294967296) + 1, 0)
    tl.store(low + i, tl.cumsum(step, axis=0), mask=mask)
    tl.store(totals + block, tl.sum(step, axis=0))


@triton.jit
def _place(low, totals, ends, nnz, numel, out, bad, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < nnz
    at = tl.load(ends + block) - tl.load(totals + block) + tl.load(low + i, mask=mask, other=1) - 1
    tl.store(out + i, at.to(tl.int32), mask=mask)
    wrong = mask & ((at >= numel) | (at < 0))
    if tl.sum(wrong.to(tl.int32), axis=0) > 0:
        tl.atomic_max(bad, 1)


def decode_indices(codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int, out_indices: torch.Tensor) -> None:
    """See `dispatch.decode_indices`. Waits for the device once, for the verdict."""
    out = out_indices.view(torch.int32)[:nnz]
    if codec in (IndexCodec.BITPACK, IndexCodec.RICE):
        good = data.numel() >= ceil_div(nnz, BLOCK) and _decode_gaps(codec, data, nnz, numel, out)
    else:
        good = _decode_plain(codec, data, nnz, numel, out)
    if not good:
        _judge(codec, data, nnz, numel)


def _judge(codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int) -> None:
    reference_indices.decode_indices(codec, data.cpu(), nnz, numel, torch.empty(nnz, dtype=torch.uint32))
    raise WireError("indices", nnz, "the device and the reference disagree about these bytes")


def _decode_gaps(codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int, out: torch.Tensor) -> bool:
    blocks, device, rice, length = ceil_div(nnz, BLOCK), data.device, codec == IndexCodec.RICE, data.numel()
    if not nnz:
        return length == 0
    sizes = data[:blocks].to(torch.int64) * (BLOCK // 8)
    if nnz % BLOCK:
        sizes[-1] = (data[blocks - 1].to(torch.int64) * (nnz % BLOCK) + 7) // 8
    ends = torch.cumsum(sizes, 0) + blocks
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    low = torch.empty(nnz, dtype=torch.int64, device=device)
    launch(_unpack, blocks, data, length, data, ends, sizes, low, nnz, bad, 31 if rice else 32, BLOCK=BLOCK)
    ones, start = low, ends[-1:]
    if rice:
        chunks = ceil_div(8 * (length - blocks), _BITS)
        counts = torch.empty(chunks, dtype=torch.int32, device=device)
        ones = torch.zeros(nnz, dtype=torch.int64, device=device)
        launch(_count_ones, chunks, data, start, length, counts, BITS=_BITS)
        found = torch.cumsum(counts, 0, dtype=torch.int64)
        launch(_find_ones, chunks, data, start, length, counts, found, ones, nnz, BITS=_BITS)
        wrong = (start + ones[-1] // 8 + 1 != length) | (length - start > ceil_div(numel, 8))
        wrong = wrong | (found[-1] != nnz if chunks else True)
    else:
        wrong = start != length
    totals = torch.empty(blocks, dtype=torch.int64, device=device)
    launch(_sum_gaps, blocks, low, ones, data, nnz, totals, RICE=rice, BLOCK=BLOCK)
    launch(_place, blocks, low, totals, torch.cumsum(totals, 0), nnz, numel, out, bad, BLOCK=BLOCK)
    return not bool(wrong | (bad != 0))


def _decode_plain(codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int, out: torch.Tensor) -> bool:
    length, device = data.numel(), data.device
    if codec == IndexCodec.DENSE:
        if nnz != numel or length:
            return False
        out.copy_(torch.arange(nnz, dtype=torch.int64, device=device))  # wraps above 2**31, as uint32 does not
        return True
    if codec == IndexCodec.RAW:
        if length != 4 * nnz:
            return False
        out.as_strided((nnz,), (1,)).view(torch.uint8).copy_(data)
        wide = out.to(torch.int64) & 0xFFFFFFFF
        return not nnz or not bool((wide[-1] >= numel) | (wide[1:] <= wide[:-1]).any())
    if length != ceil_div(numel, 8):
        return False
    if not length:
        return nnz == 0
    chunks = ceil_div(8 * length, _BITS)
    counts = torch.empty(chunks, dtype=torch.int32, device=device)
    start = torch.zeros(1, dtype=torch.int64, device=device)
    ones = torch.empty(nnz, dtype=torch.int64, device=device)
    launch(_count_ones, chunks, data, start, length, counts, BITS=_BITS)
    found = torch.cumsum(counts, 0, dtype=torch.int64)
    launch(_find_ones, chunks, data, start, length, counts, found, ones, nnz, BITS=_BITS)
    padding = (data[-1] >> (numel % 8)) if numel % 8 else data[-1] * 0
    if bool((padding != 0) | (found[-1] != nnz)):
        return False
    out.copy_(ones)
    return True
