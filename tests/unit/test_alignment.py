"""How far ranks agree, and what an average infers from it: conserved, the same on all ranks, undone whole."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import EPS32, Cluster, magnitude, plan, same_bits, total
from hypothesis import given
from hypothesis import strategies as st

import sparsecomm as sc
from sparsecomm.exchange.inferred import infer_sum
from sparsecomm.feedback import Alignment, Feedback, Squares, is_due
from sparsecomm.types import ValueCodec

ALIGNED = sc.MomentumCorrection(momentum=0.0, masking=False, aligned=True)


def aligned_cluster(size: int, numel: int) -> Cluster:
    cluster = Cluster(size, numel)
    for bucket in cluster.buckets:
        bucket.velocity = torch.zeros(numel, dtype=torch.float32)
    return cluster


def mixed(size: int, numel: int, common: float, seed: int) -> list[torch.Tensor]:
    """Gradients with a common part and noise of each rank."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(numel, generator=g, dtype=torch.float32)
    return [
        common * shared + (1.0 - common) * torch.randn(numel, generator=g, dtype=torch.float32) for _ in range(size)
    ]


@given(
    st.integers(1, 9),
    st.sampled_from([1, 2, 100, 600, 2000]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.01, 0.2, 1.0]),
    st.sampled_from(ValueCodec),
)
def test_steps_conserve_and_replicas_agree(
    size: int, numel: int, common: float, density: float, codec: ValueCodec
) -> None:
    cluster = aligned_cluster(size, numel)
    for step in range(4):
        grads = mixed(size, numel, common, 10 * size + step)
        before = [r.clone() for r in cluster.residuals]
        applied = [g.clone() for g in grads]
        cluster.step(
            applied,
            plan(numel, compressor=sc.TopK(density), step=step, value_codec=codec, feedback=ALIGNED),
        )
        assert all(same_bits(applied[0], other) for other in applied[1:])
        assert len({(b.alignment.gradient, b.alignment.residual, b.alignment.count) for b in cluster.buckets}) == 1
        difference = total([*grads, *before]) - size * applied[0].double() - total(cluster.residuals)
        allowed = 8 * (size + 8) * EPS32 * (magnitude([*grads, *before]) + 1.0)
        assert bool((difference.abs() <= allowed).all())


@given(st.integers(2, 5), st.sampled_from([0.3, 1.0]), st.sampled_from([2, 600]))
def test_a_skipped_step_is_undone_whole(size: int, common: float, numel: int) -> None:
    cluster = aligned_cluster(size, numel)
    options = {"compressor": sc.TopK(0.1), "feedback": ALIGNED}
    for step in range(3):
        cluster.step(mixed(size, numel, common, step), plan(numel, step=step, **options))
    before = [r.clone() for r in cluster.residuals]
    cluster.step(mixed(size, numel, common, 99), plan(numel, step=3, **options), final=False)
    for bucket in cluster.buckets:
        bucket.finish_step(skipped=True)
    for now, then in zip(cluster.residuals, before, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("common", "expected"), [(1.0, 1.0), (0.0, 0.25)])
def test_it_is_one_for_equal_gradients_and_1_over_p_for_noise(common: float, expected: float) -> None:
    cluster = aligned_cluster(4, 4000)
    for step in range(20):
        cluster.step(mixed(4, 4000, common, step), plan(4000, compressor=sc.TopK(0.01), step=step, feedback=ALIGNED))
    for bucket in cluster.buckets:
        assert bucket.alignment.of_gradients() == pytest.approx(expected, abs=0.03)
        assert bucket.alignment.of_residuals() == pytest.approx(expected, abs=0.03)


def test_nan_on_one_rank_changes_no_alignment() -> None:
    cluster = aligned_cluster(2, 100)
    grads = mixed(2, 100, 0.5, 0)
    grads[1][3] = math.nan
    cluster.step(grads, plan(100, step=0, feedback=ALIGNED))
    assert [b.alignment.count for b in cluster.buckets] == [0, 0]
    assert all(g.isnan().all() for g in grads)


def pairs(values: dict[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(list(values), dtype=torch.uint32), torch.tensor(list(values.values()), dtype=torch.float32)


def test_residuals_that_agree_are_taken_for_sent() -> None:
    agreed = Alignment(4, 1, residual=Squares(1.0, 1.0))
    found = infer_sum([pairs({2: 1.0}), pairs({2: 3.0, 5: 1.0}), pairs({}), pairs({})], agreed, 4)
    assert found.positions.tolist() == [2, 5]
    assert found.sums.tolist() == [8.0, 4.0], "all four ranks hold the mean of what was sent"
    assert found.expected.tolist() == [2.0, 1.0]
    assert [t.tolist() for t in found.not_sent(0)] == [[5], [1.0]]


def test_residuals_of_noise_tell_nothing() -> None:
    noise = Alignment(4, 1, residual=Squares(0.25, 1.0))
    found = infer_sum([pairs({2: 1.0}), pairs({2: 3.0}), pairs({}), pairs({})], noise, 4)
    assert found.sums.tolist() == [4.0]
    assert found.expected.tolist() == [0.0]
    assert Alignment(4, 0).common_share() == 0.0, "nothing is inferred before anything was measured"
    assert Alignment(4, 1, residual=Squares(0.0, 0.0)).common_share() == 0.0, "nor from the residual before step 0"


def test_an_empty_bucket_is_not_measured() -> None:
    cluster = aligned_cluster(2, 0)
    cluster.step([torch.zeros(0, dtype=torch.float32), torch.zeros(0, dtype=torch.float32)], plan(0, feedback=ALIGNED))
    assert [b.alignment.count for b in cluster.buckets] == [0, 0]


@pytest.mark.parametrize("feedback", [None, sc.ErrorFeedback(), sc.MomentumCorrection()])
def test_it_is_measured_only_where_asked(feedback: Feedback | None) -> None:
    cluster = aligned_cluster(2, 100)
    cluster.step(mixed(2, 100, 0.5, 0), plan(100, feedback=feedback))
    assert [b.alignment.count for b in cluster.buckets] == [0, 0]
    assert sum(is_due(step) for step in range(64)) == 34
