"""NaN or infinity on any rank: every rank sees a non-finite bucket, and all residuals stay finite."""

from __future__ import annotations

import pytest
import torch
from helpers import Cluster, assert_conserved, assert_restored, gradient, plan, same_bits
from hypothesis import given
from hypothesis import strategies as st

from sparsecomm.compress import ThresholdTopK, TopK
from sparsecomm.types import GRAD_DTYPES, ValueCodec

BAD = (float("nan"), float("inf"), float("-inf"))


def filled(size: int, numel: int) -> Cluster:
    """A cluster with nonzero residuals."""
    cluster = Cluster(size, numel)
    for r, residual in enumerate(cluster.residuals):
        residual.copy_(gradient("normal", numel, torch.float32, 77 + r))
    return cluster


@given(
    size=st.integers(1, 16),
    numel=st.integers(1, 200),
    dtype=st.sampled_from(GRAD_DTYPES),
    bad=st.sampled_from(BAD),
    dense=st.booleans(),
    codec=st.sampled_from(ValueCodec),
    threshold=st.booleans(),
    where=st.integers(0, 10**6),
)
def test_one_bad_element_on_one_rank_makes_every_bucket_nan_and_restores_residuals(
    size: int, numel: int, dtype: torch.dtype, bad: float, dense: bool, codec: ValueCodec, threshold: bool, where: int
) -> None:
    cluster = filled(size, numel)
    before = [r.clone() for r in cluster.residuals]
    grads = [gradient("normal", numel, dtype, r) for r in range(size)]
    culprit = where % size
    grads[culprit][where % numel] = bad
    sent = [g.clone() for g in grads]
    compressor = ThresholdTopK(0.1) if threshold else TopK(0.1)
    reports = cluster.step(grads, plan(numel, compressor=compressor, dense=dense, value_codec=codec))
    assert [r.nonfinite for r in reports] == [int(r == culprit) for r in range(size)]
    for g in grads:
        assert bool(g.isnan().all())
        assert same_bits(g, grads[0])
    assert_restored(cluster.residuals, before, sent)


@pytest.mark.parametrize("dense", [False, True])
def test_the_step_after_a_bad_one_conserves_as_if_it_had_not_been(dense: bool) -> None:
    size, numel = 3, 64
    cluster = filled(size, numel)
    bad = [gradient("normal", numel, torch.float32, r) for r in range(size)]
    bad[2][5] = float("inf")
    cluster.step(bad, plan(numel, dense=dense))
    before = [r.clone() for r in cluster.residuals]
    grads = [gradient("normal", numel, torch.float32, 10 + r) for r in range(size)]
    applied = [g.clone() for g in grads]
    cluster.step(applied, plan(numel, dense=dense, step=1))
    assert_conserved(grads, before, applied[0], cluster.residuals)


@pytest.mark.parametrize("dense", [False, True])
def test_a_sum_that_overflows_counts_as_non_finite_and_is_undone(dense: bool) -> None:
    """Gradient and residual are finite, but not their sum. The kernel does not change such a residual; nor may undo."""
    cluster = filled(2, 10)
    cluster.residuals[0][3] = 3e38
    before = [r.clone() for r in cluster.residuals]
    grads = [gradient("normal", 10, torch.float32, r) for r in range(2)]
    grads[0][3] = 3e38
    sent = [g.clone() for g in grads]
    cluster.step(grads, plan(10, dense=dense))
    assert all(bool(g.isnan().all()) for g in grads)
    assert_restored(cluster.residuals, before, sent)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", GRAD_DTYPES)
def test_dense_without_residual_is_non_finite_in_the_same_bits_on_all_ranks(
    bad: float, size: int, dtype: torch.dtype
) -> None:
    cluster = Cluster(size, 20, residual=False)
    grads = [gradient("normal", 20, dtype, r) for r in range(size)]
    grads[size - 1][7] = bad
    cluster.step(grads, plan(20, dense=True))
    assert not bool(grads[0][7].isfinite())
    assert all(same_bits(g, grads[0]) for g in grads)


def test_every_element_bad_on_every_rank() -> None:
    cluster = filled(3, 40)
    before = [r.clone() for r in cluster.residuals]
    grads = [torch.full((40,), float("nan"), dtype=torch.float32) for _ in range(3)]
    reports = cluster.step(grads, plan(40))
    assert [r.nonfinite for r in reports] == [40] * 3
    assert all(same_bits(r, b) for r, b in zip(cluster.residuals, before, strict=True))
