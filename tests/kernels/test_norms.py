"""Chunk norms on every path equal the reference bit for bit, and the exact sums to rounding."""

from __future__ import annotations

import pytest
import torch
from by_path import by_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vectors import DTYPES, kinds, same_bits, seeds, sizes, vector

from sparsecomm import kernels
from sparsecomm.errors import KernelError

many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(
    n=sizes,
    kind=kinds,
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    offset=st.integers(0, 3),
    chunk=st.sampled_from([1, 5, 31, 32, 33, 100, 8192, 8193, 20_000, 2**40]),
    scale=st.sampled_from([1.0, 1 / 3]),
)
def test_norms_equal_the_reference_and_the_residual_is_that_of_accumulate_dense(
    path: str, n: int, kind: str, seed: int, dtype: torch.dtype, offset: int, chunk: int, scale: float
) -> None:
    if chunk < 100:  # the reference is slow for many small chunks
        n = min(n, 4097)
    grad, before = vector(kind, n, seed, dtype, offset=offset), vector("normal", n, seed + 1, offset=offset)
    mine, truth, plain = before.clone(), before.clone(), before.clone()
    out = torch.full((-(-n // chunk),), -1.0, dtype=torch.float32)
    expected = torch.full((-(-n // chunk),), -1.0, dtype=torch.float32)
    got = kernels.accumulate_norms(grad, mine, chunk, out, scale=scale)
    want = by_reference(path, lambda: kernels.accumulate_norms(grad, truth, chunk, expected, scale=scale))
    assert got == want == kernels.accumulate_dense(grad, plain, scale=scale)
    assert same_bits(mine, truth)
    assert same_bits(mine, plain)
    assert same_bits(out, expected)
    if n:
        exact = torch.stack([part.double().abs().sum() for part in plain.split(min(chunk, n))])
        close = (out.double() - exact).abs() <= 1e-3 * exact + 1e-44
        assert bool((close | (exact > 3e38)).all())


@pytest.mark.parametrize(
    ("chunk", "norms", "grad", "words"),
    [
        (0, 0, 10, "chunk must be at least 1, got 0"),
        (4, 2, 10, "norms has 2 elements, 10 elements in chunks of 4 need 3"),
        (4, 3, 9, "grad has 9 elements, residual 10"),
    ],
)
def test_unfit_tensors_are_refused(path: str, chunk: int, norms: int, grad: int, words: str) -> None:
    with pytest.raises(KernelError, match=words):
        kernels.accumulate_norms(
            torch.zeros(grad, dtype=torch.float32),
            torch.zeros(10, dtype=torch.float32),
            chunk,
            torch.zeros(norms, dtype=torch.float32),
        )
