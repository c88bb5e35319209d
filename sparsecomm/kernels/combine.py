"""Adding sparse and dense vectors up."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsecomm.kernels import checks
from sparsecomm.kernels.paths import kernels_for

__all__ = ["accumulate_dense", "accumulate_norms", "add_dense", "scatter_add", "scatter_reduce"]


def scatter_add(out: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Adds sparse values into a dense vector: ``out[indices] += values``.

    Args:
        out: float32, shape (n,). Mutated.
        indices: uint32, shape (nnz,), strictly ascending, below n; trusted, not checked.
        values: float32, shape (nnz,).

    Raises:
        KernelError: for unfit tensors.

    Example:
        >>> out = torch.ones(3)
        >>> scatter_add(out, torch.tensor([0, 2], dtype=torch.uint32), torch.tensor([0.5, -1.0]))
        >>> out.tolist()
        [1.5, 1.0, 0.0]
    """
    checks.value_vec("out", out)
    if checks.index_vec("indices", indices) != checks.value_vec("values", values):
        checks.refuse(f"indices has {indices.numel()} elements, values {values.numel()}: must be equally long")
    kernels_for(out, indices, values).scatter_add(out, indices, values)


def scatter_reduce(
    out: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], *, scale: float = 1.0
) -> None:
    """Sets a dense vector to the scaled sum of sparse ones, added in their order, so that ranks agree bit for bit.

    Each element starts as float32 0. Each part that contains it is added in the order given; the sum is multiplied by
    `scale` and rounded to nearest even into the dtype of `out`.

    Args:
        out: float32, float16 or bfloat16, shape (n,). Overwritten.
        parts: pairs of indices (uint32, strictly ascending, below n; trusted, not checked) and values (float32).
        scale: factor on the sums, taken as float32.

    Raises:
        KernelError: for unfit tensors.

    Example:
        >>> out = torch.empty(3)
        >>> one = (torch.tensor([0, 2], dtype=torch.uint32), torch.tensor([1.0, 2.0]))
        >>> two = (torch.tensor([2], dtype=torch.uint32), torch.tensor([4.0]))
        >>> scatter_reduce(out, [one, two], scale=0.5)
        >>> out.tolist()
        [0.5, 0.0, 3.0]
    """
    checks.grad_like("out", out)
    for indices, values in parts:
        if checks.index_vec("indices", indices) != checks.value_vec("values", values):
            checks.refuse(f"a part has {indices.numel()} indices but {values.numel()} values")
    kernels_for(out, *(t for part in parts for t in part)).scatter_reduce(out, parts, scale)


def add_dense(out: torch.Tensor, data: torch.Tensor) -> None:
    """Adds a dense vector, or its bytes as they were received: ``out += data``.

    Args:
        out: float32, shape (n,). Mutated.
        data: float32, shape (n,), or uint8, shape (4 * n,), little-endian, at any alignment.

    Raises:
        KernelError: for unfit tensors.

    Example:
        >>> out = torch.ones(2)
        >>> add_dense(out, torch.tensor([0.5, 2.0]).view(torch.uint8))
        >>> out.tolist()
        [1.5, 3.0]
    """
    n = checks.value_vec("out", out)
    if data.dtype is torch.uint8:
        if checks.byte_vec("data", data) != 4 * n:
            checks.refuse(f"data has {data.numel()} bytes, need 4 * {n}")
    elif checks.value_vec("data", data) != n:
        checks.refuse(f"data has {data.numel()} elements, out {n}: they must be equally long")
    kernels_for(out, data).add_dense(out, data)


def accumulate_dense(grad: torch.Tensor, residual: torch.Tensor, *, scale: float = 1.0) -> int:
    """Adds a gradient to the residual and selects nothing: ``residual += grad * scale`` where the sum is finite.

    Args:
        grad: shape (n,), float32, float16 or bfloat16.
        residual: shape (n,), float32. Mutated.
        scale: factor on the gradient, taken as float32.

    Returns:
        Number of sums that are NaN or infinite; at those elements the residual is left unchanged.

    Raises:
        KernelError: for unfit tensors.

    Example:
        >>> r = torch.tensor([1.0, 2.0])
        >>> accumulate_dense(torch.tensor([0.5, float("inf")]), r), r.tolist()
        (1, [1.5, 2.0])
    """
    n = checks.value_vec("residual", residual)
    if checks.grad_like("grad", grad) != n:
        checks.refuse(f"grad has {grad.numel()} elements, residual {n}: they must be equally long")
    return kernels_for(grad, residual).accumulate_dense(grad, residual, scale)


def accumulate_norms(
    grad: torch.Tensor, residual: torch.Tensor, chunk: int, norms: torch.Tensor, *, scale: float = 1.0
) -> int:
    """Adds a gradient to the residual as `accumulate_dense` does, and computes the L1 norm of every chunk.

    Args:
        grad: shape (n,), float32, float16 or bfloat16.
        residual: shape (n,), float32. Mutated.
        chunk: elements of a chunk, at least 1; the last chunk may be shorter.
        norms: float32, shape (ceil(n / chunk),). Overwritten with the sums of ``|residual|`` after the addition.
        scale: factor on the gradient, taken as float32.

    Returns:
        Number of sums that are NaN or infinite; at those elements the residual is left unchanged.

    Raises:
        KernelError: for unfit tensors or a chunk below 1.

    Example:
        >>> r, norms = torch.tensor([1.0, -2.0, 0.0]), torch.empty(2)
        >>> accumulate_norms(torch.tensor([0.5, 0.5, -4.0]), r, 2, norms), r.tolist(), norms.tolist()
        (0, [1.5, -1.5, -4.0], [3.0, 4.0])
    """
    n = checks.value_vec("residual", residual)
    if checks.grad_like("grad", grad) != n:
        checks.refuse(f"grad has {grad.numel()} elements, residual {n}: they must be equally long")
    if chunk < 1:
        checks.refuse(f"chunk must be at least 1, got {chunk}")
    if checks.value_vec("norms", norms) != -(-n // chunk):
        checks.refuse(f"norms has {norms.numel()} elements, {n} elements in chunks of {chunk} need {-(-n // chunk)}")
    return kernels_for(grad, residual, norms).accumulate_norms(grad, residual, chunk, norms, scale)
