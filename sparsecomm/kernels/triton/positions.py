"""Bytes to positions on a GPU, many payloads in one launch. The byte formats are specified in docs/wire-format.md.

For BITPACK and RICE each program decodes one block of 128 gaps; a scan of the blocks' lengths tells where its bytes
begin. RICE's unary stream is read by finding its ones, 4,096 bits a program, wherever blocks begin in it.

Nothing in the bytes is trusted. Kernels read only inside a payload's bytes, write only inside its part of the output,
and leave a verdict for each payload on the device. If a verdict is bad, the reference decodes the same bytes again and
raises its error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparsecomm.errors import WireError
from sparsecomm.kernels.reference import indices as reference_indices
from sparsecomm.kernels.sizes import BLOCK
from sparsecomm.kernels.triton.launch import ceil_div, launch, read, upload
from sparsecomm.kernels.triton.shared import COLUMNS, Batch, load_bytes, part_of
from sparsecomm.types import IndexCodec

__all__ = ["decode_indices", "plausible_indices", "read_indices"]

_BITS = 4096
_TILE = 1024


@triton.jit
def _sizes(data, table, tiles, most, sizes, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Computes the bytes of each packed block; 0 for blocks that a payload does not have."""
    payload, tile, row = part_of(table, tiles)
    base, length, nnz = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    block = tile * TILE + tl.arange(0, TILE)
    there = (block * BLOCK < nnz) & (block < length)
    param = tl.load(data + base + block, mask=there, other=0).to(tl.int64)
    count = tl.minimum(nnz - block * BLOCK, BLOCK)
    tl.store(sizes + payload * most + block, tl.where(there, (count * param + 7) // 8, 0), mask=block < most)


@triton.jit
def _unpack(data, table, most, ends, sizes, low, bad, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Unpacks the bits of a block into `low` and checks its parameter and padding."""
    payload, block, row = part_of(table, most)
    base, length, nnz = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    if block * BLOCK < nnz:
        lane = tl.arange(0, BLOCK).to(tl.int64)
        param = tl.load(data + base + block).to(tl.int64)
        size = tl.load(sizes + payload * most + block)
        start = (nnz + BLOCK - 1) // BLOCK + tl.load(ends + payload * most + block) - size
        first = lane * param
        here = block * BLOCK + lane < nnz
        word = lane * 0
        for byte in tl.static_range(5):
            at = start + (first >> 3) + byte
            octet = tl.load(data + base + at, mask=here & (at < length), other=0).to(tl.int64)
            word |= octet << (8 * byte)
        width = tl.minimum(param, 32)
        kept = (word >> (first & 7)) & ((width * 0 + 1 << width) - 1)
        tl.store(low + tl.load(row + 4) + block * BLOCK + lane, kept, mask=here)
        used = tl.minimum(nnz - block * BLOCK, BLOCK) * param
        final = start + size - 1
        last = tl.load(data + base + final, mask=(size > 0) & (final < length), other=0).to(tl.int64)
        padded = ((used & 7) != 0) & ((last >> (used & 7)) != 0)
        if padded | (param > LARGEST):
            tl.atomic_max(bad + tl.load(row + 5), 1)


@triton.jit
def _first_bit(row, payload, most, ends, RICE: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the byte in which a payload's stream of single bits begins."""
    start = payload * 0
    if RICE:
        blocks = (tl.load(row + 2) + BLOCK - 1) // BLOCK
        start = blocks + tl.load(ends + payload * most + blocks - 1)
    return start


@triton.jit
def _count_ones(data, table, chunks, most, ends, counts, RICE: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    payload, chunk, row = part_of(table, chunks)
    base, length = tl.load(row), tl.load(row + 1)
    byte = _first_bit(row, payload, most, ends, RICE, BLOCK) + chunk * (BITS // 8) + tl.arange(0, BITS // 8)
    octet = tl.load(data + base + byte, mask=byte < length, other=0).to(tl.int32)
    pairs = octet - ((octet >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    tl.store(counts + payload * chunks + chunk, tl.sum((fours + (fours >> 4)) & 15, axis=0))


@triton.jit
def _find_ones(
    data, table, chunks, most, ends, counts, found, ones, bad, RICE: tl.constexpr, BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Writes where the ones are: for BITMAP these are the positions, for RICE the input of `_sum_gaps`."""
    payload, chunk, row = part_of(table, chunks)
    base, length, nnz = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    count = tl.load(counts + payload * chunks + chunk)
    if count > 0:
        bit = chunk * BITS + tl.arange(0, BITS)
        byte = _first_bit(row, payload, most, ends, RICE, BLOCK) + (bit >> 3)
        octet = tl.load(data + base + byte, mask=byte < length, other=0).to(tl.int32)
        one = (octet >> (bit & 7).to(tl.int32)) & 1
        rank = tl.load(found + payload * chunks + chunk) - count + tl.cumsum(one, axis=0) - 1
        place = ones + tl.load(row + 4) + rank
        if RICE:
            tl.store(place, bit, mask=(one == 1) & (rank < nnz))
        else:
            tl.store(place, bit.to(tl.int32), mask=(one == 1) & (rank < nnz))
    if RICE == 0:
        spare = tl.load(row + 3) & 7
        last = tl.load(data + base + length - 1, mask=(spare > 0) & (length > 0), other=0).to(tl.int64)
        wrong = (tl.load(found + payload * chunks + chunks - 1) != nnz) | ((last >> spare) * spare != 0)
        if wrong & (chunk == 0):
            tl.atomic_max(bad + tl.load(row + 5), 1)


@triton.jit
def _sum_gaps(
    data, table, most, ends, low, chunks, found, ones, totals, bad, RICE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes running sums of a block's gaps to `low`, and its total; gaps are capped at 2**32, above any position."""
    payload, block, row = part_of(table, most)
    base, length, nnz, at = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 4)
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < nnz
    gap = tl.load(low + at + i, mask=mask, other=0)
    if RICE:
        param = tl.minimum(tl.load(data + base + block, mask=block * BLOCK < nnz, other=0).to(tl.int64), 31)
        prior = tl.where(i > 0, tl.load(ones + at + i - 1, mask=mask & (i > 0), other=0), -1)
        quotient = tl.load(ones + at + i, mask=mask, other=0) - prior - 1
        whole = (tl.minimum(tl.maximum(quotient, 0), 4294967295) << param) + gap
        gap = tl.where(quotient > 4294967295, 4294967296, whole)
    step = tl.where(mask, tl.minimum(gap, 4294967296) + 1, 0)
    tl.store(low + at + i, tl.cumsum(step, axis=0), mask=mask)
    tl.store(totals + payload * most + block, tl.sum(step, axis=0))
    if block == 0:
        wrong = _first_bit(row, payload, most, ends, 1, BLOCK) != length
        if RICE:
            start = _first_bit(row, payload, most, ends, 1, BLOCK)
            final = start + tl.load(ones + at + nnz - 1) // 8 + 1
            wrong = (tl.load(found + payload * chunks + chunks - 1) != nnz) | (final != length)
            wrong = wrong | (length - start > (tl.load(row + 3) + 7) // 8)
        if wrong:
            tl.atomic_max(bad + tl.load(row + 5), 1)


@triton.jit
def _place(table, most, low, totals, ends, out, bad, BLOCK: tl.constexpr):
    payload, block, row = part_of(table, most)
    nnz, at = tl.load(row + 2), tl.load(row + 4)
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < nnz
    before = tl.load(ends + payload * most + block) - tl.load(totals + payload * most + block)
    here = before + tl.load(low + at + i, mask=mask, other=1) - 1
    tl.store(out + at + i, here.to(tl.int32), mask=mask)
    wrong = mask & ((here >= tl.load(row + 3)) | (here < 0))
    if tl.sum(wrong.to(tl.int32), axis=0) > 0:
        tl.atomic_max(bad + tl.load(row + 5), 1)


@triton.jit
def _plain(data, table, tiles, out, bad, DENSE: tl.constexpr, TILE: tl.constexpr):
    """Reads RAW and DENSE positions."""
    _payload, tile, row = part_of(table, tiles)
    base, nnz = tl.load(row), tl.load(row + 2)
    i = tile * TILE + tl.arange(0, TILE)
    mask = i < nnz
    here = i
    if DENSE == 0:
        here = load_bytes(data + base, i, mask, 4).to(tl.int64) & 0xFFFFFFFF
        prior = load_bytes(data + base, i - 1, mask & (i > 0), 4).to(tl.int64) & 0xFFFFFFFF
        wrong = mask & ((here >= tl.load(row + 3)) | ((i > 0) & (prior >= here)))
        if tl.sum(wrong.to(tl.int32), axis=0) > 0:
            tl.atomic_max(bad + tl.load(row + 5), 1)
    tl.store(out + tl.load(row + 4) + i, here.to(tl.int32), mask=mask)


def plausible_indices(codec: IndexCodec, length: int, nnz: int, numel: int) -> bool:
    """Returns whether `length` bytes can be a payload's positions; the kernels rely on that and check the rest."""
    if codec == IndexCodec.DENSE:
        return nnz == numel and not length
    if codec == IndexCodec.RAW:
        return length == 4 * nnz
    if codec == IndexCodec.BITMAP:
        return length == ceil_div(numel, 8)
    return length >= ceil_div(nnz, BLOCK) if nnz else not length


def read_indices(codec: IndexCodec, batch: Batch, sizes: Sequence[tuple[int, int]], out: torch.Tensor) -> None:
    """Reads the positions of many payloads, each plausible and none without bytes or pairs; never waits for the device.

    Args:
        codec: index codec of all of them.
        batch: the payloads. Mutated: verdicts.
        sizes: bytes and pairs of each payload.
        out: int32, on the device. Mutated where the table says.
    """
    if codec in (IndexCodec.BITPACK, IndexCodec.RICE):
        _read_gaps(batch, sizes, out, rice=codec == IndexCodec.RICE)
    elif codec == IndexCodec.BITMAP:
        chunks = max(ceil_div(8 * length, _BITS) for length, _ in sizes)
        _find(batch, (len(sizes), chunks), batch.table, 0, out, rice=False)
    else:
        tiles, how = max(ceil_div(nnz, _TILE) for _, nnz in sizes), {"DENSE": codec == IndexCodec.DENSE, "TILE": _TILE}
        launch(_plain, len(sizes) * tiles, batch.data, batch.table, tiles, out, batch.bad, **how)


def _find(
    batch: Batch, shape: tuple[int, int], ends: torch.Tensor, most: int, ones: torch.Tensor, *, rice: bool
) -> torch.Tensor:
    """Finds the ones of all payloads.

    Args:
        batch: the payloads. Mutated: verdicts.
        shape: number of payloads, and chunks of each.
        ends: for RICE, ends of the packed blocks, shape (payloads, most); else not read.
        most: blocks of the largest payload.
        ones: output of `_find_ones`. Mutated.
        rice: whether the ones are those of RICE's unary stream, not of a bitmap.

    Returns:
        int64, of that shape: number of ones up to the end of each chunk.
    """
    data, table = batch.data, batch.table
    counts = torch.empty(shape, dtype=torch.int32, device=data.device)
    programs, chunks, how = counts.numel(), shape[1], {"RICE": rice, "BLOCK": BLOCK, "BITS": _BITS}
    launch(_count_ones, programs, data, table, chunks, most, ends, counts, **how)
    found = torch.cumsum(counts, 1, dtype=torch.int64)
    launch(_find_ones, programs, data, table, chunks, most, ends, counts, found, ones, batch.bad, **how)
    return found


def _read_gaps(batch: Batch, shapes: Sequence[tuple[int, int]], out: torch.Tensor, *, rice: bool) -> None:
    data, table, bad = batch.data, batch.table, batch.bad
    payloads, device = len(shapes), data.device
    most = max(ceil_div(nnz, BLOCK) for _, nnz in shapes)
    sizes = torch.empty((payloads, most), dtype=torch.int64, device=device)
    tiles = ceil_div(most, _TILE)
    launch(_sizes, payloads * tiles, data, table, tiles, most, sizes, BLOCK=BLOCK, TILE=_TILE)
    ends = torch.cumsum(sizes, 1)
    low = torch.empty(out.numel(), dtype=torch.int64, device=device)
    programs, largest = payloads * most, 31 if rice else 32
    launch(_unpack, programs, data, table, most, ends, sizes, low, bad, LARGEST=largest, BLOCK=BLOCK)
    chunks, ones, found = 0, low, ends
    if rice:
        # Enough chunks for a payload that is all unary stream, because only the device knows where the stream begins.
        chunks = max(1, max(ceil_div(8 * (length - ceil_div(nnz, BLOCK)), _BITS) for length, nnz in shapes))
        ones = torch.empty(out.numel(), dtype=torch.int64, device=device)
        found = _find(batch, (payloads, chunks), ends, most, ones, rice=True)
    totals = torch.empty((payloads, most), dtype=torch.int64, device=device)
    how = {"RICE": rice, "BLOCK": BLOCK}
    launch(_sum_gaps, programs, data, table, most, ends, low, chunks, found, ones, totals, bad, **how)
    launch(_place, programs, table, most, low, totals, torch.cumsum(totals, 1), out, bad, BLOCK=BLOCK)


def decode_indices(codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int, out_indices: torch.Tensor) -> None:
    """Decodes on the device; waits for it once, for the verdict."""
    length = data.numel()
    good = plausible_indices(codec, length, nnz, numel)
    if good and (length or nnz):
        table = upload([0, length, nnz, numel, 0, 0, 0], data.device)
        verdict = table[COLUMNS:]
        read_indices(codec, Batch(data, table, verdict), [(length, nnz)], out_indices.view(torch.int32)[:nnz])
        good = read(verdict) == [0]
    if not good:
        reference_indices.decode_indices(codec, data.cpu(), nnz, numel, torch.empty(nnz, dtype=torch.uint32))
        raise WireError("indices", nnz, "the device and the reference disagree about these bytes")
