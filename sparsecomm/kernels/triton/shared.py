"""Parts of several Triton kernels: loads and stores of single bytes, and launches over many payloads.

A launch over many payloads reads a table on the device, with a row of `COLUMNS` int64 for each payload. Each payload
gets as many programs as the largest one needs. The columns are:

    0 offset of its bytes      1 number of its bytes      2 number of its pairs
    3 numel for positions, or the bits of the scale for values
    4 offset of its pairs in the output                   5 its number among the verdicts
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["COLUMNS", "Batch", "load_bytes", "part_of", "store_bytes"]

COLUMNS = 6


@dataclass(frozen=True, slots=True)
class Batch:
    """Payloads that one launch decodes; all tensors are on the device.

    Attributes:
        data: uint8, bytes of all payloads.
        table: int64, a row for each payload.
        bad: int64, verdicts; zero means good.
    """

    data: torch.Tensor
    table: torch.Tensor
    bad: torch.Tensor


@triton.jit
def part_of(table, programs):
    """Returns the payload of a program, the number of the program in that payload, and the payload's row."""
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
