"""Sizes of encoded positions and values in bytes: upper bounds for buffers, expected sizes for choosing a codec.

Pure arithmetic on counts, cached because every training step asks for the same few sizes.
"""

from __future__ import annotations

import math
from functools import lru_cache

from sparsecomm.errors import KernelError
from sparsecomm.types import MAX_NUMEL, IndexCodec, ValueCodec

__all__ = ["BLOCK", "entropy_bits", "estimate_index_bytes", "max_index_bytes", "max_value_bytes"]

BLOCK = 128
"""Entries in a block of the BITPACK and RICE index codecs and of the INT8 value codec."""


def _check(nnz: int, numel: int) -> None:
    if not 0 <= nnz <= numel <= MAX_NUMEL:
        raise KernelError(f"need 0 <= nnz <= numel <= {MAX_NUMEL}, got nnz = {nnz}, numel = {numel}")


@lru_cache(maxsize=4096)
def max_index_bytes(codec: IndexCodec, nnz: int, numel: int) -> int:
    """Returns the most bytes that `encode_indices` can write for any `nnz` positions among `numel`.

    Args:
        codec: index codec.
        nnz: number of positions.
        numel: length of the dense vector, at most 2**32.

    Returns:
        Bytes. Exact for DENSE, RAW and BITMAP. For BITPACK and RICE a bound over all placements, a few bytes above the
        worst one.

    Raises:
        KernelError: unless 0 <= nnz <= numel <= 2**32.

    Example:
        >>> max_index_bytes(IndexCodec.RAW, 3, 100), max_index_bytes(IndexCodec.BITMAP, 3, 100)
        (12, 13)
        >>> max_index_bytes(IndexCodec.BITPACK, 3, 100)  # 1 width byte, 3 gaps of at most 7 bits
        4
    """
    _check(nnz, numel)
    if codec == IndexCodec.DENSE or nnz == 0:
        return -(-numel // 8) if codec == IndexCodec.BITMAP else 0
    if codec == IndexCodec.RAW:
        return 4 * nnz
    if codec == IndexCodec.BITMAP:
        return -(-numel // 8)
    slack = numel - nnz  # the gaps of any placement sum to at most this
    blocks = -(-nnz // BLOCK)
    if codec == IndexCodec.BITPACK:
        full, rest = divmod(nnz, BLOCK)
        # A block gets width w from one gap of at least 2**(w-1). So the first bit costs 1 of the slack, the second
        # 1 more, then 2, 4, ... Because each bit costs more, the worst placement widens all blocks evenly.
        budget, total = slack, blocks
        for width in range(1, 33):
            price = 1 if width == 1 else 1 << (width - 2)
            bought = min(full, budget // price)
            budget -= bought * price
            total += bought * BLOCK // 8
        return total + -(-rest * slack.bit_length() // 8)
    if codec == IndexCodec.RICE:
        # The encoder takes the best parameter of each block, so the result is never longer than with any fixed r, with
        # which all blocks together need nnz * (1 + r) + sum(gap >> r) bits. Both streams end in a partial byte.
        bits = min(nnz * (1 + r) + (slack >> r) for r in range(32))
        return blocks + bits // 8 + 2
    raise KernelError(f"unknown index codec {codec!r}")


@lru_cache(maxsize=4096)
def estimate_index_bytes(codec: IndexCodec, nnz: int, numel: int) -> int:
    """Returns the expected bytes of `encode_indices` for uniformly random positions.

    Positions of real gradients are clustered, which makes the true size a little smaller. For choosing a codec, never
    for sizing a buffer.

    Args:
        codec: index codec.
        nnz: number of positions.
        numel: length of the dense vector, at most 2**32.

    Returns:
        Bytes, within a few percent for uniform positions.

    Raises:
        KernelError: unless 0 <= nnz <= numel <= 2**32.

    Example:
        >>> estimate_index_bytes(IndexCodec.RAW, 1000, 1_000_000)
        4000
        >>> 11.3 < 8 * estimate_index_bytes(IndexCodec.RICE, 100_000, 100_000_000) / 100_000 < 11.7  # bits each
        True
    """
    if codec not in (IndexCodec.BITPACK, IndexCodec.RICE) or nnz == 0:
        return max_index_bytes(codec, nnz, numel)
    _check(nnz, numel)
    blocks = -(-nnz // BLOCK)
    if nnz == numel:
        return blocks + (-(-nnz // 8) if codec == IndexCodec.RICE else 0)
    log_miss = math.log1p(-nnz / numel)  # P(gap >= x) = exp(x * log_miss)
    if codec == IndexCodec.BITPACK:
        full, rest = divmod(nnz, BLOCK)
        return round(blocks + BLOCK / 8 * full * _mean_width(log_miss, BLOCK) + rest / 8 * _mean_width(log_miss, rest))
    # E[gap >> r] = sum over j of P(gap >= j * 2**r)
    bits = min(1 + r + 1 / math.expm1(min(-log_miss * 2.0**r, 700.0)) for r in range(32))
    return round(blocks + nnz * bits / 8) + 1


def _mean_width(log_miss: float, gaps: int) -> float:
    """Returns the expected bits of the largest of `gaps` gaps."""
    if gaps == 0:
        return 0.0
    mean = 0.0
    for width in range(33):
        beyond = math.exp(max(log_miss * 2.0**width, -700.0))
        mean += -math.expm1(gaps * math.log1p(-beyond)) if beyond < 1.0 else 1.0
    return min(mean, 32.0)


def max_value_bytes(codec: ValueCodec, nnz: int) -> int:
    """Returns the bytes that `encode_values` writes for `nnz` values. Exact: the values do not matter.

    Args:
        codec: value codec.
        nnz: number of values.

    Raises:
        KernelError: for a negative count or an unknown codec.

    Example:
        >>> [max_value_bytes(c, 129) for c in (ValueCodec.FP32, ValueCodec.FP16, ValueCodec.INT8)]
        [516, 258, 137]
    """
    if nnz < 0:
        raise KernelError(f"nnz must be at least 0, got {nnz}")
    if codec == ValueCodec.FP32:
        return 4 * nnz
    if codec in (ValueCodec.FP16, ValueCodec.BF16):
        return 2 * nnz
    if codec == ValueCodec.INT8:
        return 4 * -(-nnz // BLOCK) + nnz
    raise KernelError(f"unknown value codec {codec!r}")


def entropy_bits(nnz: int, numel: int) -> float:
    """Returns the entropy of uniform positions in bits a nonzero: numel * H(nnz / numel) / nnz.

    No code needs fewer bits on average.

    Example:
        >>> round(entropy_bits(1, 10), 2), round(entropy_bits(1, 1000), 2)
        (4.69, 11.41)
    """
    _check(nnz, numel)
    if nnz in (0, numel):
        return 0.0
    d = nnz / numel
    return (-d * math.log2(d) - (1 - d) * math.log1p(-d) / math.log(2)) / d
