"""Sums of sparse and dense vectors on a GPU, always in the same order, without atomics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from sparsecomm.kernels.triton.launch import ceil_div, joined, launch, upload
from sparsecomm.kernels.triton.values import _bf16_bits

__all__ = ["add_dense", "scatter_add", "scatter_reduce"]

_TILE = 1024
_REGION = 4096


@triton.jit
def _scatter_add(out, indices, values, n, TILE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = i < n
    at = tl.load(indices + i, mask=mask, other=0).to(tl.int64) & 0xFFFFFFFF
    value = tl.load(values + i, mask=mask, other=0.0)
    tl.store(out + at, tl.load(out + at, mask=mask, other=0.0) + value, mask=mask)


def scatter_add(out: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Adds in one launch; never waits for the device."""
    n = values.numel()
    launch(_scatter_add, ceil_div(n, _TILE), out, indices.view(torch.int32), values, n, TILE=_TILE)


@triton.jit
def _bounds(indices, starts, bounds, regions, parts, REGION: tl.constexpr, TILE: tl.constexpr):
    """Finds where each region begins in each part: at the first position that is not below the region's start."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = i < parts * (regions + 1)
    part, region = i // (regions + 1), i % (regions + 1)
    low = tl.load(starts + part, mask=mask, other=0)
    high = tl.load(starts + part + 1, mask=mask, other=0)
    for _ in range(33):
        middle = (low + high) >> 1
        there = mask & (low < high)
        below = (tl.load(indices + middle, mask=there, other=0).to(tl.int64) & 0xFFFFFFFF) < region * REGION
        high = tl.where(there & (below == 0), middle, high)
        low = tl.where(there & below, middle + 1, low)
    tl.store(bounds + i, low, mask=mask)


@triton.jit
def _reduce(
    acc, out, n, indices, values, bounds, regions, parts, scale, KIND: tl.constexpr, SCALED: tl.constexpr,
    REGION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds the parts one after the other; each program owns one region of the output."""
    region = tl.program_id(0).to(tl.int64)
    place = region * REGION + tl.arange(0, REGION)
    mask = place < n
    tl.store(acc + place, tl.zeros((REGION,), dtype=tl.float32), mask=mask)
    for part in range(parts):
        tl.debug_barrier()  # the stores of this program's other threads must be visible
        first = tl.load(bounds + part * (regions + 1) + region)
        last = tl.load(bounds + part * (regions + 1) + region + 1)
        for start in range(first, last, TILE):
            i = start + tl.arange(0, TILE).to(tl.int64)
            here = i < last
            at = tl.load(indices + i, mask=here, other=0).to(tl.int64) & 0xFFFFFFFF
            value = tl.load(values + i, mask=here, other=0.0)
            tl.store(acc + at, tl.load(acc + at, mask=here, other=0.0) + value, mask=here)
    if SCALED or KIND != 1:
        tl.debug_barrier()
        total = tl.load(acc + place, mask=mask, other=0.0)
        if SCALED:
            total = total * scale
        if KIND == 1:
            tl.store(out + place, total, mask=mask)
        elif KIND == 2:
            tl.store(out + place, total.to(tl.float16), mask=mask)
        else:
            tl.store(out + place, _bf16_bits(total).to(tl.int16), mask=mask)


def scatter_reduce(out: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], scale: float = 1.0) -> None:
    """Adds region by region in two launches; never waits for the device."""
    n, device = out.numel(), out.device
    regions = ceil_div(n, _REGION)
    indices = joined([i.view(torch.int32) for i, _ in parts], torch.empty(0, dtype=torch.int32, device=device))
    values = joined([v for _, v in parts], torch.empty(0, device=device, dtype=torch.float32))
    starts = upload([0, *accumulate(v.numel() for _, v in parts)], device)
    bounds = torch.empty(max(1, len(parts) * (regions + 1)), dtype=torch.int64, device=device)
    tiles = ceil_div(len(parts) * (regions + 1), 256)
    launch(_bounds, tiles, indices, starts, bounds, regions, len(parts), REGION=_REGION, TILE=256)
    kind = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}[out.dtype]
    acc = out if kind == 1 else torch.empty(n, dtype=torch.float32, device=device)
    target = out.view(torch.int16) if kind == 3 else out
    how = {"KIND": kind, "SCALED": scale != 1.0, "REGION": _REGION, "TILE": 256}
    launch(_reduce, regions, acc, target, n, indices, values, bounds, regions, len(parts), scale, **how)


def add_dense(out: torch.Tensor, data: torch.Tensor) -> None:
    """Adds with torch; bytes that are not aligned are copied first."""
    if not out.numel():
        return
    if data.dtype is torch.uint8:
        data = (data if data.data_ptr() % 4 == 0 else data.clone()).view(torch.float32)
    out.add_(data)
