"""Selection from a gradient plus its residual: by threshold, the k largest, and cutting a selection to k."""

from __future__ import annotations

import torch

from sparsecomm.kernels import checks
from sparsecomm.kernels.paths import kernels_for
from sparsecomm.types import SelectResult, TopKResult

__all__ = ["accumulate_select", "cut_topk", "exact_topk"]


def accumulate_select(
    grad: torch.Tensor,
    residual: torch.Tensor,
    threshold: float,
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    *,
    scale: float = 1.0,
) -> SelectResult:
    """Adds a gradient to the residual and takes out the elements that reach the threshold, in one pass over memory.

    For every element ``acc = residual + grad * scale``: the product is rounded to float32 before the sum, without a
    fused multiply-add. If ``acc`` is NaN or infinite, the residual is left unchanged and the element is counted.
    Otherwise, if ``|acc| >= threshold`` and the output has room, the pair is written and the residual becomes 0;
    else the residual becomes ``acc``.

    Args:
        grad: shape (n,), float32, float16 or bfloat16.
        residual: shape (n,), float32. Mutated.
        threshold: >= 0, not NaN. inf selects nothing, so the call only accumulates; 0 selects zeros too.
        out_indices: uint32, shape (capacity,). First `stored` entries are filled, ascending; the rest may be
            overwritten with anything.
        out_values: float32, shape (capacity,). Filled in the same way.
        scale: factor on the gradient, taken as float32.

    Returns:
        Number of pairs stored, of elements that met the threshold, and of elements that were not finite.

    Raises:
        KernelError: for tensors of the wrong dtype, shape, device or layout, or a bad threshold.

    Example:
        >>> r, i, v = torch.tensor([0.5, 0.0, 1.0]), torch.empty(2, dtype=torch.uint32), torch.empty(2)
        >>> accumulate_select(torch.tensor([1.0, 0.25, -3.0]), r, 1.5, i, v)
        SelectResult(stored=2, total=2, nonfinite=0)
        >>> i.tolist(), v.tolist(), r.tolist()
        ([0, 2], [1.5, -2.0], [0.0, 0.25, 0.0])
    """
    n = checks.value_vec("residual", residual)
    if checks.grad_like("grad", grad) != n:
        checks.refuse(f"grad has {grad.numel()} elements, residual {n}: they must be equally long")
    if not threshold >= 0:
        checks.refuse(f"threshold must be at least 0, got {threshold}")
    checks.capacity(out_indices, out_values)
    return kernels_for(grad, residual, out_indices, out_values).accumulate_select(
        grad, residual, threshold, out_indices, out_values, scale
    )


def exact_topk(
    grad: torch.Tensor | None,
    residual: torch.Tensor,
    k: int,
    out_indices: torch.Tensor,
    out_values: torch.Tensor,
    *,
    scale: float = 1.0,
) -> TopKResult:
    """Adds a gradient to the residual and takes out exactly the k largest magnitudes.

    ``acc`` is as in `accumulate_select`. NaN, infinities and zeros are never selected. Among equal magnitudes the
    lowest index wins. The residual becomes 0 where an element was taken and ``acc`` elsewhere, but is left unchanged
    where ``acc`` is not finite.

    Args:
        grad: shape (n,), float32, float16 or bfloat16; None selects from the residual alone.
        residual: shape (n,), float32. Mutated.
        k: >= 0; more than n means n.
        out_indices: uint32, shape (capacity,), capacity >= min(k, n). First `stored` entries are filled, ascending;
            the rest may be overwritten with anything.
        out_values: float32, shape (capacity,). Filled in the same way.
        scale: factor on the gradient, taken as float32.

    Returns:
        Number of pairs stored, the smallest selected magnitude, and the number of elements that were not finite.

    Raises:
        KernelError: for tensors of the wrong dtype, shape, device or layout, a negative k, or too little room.

    Example:
        >>> r, i, v = torch.tensor([1.0, -4.0, 4.0, 0.0]), torch.empty(2, dtype=torch.uint32), torch.empty(2)
        >>> exact_topk(torch.tensor([1.0, 0.0, -1.0, 0.0]), r, 2, i, v)
        TopKResult(stored=2, threshold=3.0, nonfinite=0)
        >>> i.tolist(), v.tolist(), r.tolist()
        ([1, 2], [-4.0, 3.0], [2.0, 0.0, 0.0, 0.0])
    """
    n = checks.value_vec("residual", residual)
    if grad is not None and checks.grad_like("grad", grad) != n:
        checks.refuse(f"grad has {grad.numel()} elements, residual {n}: they must be equally long")
    checks.count("k", k)
    room = checks.capacity(out_indices, out_values)
    if room < min(k, n):
        checks.refuse(f"out_indices and out_values have room for {room}, need min(k, n) = {min(k, n)}")
    given = () if grad is None else (grad,)
    return kernels_for(residual, out_indices, out_values, *given).exact_topk(
        grad, residual, k, out_indices, out_values, scale
    )


def cut_topk(indices: torch.Tensor, values: torch.Tensor, count: int, k: int, residual: torch.Tensor) -> int:
    """Keeps the k largest magnitudes of the first `count` pairs and puts the others back into the residual.

    Among equal magnitudes the lowest index wins. The pairs that are kept are compacted in place, in order.

    Args:
        indices: uint32, shape (capacity,), the first `count` ascending and below residual.numel(). Mutated.
        values: float32, shape (capacity,). Mutated.
        count: number of pairs.
        k: number of pairs to keep.
        residual: float32, shape (n,). Mutated: ``residual[index] = value`` for the pairs that are dropped.

    Returns:
        The new number of pairs, min(count, k).

    Raises:
        KernelError: for tensors of the wrong dtype, shape, device or layout, or counts that do not fit.

    Example:
        >>> i, v = torch.tensor([0, 2, 3], dtype=torch.uint32), torch.tensor([1.0, -3.0, 2.0])
        >>> r = torch.zeros(4)
        >>> cut_topk(i, v, 3, 2, r), i[:2].tolist(), v[:2].tolist(), r.tolist()
        (2, [2, 3], [-3.0, 2.0], [1.0, 0.0, 0.0, 0.0])
    """
    checks.count("count", count, checks.capacity(indices, values))
    checks.count("k", k)
    checks.value_vec("residual", residual)
    return kernels_for(indices, values, residual).cut_topk(indices, values, count, k, residual)
