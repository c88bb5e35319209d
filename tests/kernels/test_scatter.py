"""Sums of decoded payloads: the same bits on every path, added in the order given."""

from __future__ import annotations

import numpy as np
import torch
from by_path import by_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vectors import DTYPES, same_bits, seeds, vector

from sparsecomm import kernels

many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def parts_of(n: int, count: int, share: float, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        chosen = np.flatnonzero(rng.random(n) < share).astype(np.uint32)
        out.append((torch.from_numpy(chosen), vector("wide", chosen.size, seed + i).clamp(-1e3, 1e3)))
    return out


@many
@given(
    n=st.sampled_from([0, 1, 17, 1000, 65_536, 65_537, 140_000]),
    count=st.integers(0, 5),
    share=st.sampled_from([0.0, 0.001, 0.012, 0.3, 1.0]),
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 0.5, 1 / 3, -0.5]),
)
def test_scatter_reduce_adds_in_order(
    path: str, n: int, count: int, share: float, seed: int, dtype: torch.dtype, scale: float
) -> None:
    parts = parts_of(n, count, share, seed)
    mine, truth = torch.full((n,), 7.0, dtype=dtype), torch.full((n,), 7.0, dtype=dtype)
    kernels.scatter_reduce(mine, parts, scale=scale)
    by_reference(path, lambda: kernels.scatter_reduce(truth, parts, scale=scale))
    assert same_bits(mine, truth)
    plain = torch.zeros(n, dtype=torch.float32)
    for indices, values in parts:
        plain[indices.to(torch.int64)] += values
    assert same_bits(mine + 0.0, (plain * torch.tensor(scale, dtype=torch.float32)).to(dtype) + 0.0)


@many
@given(n=st.sampled_from([1, 17, 1000, 70_000]), share=st.sampled_from([0.01, 0.5, 1.0]), seed=seeds)
def test_scatter_add_and_dense_sums_equal_torch(path: str, n: int, share: float, seed: int) -> None:
    ((indices, values),) = parts_of(n, 1, share, seed)
    out, expected = vector("normal", n, seed), vector("normal", n, seed)
    kernels.scatter_add(out, indices, values)
    expected[indices.to(torch.int64)] += values
    assert same_bits(out, expected)
    other = vector("normal", n, seed + 9)
    kernels.add_dense(out, other.view(torch.uint8))
    assert same_bits(out, expected + other)
    residual, grad = out.clone(), vector("nonfinite", n, seed, torch.bfloat16)
    bad = kernels.accumulate_dense(grad, residual, scale=0.5)
    acc = out + grad.float() * 0.5
    finite = torch.isfinite(acc)
    assert bad == n - int(finite.sum())
    assert same_bits(residual, torch.where(finite, acc, out))
