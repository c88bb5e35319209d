"""Accumulate, select and update the residual on a GPU: two kernels, and a scan of block counts between them.

`_select` moves 12 bytes an element, the minimum: it reads gradient and residual, writes the residual, and stores the
pairs that its block selects, in order, in a slot reserved for the block. The scan tells where each slot goes, and
`_gather` moves the slots there, of the order of k elements. So positions are sorted without atomics and without
programs that wait for each other. A block that selects more than its slot holds writes nothing at first; `_gather`
selects from the whole block again once its place is known.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsecomm.kernels.reference.select import threshold_bits
from sparsecomm.kernels.triton.launch import ACCUMULATE_BLOCK, KIND, bits_of, ceil_div, launch, read, upload
from sparsecomm.types import SelectResult

__all__ = ["accumulate_dense", "accumulate_norms", "accumulate_select", "accumulated", "select"]

INF_BITS = 0x7F800000
EVERY_TIE = 2**62
_SLOT = 256
_GROUP = 8
_LANES = 32


@triton.jit
def accumulated(grad, residual, at, mask, scale, KIND: tl.constexpr, SCALED: tl.constexpr):
    """Returns residual plus scaled gradient; the product is rounded before the sum."""
    acc = tl.load(residual + at, mask=mask, other=0.0)
    if KIND != 0:
        g = tl.load(grad + at, mask=mask, other=0)
        if KIND == 3:  # noqa: SIM108  # the types differ, and only one branch is compiled
            g = ((g.to(tl.int32) & 0xFFFF) << 16).to(tl.float32, bitcast=True)
        else:
            g = g.to(tl.float32)
        if SCALED:
            g = g * scale
        acc = acc + g
    return acc


@triton.jit
def _magnitude(values):
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _select(
    grad, residual, n, scale, rule, counts, blocks, slot_at, slot_values, KIND: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """Selects from one block into its slot, and counts; a block that overflows its slot writes only the counts."""
    block = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, BLOCK)
    at = block * BLOCK + local
    mask = at < n
    acc = accumulated(grad, residual, at, mask, scale, KIND, SCALED)
    bits = _magnitude(acc)
    threshold = tl.load(rule).to(tl.int32)
    finite = mask & (bits < 0x7F800000)
    hit = finite & (bits >= threshold)
    count = tl.sum(hit.to(tl.int32), axis=0)
    tl.store(counts + block, count)
    tl.store(counts + blocks + block, tl.sum((finite & (bits == threshold)).to(tl.int32), axis=0))
    tl.store(counts + 2 * blocks + block, tl.sum((mask & (bits >= 0x7F800000)).to(tl.int32), axis=0))
    if count <= SLOT:
        tl.store(residual + at, tl.where(hit, 0.0, acc), mask=finite)
        if count > 0:
            place = block * SLOT + tl.cumsum(hit.to(tl.int32), axis=0) - 1
            tl.store(slot_at + place, local.to(tl.int16), mask=hit)
            tl.store(slot_values + place, acc, mask=hit)


@triton.jit
def _gather(
    grad, residual, n, scale, rule, counts, ends, blocks, slot_at, slot_values, out_indices, out_values, capacity,
    KIND: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, SLOT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Moves the slots of GROUP blocks to their places, and selects again from blocks that overflowed their slots."""
    threshold = tl.load(rule).to(tl.int32)
    need = tl.load(rule + 1)
    first = tl.program_id(0).to(tl.int64) * GROUP
    block = first + tl.arange(0, GROUP)
    there = block < blocks
    count = tl.load(counts + block, mask=there, other=0)
    ties = tl.load(counts + blocks + block, mask=there, other=0)
    before = tl.load(ends + block, mask=there, other=0) - count
    ties_before = tl.load(ends + blocks + block, mask=there, other=0) - ties
    start = before - ties_before + tl.minimum(ties_before, need)
    lane = tl.arange(0, SLOT)
    held = (lane[None, :] < count[:, None]) & (count[:, None] <= SLOT)
    place = block[:, None] * SLOT + lane[None, :]
    values = tl.load(slot_values + place, mask=held, other=0.0)
    at = block[:, None] * BLOCK + tl.load(slot_at + place, mask=held, other=0).to(tl.int64)
    tie = (held & (_magnitude(values) == threshold)).to(tl.int32)
    kept = held & ((tie == 0) | (ties_before[:, None] + tl.cumsum(tie, axis=1) - tie < need))
    to = start[:, None] + tl.cumsum(kept.to(tl.int32), axis=1) - kept.to(tl.int32)
    kept = kept & (to < capacity)
    tl.store(out_indices + to, at.to(tl.int32), mask=kept)
    tl.store(out_values + to, values, mask=kept)
    tl.store(residual + at, values, mask=held & (kept == 0))
    if tl.max(count, axis=0) > SLOT:
        for j in range(GROUP):
            one = first + j
            if one < blocks:
                count_one = tl.load(counts + one)
                if count_one > SLOT:
                    ties_one = tl.load(ends + blocks + one) - tl.load(counts + blocks + one)
                    start_one = tl.load(ends + one) - count_one - ties_one + tl.minimum(ties_one, need)
                    place_one = one * BLOCK + tl.arange(0, BLOCK)
                    mask = place_one < n
                    acc = accumulated(grad, residual, place_one, mask, scale, KIND, SCALED)
                    bits = _magnitude(acc)
                    finite = mask & (bits < 0x7F800000)
                    even = (finite & (bits == threshold)).to(tl.int32)
                    taken = finite & (bits >= threshold)
                    taken = taken & ((even == 0) | (ties_one + tl.cumsum(even, axis=0) - even < need))
                    target = start_one + tl.cumsum(taken.to(tl.int32), axis=0) - taken.to(tl.int32)
                    taken = taken & (target < capacity)
                    tl.store(out_indices + target, place_one.to(tl.int32), mask=taken)
                    tl.store(out_values + target, acc, mask=taken)
                    tl.store(residual + place_one, tl.where(taken, 0.0, acc), mask=finite)


def select(
    grad: torch.Tensor | None,
    residual: torch.Tensor,
    rule: torch.Tensor,
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Takes all elements above a threshold and the first few that equal it, in order; never waits for the device.

    Args:
        grad: the gradient, or None.
        residual: float32, shape (n,), n > 0. Mutated.
        rule: int64, on the device: bits of the threshold, and the number of elements equal to it that are taken.
        out_indices: uint32, shape (capacity,). Mutated.
        out_values: float32, shape (capacity,). Mutated.
        scale: factor on the gradient.

    Returns:
        int64, shape (3,), on the device: number of elements that reach the threshold, equal it, are not finite.
    """
    n, device = residual.numel(), residual.device
    blocks = ceil_div(n, ACCUMULATE_BLOCK)
    counts = torch.empty((3, blocks), dtype=torch.int32, device=device)
    slot_at = torch.empty(blocks * _SLOT, dtype=torch.int16, device=device)
    slot_values = torch.empty(blocks * _SLOT, dtype=torch.float32, device=device)
    how = {
        "KIND": KIND[None if grad is None else grad.dtype],
        "SCALED": scale != 1.0,
        "BLOCK": ACCUMULATE_BLOCK,
        "SLOT": _SLOT,
    }
    source = bits_of(grad, residual)
    launch(_select, blocks, source, residual, n, scale, rule, counts, blocks, slot_at, slot_values, warps=8, **how)
    ends = torch.cumsum(counts, 1, dtype=torch.int64)
    out = (out_indices.view(torch.int32), out_values, out_indices.numel())
    launch(
        _gather,
        ceil_div(blocks, _GROUP),
        source,
        residual,
        n,
        scale,
        rule,
        counts,
        ends,
        blocks,
        slot_at,
        slot_values,
        *out,
        warps=8,
        GROUP=_GROUP,
        **how,
    )
    return ends[:, -1]


def accumulate_select(
    grad: torch.Tensor,
    residual: torch.Tensor,
    threshold: float,
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    scale: float = 1.0,
) -> SelectResult:
    """Selects in two launches and a scan; waits for the device once, for the counts."""
    if not residual.numel():
        return SelectResult(0, 0, 0)
    rule = upload([int(threshold_bits(threshold)), EVERY_TIE], residual.device)
    total, _, nonfinite = read(select(grad, residual, rule, out_indices, out_values, scale))
    return SelectResult(min(total, out_indices.numel()), total, nonfinite)


@triton.jit
def _accumulate(grad, residual, n, scale, counts, KIND: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    acc = accumulated(grad, residual, at, mask, scale, KIND, SCALED)
    finite = _magnitude(acc) < 0x7F800000
    tl.store(residual + at, acc, mask=mask & finite)
    tl.store(counts + block, tl.sum((mask & (finite == 0)).to(tl.int32), axis=0))


def accumulate_dense(grad: torch.Tensor, residual: torch.Tensor, scale: float = 1.0) -> int:
    """Accumulates in one launch; waits for the device once, for the number of sums that are not finite."""
    n = residual.numel()
    blocks = ceil_div(n, ACCUMULATE_BLOCK)
    counts = torch.empty(blocks, dtype=torch.int32, device=residual.device)
    how = {"KIND": KIND[grad.dtype], "SCALED": scale != 1.0, "BLOCK": ACCUMULATE_BLOCK}
    launch(_accumulate, blocks, bits_of(grad, residual), residual, n, scale, counts, warps=8, **how)
    return int(read(counts.sum()))


@triton.jit
def _norms(residual, n, chunk, norms, chunks, ROWS: tl.constexpr, LANES: tl.constexpr):
    which = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = which * chunk
    length = tl.where(which < chunks, tl.minimum(chunk, n - start), 0)
    lane = tl.arange(0, LANES)
    lanes = tl.zeros((ROWS, LANES), dtype=tl.float32)
    for step in range(0, chunk, LANES):
        at = step + lane
        here = at[None, :] < length[:, None]
        lanes += tl.abs(tl.load(residual + start[:, None] + at[None, :], mask=here, other=0.0))
    # Adds halves in the reference's order: lane i with lane i + 16, then i + 8, ...
    lanes = tl.sum(tl.reshape(lanes, (ROWS, 2, 16)), axis=1)
    lanes = tl.sum(tl.reshape(lanes, (ROWS, 2, 8)), axis=1)
    lanes = tl.sum(tl.reshape(lanes, (ROWS, 2, 4)), axis=1)
    lanes = tl.sum(tl.reshape(lanes, (ROWS, 2, 2)), axis=1)
    tl.store(norms + which, tl.sum(lanes, axis=1), mask=which < chunks)


def accumulate_norms(
    grad: torch.Tensor, residual: torch.Tensor, chunk: int, norms: torch.Tensor, scale: float = 1.0
) -> int:
    """Makes two passes, because the order of a chunk's sum allows only one warp to each chunk; waits once."""
    nonfinite = accumulate_dense(grad, residual, scale)
    n, chunks = residual.numel(), norms.numel()
    launch(_norms, ceil_div(chunks, 4), residual, n, min(chunk, n), norms, chunks, ROWS=4, LANES=_LANES)
    return nonfinite
