"""Gradients of all awkward kinds, reproducible from a seed."""

from __future__ import annotations

import math

import torch

__all__ = ["FINITE", "NONFINITE", "gradient"]

FINITE = ("normal", "zeros", "equal", "few values", "one nonzero", "tiny", "wide")
NONFINITE = ("one NaN", "one infinity", "all NaN")


def gradient(kind: str, numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Returns a flat gradient, shape (numel,).

    Args:
        kind: one of `FINITE` or `NONFINITE`.
        numel: number of elements.
        dtype: float32, float16 or bfloat16.
        seed: seed of the random elements.
    """
    noise = torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    if kind == "zeros":
        noise.zero_()
    elif kind == "equal":
        noise.fill_(0.37)
    elif kind == "few values":
        noise.mul_(1.5).round_()
    elif kind == "one nonzero":
        noise.zero_()[seed % numel if numel else 0 : seed % numel + 1 if numel else 0] = -2.5
    elif kind == "tiny":
        noise.mul_(2.0**-140 if dtype != torch.float16 else 2.0**-23)
    elif kind == "wide":
        noise.mul_(10.0 ** (torch.arange(numel, dtype=torch.int64) % 7 - 4))
    elif kind == "all NaN":
        noise.fill_(math.nan)
    elif kind in NONFINITE and numel:
        noise[seed % numel] = math.nan if kind == "one NaN" else -math.inf
    return noise.to(dtype)
