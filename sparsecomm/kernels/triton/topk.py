"""Exact top-k on a GPU: the exact threshold first, then one pass of `select.select` with it.

Radix select on the bits finds the k-th largest magnitude, with digits of 8, 8, 8 and 7 bits. Over the whole vector that
would take four passes. So a sample first gives a bound that a little more than k elements exceed; one pass that only
reads (8 bytes an element) collects them, and the radix select works on those. The radix select over the whole vector is
launched in any case, but returns at once unless a flag on the device says that the sample misled. So nothing waits for
the device until the end, and 20 bytes an element are moved in total.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import triton
import triton.language as tl

from sparsecomm.kernels.triton.launch import ACCUMULATE_BLOCK, KIND, PROGRAMS, bits_of, ceil_div, launch, read
from sparsecomm.kernels.triton.select import INF_BITS, accumulate_select, accumulated, select
from sparsecomm.types import TopKResult

__all__ = ["cut_topk", "exact_topk"]

_BINS = 256
_SHIFTS = (23, 15, 7, 0)
_SAMPLE, _LIST, _WHOLE = 0, 1, 2
_THRESHOLD, _NEED, _MISLED, _COUNT, _BOUND = range(5)  # places in the state on the device
_SMALL = 1 << 16
_SIGMAS = 4.0


@triton.jit
def _eligible(values):
    """Returns the bits of finite magnitudes, and 0 for NaN and infinity."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(bits < 0x7F800000, bits, 0)


@triton.jit
def _prefix(counts, rank, LEVEL: tl.constexpr):
    """Returns the leading LEVEL digits of the rank-th largest, and its rank among the values with these digits."""
    prefix = rank * 0
    for level in tl.static_range(LEVEL):
        bins = tl.load(counts + level * 256 + tl.arange(0, 256))
        above = tl.sum(bins, axis=0) - tl.cumsum(bins, axis=0)  # in higher digits
        digit = tl.sum((above >= rank).to(tl.int64), axis=0)
        rank -= tl.sum(tl.where(tl.arange(0, 256) == digit, above, 0), axis=0)
        prefix = prefix * (128 if level == 3 else 256) + digit
    return prefix, rank


@triton.jit
def _count_digits(
    grad, residual, n, scale, found, counts, state, rank, programs, LEVEL: tl.constexpr, WHOLE: tl.constexpr,
    LISTED: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts digit LEVEL of the magnitudes that share the leading digits of the rank-th largest."""
    go = tl.load(state + 2) == (1 if WHOLE else 0)
    if LISTED:
        n = tl.minimum(n, tl.load(state + 3))
    if go:
        total = tl.sum(tl.load(counts + tl.arange(0, 256)), axis=0)
        prefix, _left = _prefix(counts, tl.minimum(rank, total), LEVEL)
        bins = tl.zeros((256,), dtype=tl.int32)
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, programs * BLOCK):
            at = start + tl.arange(0, BLOCK).to(tl.int64)
            mask = at < n
            if WHOLE:
                bits = _eligible(accumulated(grad, residual, at, mask, scale, KIND, SCALED))
            else:
                bits = tl.load(found + at, mask=mask, other=0)
            mask = mask & (bits > 0)
            if LEVEL == 0:
                digit = bits >> 23
            elif LEVEL == 1:
                mask = mask & ((bits >> 23) == prefix)
                digit = (bits >> 15) & 255
            elif LEVEL == 2:
                mask = mask & ((bits >> 15) == prefix)
                digit = (bits >> 7) & 255
            else:
                mask = mask & ((bits >> 7) == prefix)
                digit = bits & 127
            bins += tl.histogram(digit, 256, mask=mask)
        tl.atomic_add(counts + LEVEL * 256 + tl.arange(0, 256), bins.to(tl.int64), mask=bins > 0)


@triton.jit
def _resolve(counts, state, rank, room, MODE: tl.constexpr):
    """Computes the rank-th largest from the digits' counts; writes it, and whether the sample misled, to the state."""
    misled = tl.load(state + 2)
    total = tl.sum(tl.load(counts + tl.arange(0, 256)), axis=0)
    value, left = _prefix(counts, tl.minimum(rank, total), 4)
    if MODE == 0:  # of the sample: with too few nonzeros in it, any nonzero element may be among the k
        tl.store(state + 4, tl.where(total < rank, 1, value))
    else:
        value = tl.where(total == 0, 0x7F800000, value)
        if MODE == 1:
            bad = (tl.load(state + 3) > room) | ((total < rank) & (tl.load(state + 4) > 1))
            tl.store(state + 2, bad.to(tl.int64))
            tl.store(state, value)
            tl.store(state + 1, left)
        elif misled == 1:
            tl.store(state, value)
            tl.store(state + 1, left)


@triton.jit
def _sample(grad, residual, n, scale, found, many, KIND: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """Takes one element of each of `many` stretches, at a pseudo-random place that no stride in the data can hit."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < many
    stretch = n // many
    hashed = (i * 2654435761) & 0xFFFFFFFF
    at = i * stretch + (hashed ^ (hashed >> 15)) % stretch
    bits = _eligible(accumulated(grad, residual, at, mask, scale, KIND, SCALED))
    tl.store(found + i, bits, mask=mask)


@triton.jit
def _collect(
    grad, residual, n, scale, found, state, room, KIND: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr
):
    """Collects the elements that reach the bound, in any order, because only the values' counts matter."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = _eligible(accumulated(grad, residual, at, at < n, scale, KIND, SCALED))
    bound = tl.load(state + 4)
    hit = ((at < n) & (bits >= bound)).to(tl.int32)
    count = tl.sum(hit, axis=0)
    if count > 0:
        to = tl.atomic_add(state + 3, count.to(tl.int64)) + tl.cumsum(hit, axis=0) - 1
        tl.store(found + to, bits, mask=(hit == 1) & (to < room))


def _radix(
    mode: int,
    args: tuple[torch.Tensor, torch.Tensor, int, float],
    found: torch.Tensor,
    state: torch.Tensor,
    rank: int,
    kind: Mapping[str, object],
) -> None:
    """Finds the rank-th largest of the vector, or of `found`, and writes it to the state."""
    grad, residual, n, scale = args
    if mode != _WHOLE:
        grad, kind = residual, {"KIND": 0, "SCALED": False}  # not read, so one compiled form serves all
    counts = torch.zeros(len(_SHIFTS) * _BINS, dtype=torch.int64, device=state.device)
    many = n if mode == _WHOLE else found.numel()
    # The interpreter runs programs one after the other; two are enough to test that their counts add up.
    programs = min(PROGRAMS if state.is_cuda else 2, ceil_div(many, ACCUMULATE_BLOCK))
    how = {"WHOLE": mode == _WHOLE, "LISTED": mode == _LIST, "BLOCK": ACCUMULATE_BLOCK, **kind}
    for level in range(len(_SHIFTS)):
        launch(
            _count_digits,
            programs,
            grad,
            residual,
            many,
            scale,
            found,
            counts,
            state,
            rank,
            programs,
            warps=8,
            LEVEL=level,
            **how,
        )
    launch(_resolve, 1, counts, state, rank, found.numel(), MODE=mode)


def _find_threshold(grad: torch.Tensor | None, residual: torch.Tensor, k: int, scale: float) -> torch.Tensor:
    """Returns the state, int64, on the device: bits of the k-th largest magnitude, number of its ties to take, ..."""
    n, device = residual.numel(), residual.device
    state = torch.zeros(8, dtype=torch.int64, device=device)
    args = (bits_of(grad, residual), residual, n, scale)
    kind = {"KIND": KIND[None if grad is None else grad.dtype], "SCALED": scale != 1.0}
    found = torch.empty(0, dtype=torch.int32, device=device)
    if n < _SMALL or 4 * k >= n:
        state[_MISLED].fill_(1)
    else:
        many = min(max(64 * n // k, 1 << 14), 1 << 18, n)
        expected = many * k / n
        rank = math.ceil(expected + _SIGMAS * math.sqrt(expected) + _SIGMAS)
        sample = torch.empty(many, dtype=torch.int32, device=device)
        block = ACCUMULATE_BLOCK // 4
        launch(_sample, ceil_div(many, block), *args, sample, many, BLOCK=block, **kind)
        _radix(_SAMPLE, args, sample, state, rank, kind)
        room = min(n, int(2 * rank / expected * k) + ACCUMULATE_BLOCK)
        found = torch.empty(room, dtype=torch.int32, device=device)
        block = ACCUMULATE_BLOCK
        launch(_collect, ceil_div(n, block), *args, found, state, room, warps=8, BLOCK=block, **kind)
        _radix(_LIST, args, found, state, k, kind)
    _radix(_WHOLE, args, found, state, k, kind)
    return state


def exact_topk(
    grad: torch.Tensor | None,
    residual: torch.Tensor,
    k: int,
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    scale: float = 1.0,
) -> TopKResult:
    """Finds the exact threshold, then selects with it; waits for the device once, for the counts."""
    n = residual.numel()
    k = min(k, n)
    if k == 0:
        nothing = out_indices[:0], out_values[:0]
        if grad is None:
            return TopKResult(0, 0.0, int(read((~torch.isfinite(residual)).sum())))
        return TopKResult(0, 0.0, accumulate_select(grad, residual, math.inf, *nothing, scale).nonfinite)
    state = _find_threshold(grad, residual, k, scale)
    counts = select(grad, residual, state, out_indices, out_values, scale)
    total, ties, nonfinite, bits, need, *_ = read(torch.cat([counts, state]))
    if bits >= INF_BITS:
        return TopKResult(0, 0.0, nonfinite)
    return TopKResult(total - ties + min(ties, need), float(np.uint32(bits).view(np.float32)), nonfinite)


@triton.jit
def _cut(indices, values, count, keep, to, kept_indices, kept_values, residual, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    at = tl.load(indices + i, mask=mask, other=0)
    value = tl.load(values + i, mask=mask, other=0.0)
    kept = tl.load(keep + i, mask=mask, other=0) != 0
    place = tl.load(to + i, mask=mask, other=1) - 1
    tl.store(kept_indices + place, at, mask=mask & kept)
    tl.store(kept_values + place, value, mask=mask & kept)
    tl.store(residual + (at.to(tl.int64) & 0xFFFFFFFF), value, mask=mask & (kept == 0))


def cut_topk(indices: torch.Tensor, values: torch.Tensor, count: int, k: int, residual: torch.Tensor) -> int:
    """Cuts by radix select on the device; never waits for it."""
    if k >= count:
        return count
    bits = values[:count].view(torch.int32) & 0x7FFFFFFF
    if k:
        state = torch.zeros(8, dtype=torch.int64, device=values.device)
        args = (values, values, count, 1.0)
        state[_COUNT].fill_(count)
        _radix(_LIST, args, bits, state, k, {"KIND": 0, "SCALED": False})
        tie = bits == state[_THRESHOLD]
        # The radix select does not count zeros. If fewer than k pairs are left, the first zeros fill up the rest.
        keep = (bits > state[_THRESHOLD]) | (tie & (torch.cumsum(tie, 0) <= state[_NEED]))
        zero = (bits == 0) & ~keep
        keep |= zero & (torch.cumsum(zero, 0) <= k - keep.sum())
    else:
        keep = torch.zeros(count, dtype=torch.bool, device=values.device)
    kept_indices = torch.empty(k, dtype=torch.int32, device=values.device)
    kept_values = torch.empty(k, dtype=torch.float32, device=values.device)
    to, raw = torch.cumsum(keep, 0), indices.view(torch.int32)
    launch(
        _cut,
        ceil_div(count, 1024),
        raw,
        values,
        count,
        keep.view(torch.uint8),
        to,
        kept_indices,
        kept_values,
        residual,
        BLOCK=1024,
    )
    raw[:k] = kept_indices
    values[:k] = kept_values
    return k
