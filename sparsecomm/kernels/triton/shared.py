"""What several Triton kernels are made of: single bytes, and programs for many payloads in one launch.

A launch for many payloads is given a table on the device, `COLUMNS` int64 a payload, and as many programs for each
payload as the largest needs:

    0 where its bytes begin      1 how many there are      2 its number of pairs
    3 numel of its positions, or the bits of the scale of its values
    4 where its pairs begin in the output                  5 its place among the verdicts
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["COLUMNS", "load_bytes", "part_of", "store_bytes"]

COLUMNS = 6


@triton.jit
def part_of(table, programs):
    """Which payload a program works on, which of the payload's programs it is, and the payload's row."""
    program = tl.program_id(0).to(tl.int64)
    payload = program // programs
    return payload, program % programs, table + 6 * payload


@triton.jit
def store_bytes(out, at, bits, mask, WIDTH: tl.constexpr):
    """Stores numbers of WIDTH bytes, little-endian."""
    for byte in tl.static_range(WIDTH):
        tl.store(out + at * WIDTH + byte, ((bits >> (8 * byte)) & 255).to(tl.uint8), mask=mask)


@triton.jit
def load_bytes(data, at, mask, WIDTH: tl.constexpr):
    """Loads numbers of WIDTH bytes, little-endian."""
    bits = tl.load(data + at * WIDTH, mask=mask, other=0).to(tl.int32)
    for byte in tl.static_range(1, WIDTH):
        bits |= tl.load(data + at * WIDTH + byte, mask=mask, other=0).to(tl.int32) << (8 * byte)
    return bits
