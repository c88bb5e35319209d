"""Selection, accumulation and sums in numpy.

This is also the fallback where the package was installed without a compiler, so the code is vectorised; it may
allocate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from sparsecomm.kernels.reference.arrays import array
from sparsecomm.kernels.reference.values import bf16_from_f32
from sparsecomm.types import SelectResult, TopKResult

__all__ = [
    "accumulate_dense",
    "accumulate_norms",
    "accumulate_select",
    "add_dense",
    "cut_topk",
    "exact_topk",
    "release_scratch",
    "scatter_add",
    "scatter_reduce",
    "scratch_bytes",
]

_INF_BITS = np.uint32(0x7F800000)
_F32 = npt.NDArray[np.float32]
_U32 = npt.NDArray[np.uint32]


def magnitude_bits(values: _F32) -> _U32:
    """Returns the bits of |v|, which are ordered like the magnitudes; infinities and NaN come last."""
    return values.view(np.uint32) & np.uint32(0x7FFFFFFF)


def threshold_bits(threshold: float) -> np.uint32:
    """Returns the bits of the smallest float32 not below the threshold, so that rounding never selects more."""
    with np.errstate(over="ignore"):
        rounded = np.float32(threshold)
    if float(rounded) < threshold:
        rounded = np.nextafter(rounded, np.float32(np.inf))
    return np.uint32(rounded.view(np.uint32) & np.uint32(0x7FFFFFFF))


def _accumulated(grad: torch.Tensor, residual: _F32, scale: float) -> _F32:
    g: _F32 = array(grad.detach().to(torch.float32))
    with np.errstate(all="ignore"):
        if scale != 1.0:
            g = g * np.float32(scale)
        acc: _F32 = residual + g
    return acc


def accumulate_select(
    grad: torch.Tensor,
    residual: torch.Tensor,
    threshold: float,
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    scale: float = 1.0,
) -> SelectResult:
    """Computes all sums into a temporary array, then picks the hits from it."""
    res = array(residual)
    acc = _accumulated(grad, res, scale)
    bits = magnitude_bits(acc)
    finite = bits < _INF_BITS
    hits = np.flatnonzero(finite & (bits >= threshold_bits(threshold)))
    stored = min(len(hits), out_indices.numel())
    taken = hits[:stored]
    array(out_indices)[:stored] = taken
    array(out_values)[:stored] = acc[taken]
    np.copyto(res, acc, where=finite)
    res[taken] = 0.0
    return SelectResult(stored, len(hits), int(len(res) - np.count_nonzero(finite)))


def _largest(bits: _U32, k: int) -> npt.NDArray[np.intp]:
    """Returns the positions, ascending, of the k largest of `bits`, the first among equals; 0 < k <= len(bits)."""
    cut = np.partition(bits, len(bits) - k)[len(bits) - k]
    above = np.flatnonzero(bits > cut)
    ties = np.flatnonzero(bits == cut)[: k - len(above)]
    return np.sort(np.concatenate([above, ties]))


def exact_topk(
    grad: torch.Tensor | None,
    residual: torch.Tensor,
    k: int,
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    scale: float = 1.0,
) -> TopKResult:
    """Computes all sums into a temporary array, then partitions the magnitudes of the eligible ones."""
    res = array(residual)
    acc = res.copy() if grad is None else _accumulated(grad, res, scale)
    bits = magnitude_bits(acc)
    finite = bits < _INF_BITS
    nonfinite = int(len(res) - np.count_nonzero(finite))
    np.copyto(res, acc, where=finite)
    eligible = np.flatnonzero(finite & (bits > 0))
    stored = min(k, len(eligible))
    if stored == 0:
        return TopKResult(0, 0.0, nonfinite)
    taken = eligible[_largest(bits[eligible], stored)]
    array(out_indices)[:stored] = taken
    array(out_values)[:stored] = acc[taken]
    res[taken] = 0.0
    return TopKResult(stored, float(np.abs(acc[taken]).min()), nonfinite)


def cut_topk(indices: torch.Tensor, values: torch.Tensor, count: int, k: int, residual: torch.Tensor) -> int:
    """Marks the pairs to keep, then compacts them with a mask."""
    if k >= count:
        return count
    idx, val, res = array(indices)[:count], array(values)[:count], array(residual)
    keep = np.zeros(count, dtype=bool)
    if k:
        keep[_largest(magnitude_bits(val), k)] = True
    res[idx[~keep]] = val[~keep]
    idx[:k], val[:k] = idx[keep], val[keep]
    return k


def scatter_add(out: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Adds by numpy's fancy indexing, which is exact because the positions are distinct."""
    with np.errstate(all="ignore"):
        array(out)[array(indices)] += array(values)


def scatter_reduce(out: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], scale: float = 1.0) -> None:
    """Adds into a temporary float32 vector, scales it, then rounds it into `out`."""
    acc = np.zeros(out.numel(), dtype=np.float32)
    with np.errstate(all="ignore"):
        for indices, values in parts:
            acc[array(indices)] += array(values)
        if scale != 1.0:
            acc *= np.float32(scale)
        if out.dtype == torch.bfloat16:
            array(out.view(torch.int16)).view(np.uint16)[:] = bf16_from_f32(acc)
        else:
            array(out)[:] = acc  # float16: numpy rounds to nearest even


def add_dense(out: torch.Tensor, data: torch.Tensor) -> None:
    """Adds with numpy in place."""
    with np.errstate(all="ignore"):
        np.add(array(out), array(data).view(np.float32), out=array(out))


def accumulate_dense(grad: torch.Tensor, residual: torch.Tensor, scale: float = 1.0) -> int:
    """Computes all sums into a temporary array, then copies the finite ones."""
    res = array(residual)
    acc = _accumulated(grad, res, scale)
    finite = magnitude_bits(acc) < _INF_BITS
    np.copyto(res, acc, where=finite)
    return int(len(res) - np.count_nonzero(finite))


def accumulate_norms(
    grad: torch.Tensor, residual: torch.Tensor, chunk: int, norms: torch.Tensor, scale: float = 1.0
) -> int:
    """Adds a chunk up in 32 lanes, which take its elements in turn, then adds the halves of the lanes."""
    nonfinite = accumulate_dense(grad, residual, scale)
    magnitudes = np.abs(array(residual))
    with np.errstate(over="ignore"):
        for i in range(norms.numel()):
            some = magnitudes[i * chunk : (i + 1) * chunk]
            rows = np.zeros((-(-len(some) // 32), 32), dtype=np.float32)
            rows.reshape(-1)[: len(some)] = some
            lanes = np.add.accumulate(rows, axis=0, dtype=np.float32)[-1]
            while len(lanes) > 1:
                lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
            norms[i] = float(lanes[0])
    return nonfinite


def scratch_bytes() -> int:
    """Returns 0: nothing is kept between calls."""
    return 0


def release_scratch() -> None:
    """Does nothing, because nothing is kept."""
