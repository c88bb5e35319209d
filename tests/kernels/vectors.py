"""Difficult vectors, generated from a seed."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

KINDS = (
    "normal",
    "zeros",
    "equal",
    "two-valued",
    "ties",
    "denormal",
    "clustered",
    "sorted",
    "nonfinite",
    "wide",
    "tail",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

sizes = st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 1000, 4097, 70_001]))
kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**31)


def vector(kind: str, n: int, seed: int, dtype: torch.dtype = torch.float32, *, offset: int = 0) -> torch.Tensor:
    """Returns a vector of n elements that begins `offset` elements into its storage, so that it is not aligned."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n + offset, generator=g, dtype=torch.float32)
    if kind == "zeros":
        x.zero_()
        x[::3] = -0.0
    elif kind == "equal":
        x.fill_(-0.75)
    elif kind == "two-valued":
        x = torch.where(x > 1.5, 2.0, 1.0)
    elif kind == "ties":
        x = (x * 2).round()
    elif kind == "denormal":
        x *= 1e-41
    elif kind == "clustered":
        x[n // 3 : n // 3 + max(n // 50, 1)] *= 1000
    elif kind == "sorted":
        x = x.sort().values
    elif kind == "nonfinite" and n:
        x[torch.randint(0, n + offset, (max(n // 10, 1),), generator=g)] = float("nan")
        x[torch.randint(0, n + offset, (max(n // 10, 1),), generator=g)] = float("-inf")
    elif kind == "wide":
        x *= torch.exp(20 * torch.randn(n + offset, generator=g, dtype=torch.float32))
    elif kind == "tail":  # a strided sample of it is misleading
        x[:: max(n // 64, 1)] = 0.0
    return x.to(dtype)[offset:]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Returns whether two tensors agree bit for bit."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
