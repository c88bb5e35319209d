"""The index codecs in numpy. The byte formats are specified in docs/wire-format.md."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sparsecomm.errors import KernelError, WireError
from sparsecomm.kernels.reference.arrays import array
from sparsecomm.kernels.sizes import BLOCK
from sparsecomm.types import IndexCodec

__all__ = ["decode_indices", "encode_indices"]

_U8 = npt.NDArray[np.uint8]
_U32 = npt.NDArray[np.uint32]
_U64 = npt.NDArray[np.uint64]
_I64 = npt.NDArray[np.int64]
_CHUNK = 2048
"""Blocks that are unpacked to bits at a time; bounds the temporary memory."""


def encode_indices(codec: IndexCodec, indices: torch.Tensor, numel: int, out: torch.Tensor) -> int:
    """Encodes with numpy, block by block for BITPACK and RICE."""
    idx: _U32 = array(indices)
    _check_ascending(idx, numel)
    if codec == IndexCodec.DENSE:
        return 0
    if codec == IndexCodec.RAW:
        encoded: _U8 = idx.astype("<u4").view(np.uint8)
    elif codec == IndexCodec.BITMAP:
        bits = np.zeros(numel, dtype=np.uint8)
        bits[idx] = 1
        encoded = np.packbits(bits, bitorder="little")
    else:
        gaps = _blocks_of_gaps(idx)
        encoded = _encode_bitpack(gaps, len(idx)) if codec == IndexCodec.BITPACK else _encode_rice(gaps, len(idx))
    array(out)[: len(encoded)] = encoded
    return len(encoded)


def _check_ascending(idx: _U32, numel: int) -> None:
    if len(idx) and (not bool(np.all(idx[1:] > idx[:-1])) or int(idx[-1]) >= numel):
        wrong = np.flatnonzero(idx[1:] <= idx[:-1])
        at = int(wrong[0]) + 1 if len(wrong) else len(idx) - 1
        raise KernelError(f"indices[{at}] = {int(idx[at])} is not above its predecessor and below numel = {numel}")


def _blocks_of_gaps(idx: _U32) -> _U64:
    """Returns gaps minus one, shape (blocks, 128), the last block padded with zeros."""
    gaps = np.zeros(-(-len(idx) // BLOCK) * BLOCK, dtype=np.uint64)
    gaps[: len(idx)] = idx
    gaps[1 : len(idx)] -= idx[:-1].astype(np.uint64) + np.uint64(1)
    return gaps.reshape(-1, BLOCK)


def _bit_length(values: _U64) -> _I64:
    exponents: _I64 = np.frexp(values.astype(np.float64))[1].astype(np.int64)
    return exponents


def _packed_sizes(widths: _I64, nnz: int) -> _I64:
    """Returns the bytes of each packed block."""
    sizes = widths * (BLOCK // 8)
    if nnz % BLOCK:
        sizes[-1] = -(-(nnz % BLOCK) * int(widths[-1]) // 8)
    return sizes


def _pack(gaps: _U64, widths: _I64, nnz: int) -> _U8:
    """Packs the low `widths[b]` bits of each gap of block b, least significant first; blocks begin on a byte."""
    sizes = _packed_sizes(widths, nnz)
    starts = np.cumsum(sizes) - sizes
    out = np.zeros(int(sizes.sum()) + BLOCK * 4, dtype=np.uint8)  # the padding of the last block spills here
    for width in np.unique(widths[widths > 0]):
        members = np.flatnonzero(widths == width)
        for at in range(0, len(members), _CHUNK):
            blocks = members[at : at + _CHUNK]
            bits = (gaps[blocks][:, :, None] >> np.arange(width, dtype=np.uint64)) & np.uint64(1)
            rows = np.packbits(bits.astype(np.uint8).reshape(len(blocks), -1), axis=1, bitorder="little")
            out[starts[blocks][:, None] + np.arange(rows.shape[1])] = rows
    return out[: int(sizes.sum())]


def _unpack(data: _U8, widths: _I64, nnz: int) -> _U64:
    """Returns the gaps that `_pack` packed, shape (blocks, 128). The caller has checked length and padding."""
    sizes = _packed_sizes(widths, nnz)
    starts = np.cumsum(sizes) - sizes
    data = np.concatenate([data, np.zeros(BLOCK * 4, dtype=np.uint8)])
    gaps = np.zeros((len(widths), BLOCK), dtype=np.uint64)
    for width in np.unique(widths[widths > 0]):
        members = np.flatnonzero(widths == width)
        for at in range(0, len(members), _CHUNK):
            blocks = members[at : at + _CHUNK]
            rows = data[starts[blocks][:, None] + np.arange(int(width) * BLOCK // 8)]
            bits = np.unpackbits(rows, axis=1, bitorder="little").reshape(len(blocks), BLOCK, int(width))
            gaps[blocks] = bits.astype(np.uint64) @ (np.uint64(1) << np.arange(width, dtype=np.uint64))
    return gaps


def _check_padding(data: _U8, used_bits: int) -> None:
    if used_bits % 8 and int(data[-1]) >> (used_bits % 8):
        raise WireError("indices", int(data[-1]), "the bits that pad the last byte must be zero")


def _encode_bitpack(gaps: _U64, nnz: int) -> _U8:
    widths = _bit_length(gaps.max(axis=1, initial=0))
    return np.concatenate([widths.astype(np.uint8), _pack(gaps, widths, nnz)])


def _rice_parameters(gaps: _U64, nnz: int) -> _I64:
    """Returns the Rice parameter of each block. Integers only, so that every implementation chooses the same."""
    counts = np.full(len(gaps), BLOCK, dtype=np.uint64)
    if nnz % BLOCK:
        counts[-1] = nnz % BLOCK
    # 45426 / 65536 = ln 2: the best parameter is near log2(mean * ln 2)
    ratio = (gaps.sum(axis=1, dtype=np.uint64) * np.uint64(45426) >> np.uint64(16)) // counts
    low = np.maximum(_bit_length(ratio) - 1, 0)
    high = np.minimum(low + 1, 31)

    def bits(r: _I64) -> _U64:
        quotients: _U64 = (gaps >> r.astype(np.uint64)[:, None]).sum(axis=1, dtype=np.uint64)
        return counts * (r + 1).astype(np.uint64) + quotients

    return np.where(bits(high) < bits(low), high, low)


def _encode_rice(gaps: _U64, nnz: int) -> _U8:
    params = _rice_parameters(gaps, nnz)
    quotients = (gaps >> params.astype(np.uint64)[:, None]).ravel()[:nnz]
    ones = np.cumsum(quotients + np.uint64(1)).astype(np.int64) - 1
    unary = np.zeros(int(ones[-1]) + 1 if nnz else 0, dtype=np.uint8)
    unary[ones] = 1
    return np.concatenate([params.astype(np.uint8), _pack(gaps, params, nnz), np.packbits(unary, bitorder="little")])


def decode_indices(codec: IndexCodec, data: torch.Tensor, nnz: int, numel: int, out_indices: torch.Tensor) -> None:
    """Decodes with numpy; every check comes before the read that relies on it."""
    octets: _U8 = array(data)
    out = array(out_indices)[:nnz]
    if codec == IndexCodec.DENSE:
        if nnz != numel:
            raise WireError("nnz", nnz, f"must be numel = {numel} for the dense codec")
        _check_length(octets, 0)
        out[:] = np.arange(nnz, dtype=np.uint32)
    elif codec == IndexCodec.RAW:
        _check_length(octets, 4 * nnz)
        out[:] = octets.view("<u4")
        wrong = np.flatnonzero((out >= numel) | np.concatenate([[False], out[1:] <= out[:-1]]))
        if len(wrong):
            raise WireError("indices", int(out[wrong[0]]), f"must be ascending and below numel = {numel}")
    elif codec == IndexCodec.BITMAP:
        _check_length(octets, -(-numel // 8))
        _check_padding(octets, numel)
        ones = np.flatnonzero(np.unpackbits(octets, bitorder="little"))
        if len(ones) != nnz:
            raise WireError("indices", len(ones), f"the bitmap must have nnz = {nnz} ones")
        out[:] = ones
    else:
        gaps = _decode_bitpack(octets, nnz) if codec == IndexCodec.BITPACK else _decode_rice(octets, nnz, numel)
        _check_gaps(gaps, numel, out)


def _check_length(octets: _U8, want: int) -> None:
    if len(octets) != want:
        raise WireError("index_bytes", len(octets), f"must be {want}")


def _block_bytes(octets: _U8, nnz: int, most: int) -> _I64:
    """Returns the parameters at the start of the BITPACK and RICE formats, one byte for each block."""
    blocks = -(-nnz // BLOCK)
    if len(octets) < blocks:
        raise WireError("index_bytes", len(octets), f"must be at least {blocks}, one byte a block")
    params = octets[:blocks].astype(np.int64)
    if blocks and int(params.max()) > most:
        raise WireError("index_params", int(params[params > most][0]), f"must be at most {most}")
    return params


def _decode_bitpack(octets: _U8, nnz: int) -> _U64:
    widths = _block_bytes(octets, nnz, 32)
    _check_length(octets, len(widths) + int(_packed_sizes(widths, nnz).sum()))
    if nnz % BLOCK:
        _check_padding(octets, nnz % BLOCK * int(widths[-1]))
    return _unpack(octets[len(widths) :], widths, nnz).ravel()[:nnz]


def _decode_rice(octets: _U8, nnz: int, numel: int) -> _U64:
    params = _block_bytes(octets, nnz, 31)
    start = len(params) + int(_packed_sizes(params, nnz).sum())
    # The quotients of valid data sum to at most numel - nnz. This check comes first, so that no sum below wraps.
    least, most = start + -(-nnz // 8), start + -(-numel // 8)
    if not least <= len(octets) <= most:
        raise WireError("index_bytes", len(octets), f"must be between {least} and {most} with these parameters")
    if nnz % BLOCK:
        _check_padding(octets[:start], nnz % BLOCK * int(params[-1]))
    ones = np.flatnonzero(np.unpackbits(octets[start:], bitorder="little"))
    if len(ones) != nnz or len(octets) != start + (int(ones[-1]) // 8 + 1 if nnz else 0):
        raise WireError(
            "indices", len(ones), f"the unary stream must have nnz = {nnz} ones, the last one in its last byte"
        )
    quotients = np.diff(ones, prepend=-1).astype(np.uint64) - np.uint64(1)
    low = _unpack(octets[len(params) : start], params, nnz).ravel()[:nnz]
    return (quotients << np.repeat(params, BLOCK)[:nnz].astype(np.uint64)) + low


def _check_gaps(gaps: _U64, numel: int, out: _U32) -> None:
    # No sum wraps before the first index that is out of range. BITPACK adds at most 2**32 terms below 2**32. Terms of
    # RICE are below 2**63 + 2**32, so the sum stops at the first large one.
    huge = np.flatnonzero(gaps >= np.uint64(1 << 32))
    terms = gaps[: int(huge[0]) + 1] if len(huge) else gaps
    idx = np.cumsum(terms + np.uint64(1), dtype=np.uint64) - np.uint64(1)
    wrong = np.flatnonzero(idx >= np.uint64(numel))
    if len(wrong):
        raise WireError("indices", int(idx[wrong[0]]), f"must be below numel = {numel}")
    out[:] = idx
