"""Checks of a bucket of gradients, and the search for unused parameters in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch

from sparsecomm.errors import ConfigError
from sparsecomm.kernels import triton_problem
from sparsecomm.runtime.device import device_problem
from sparsecomm.types import GRAD_DTYPES, MAX_NUMEL

__all__ = ["check_gradient", "check_real", "unused_spans"]


def unused_spans(shapes: Sequence[Sequence[int]], grad: torch.Tensor) -> list[tuple[int, int]]:
    """Returns the spans (start, end) of parameters whose gradient is all zeros: this rank did not use them.

    Args:
        shapes: shapes of the parameters in the bucket, in order.
        grad: the flat bucket, shape (n,).
    """
    spans, start = [], 0
    for shape in shapes:
        end = start + math.prod(shape)
        # A used parameter nearly always has a nonzero among its first elements; only the others are read to the end.
        if end > start and not bool(grad[start : min(end, start + 256)].any()) and not bool(grad[start:end].any()):
            spans.append((start, end))
        start = end
    return spans


def check_real(parameters: Sequence[torch.Tensor], prefix: str) -> None:
    """Checks that no parameter is complex: DDP hands over the gradients of these as pairs of real numbers.

    Raises:
        ConfigError: for a complex parameter; the text starts with `prefix`.
    """
    for p in parameters:
        if p.is_complex():
            _refuse(p.dtype, prefix)


def _refuse(dtype: torch.dtype, prefix: str) -> NoReturn:
    raise ConfigError(f"{prefix}: gradients of dtype {dtype} are not supported, only float32, float16, bfloat16")


def check_gradient(grad: torch.Tensor, prefix: str) -> None:
    """Checks that a flat bucket can be exchanged.

    Args:
        grad: the flat bucket.
        prefix: start of every error's text.

    Raises:
        ConfigError: for a layout, dtype, device or size that cannot be exchanged.
    """
    if grad.layout != torch.strided:
        raise ConfigError(
            f"{prefix}: gradients in {grad.layout} layout are not supported; build the embedding with sparse=False"
        )
    if grad.dtype not in GRAD_DTYPES:
        _refuse(grad.dtype, prefix)
    problem = device_problem(grad.device, triton_problem())
    if problem is not None:
        raise ConfigError(f"{prefix}: gradients on {grad.device} cannot be exchanged: {problem}")
    if grad.numel() > MAX_NUMEL:
        raise ConfigError(f"{prefix}: {grad.numel()} elements are more than {MAX_NUMEL}; lower DDP's bucket_cap_mb")
