"""What a bucket of gradients must be, and which parameters in it were used."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sparsecomm.errors import ConfigError
from sparsecomm.kernels import triton_problem
from sparsecomm.runtime.device import device_problem
from sparsecomm.types import GRAD_DTYPES, MAX_NUMEL

__all__ = ["check_gradient", "unused_spans"]


def unused_spans(shapes: Sequence[Sequence[int]], grad: torch.Tensor) -> list[tuple[int, int]]:
    """Returns the spans of parameters whose gradient is zero throughout: this rank did not use them in this step.

    Args:
        shapes: of the parameters in the bucket, in order.
        grad: the flat bucket.
    """
    spans, start = [], 0
    for shape in shapes:
        end = start + math.prod(shape)
        # A used parameter nearly always shows in its first elements; only the others are read to their end.
        if end > start and not bool(grad[start : min(end, start + 256)].any()) and not bool(grad[start:end].any()):
            spans.append((start, end))
        start = end
    return spans


def check_gradient(grad: torch.Tensor, parameters: Sequence[torch.Tensor], where: str) -> None:
    """Checks a flat bucket.

    Raises:
        ConfigError: for a layout, dtype, device or size that cannot be exchanged; starts with `where`.
    """
    # DDP hands complex gradients over as pairs of real numbers: only the parameters tell.
    dtypes = {p.dtype for p in parameters if p.is_complex()} or {grad.dtype}
    if grad.layout != torch.strided:
        raise ConfigError(
            f"{where}: gradients in {grad.layout} layout are not supported; build the embedding with sparse=False"
        )
    if not dtypes <= set(GRAD_DTYPES):
        raise ConfigError(
            f"{where}: gradients of dtype {dtypes.pop()} are not supported, only float32, float16, bfloat16"
        )
    problem = device_problem(grad.device, triton_problem())
    if problem is not None:
        raise ConfigError(f"{where}: gradients on {grad.device} cannot be exchanged: {problem}")
    if grad.numel() > MAX_NUMEL:
        raise ConfigError(f"{where}: {grad.numel()} elements are more than {MAX_NUMEL}; lower DDP's bucket_cap_mb")
