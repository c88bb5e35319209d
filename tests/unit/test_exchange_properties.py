"""The invariants of one exchanged bucket, for any number of ranks, gradient, compressor and codec."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers import (
    EPS32,
    KINDS,
    Cluster,
    assert_conserved,
    gradient,
    gradients,
    magnitude,
    plan,
    rounding_of,
    same_bits,
    total,
)
from hypothesis import given
from hypothesis import strategies as st

from sparsecomm.compress import Compressor, Dense, ThresholdTopK, TopK
from sparsecomm.types import GRAD_DTYPES, IndexCodec, ValueCodec

INDEX_CODECS = (None, IndexCodec.RICE, IndexCodec.BITPACK, IndexCodec.BITMAP, IndexCodec.RAW)


@dataclass(frozen=True)
class Situation:
    """P ranks with a kind of gradient for each."""

    size: int
    numel: int
    dtype: torch.dtype
    kinds: tuple[str, ...]
    seed: int

    def grads(self, step: int) -> list[torch.Tensor]:
        return gradients(self.kinds, self.size, self.numel, self.dtype, self.seed + 1000 * step)


situations = st.builds(
    Situation,
    size=st.integers(1, 8) | st.integers(9, 16),
    numel=st.sampled_from([1, 2, 3, 7, 127, 128, 129, 300]) | st.integers(1, 400),
    dtype=st.sampled_from(GRAD_DTYPES),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 2**31),
)
densities = st.sampled_from([0.001, 0.01, 0.1, 0.5, 1.0])
compressors = st.one_of(
    densities.map(TopK),
    densities.map(lambda d: ThresholdTopK(d, interval=2)),
    densities.map(lambda d: ThresholdTopK(d)),
)


@given(situations, compressors, st.sampled_from(ValueCodec), st.sampled_from(INDEX_CODECS))
def test_sparse_steps_conserve_and_replicas_agree(
    situation: Situation, compressor: Compressor, value_codec: ValueCodec, index_codec: IndexCodec | None
) -> None:
    cluster = Cluster(situation.size, situation.numel)
    for step in range(4):
        grads = situation.grads(step)
        before = [r.clone() for r in cluster.residuals]
        applied = [g.clone() for g in grads]
        cluster.step(
            applied,
            plan(situation.numel, compressor=compressor, step=step, value_codec=value_codec, index_codec=index_codec),
        )
        assert all(same_bits(applied[0], other) for other in applied[1:])
        assert_conserved(grads, before, applied[0], cluster.residuals)


@given(situations, st.booleans())
def test_dense_steps_conserve_and_replicas_agree(situation: Situation, residual: bool) -> None:
    cluster = Cluster(situation.size, situation.numel, residual=residual)
    for b in cluster.residuals:
        b.copy_(gradient("normal", situation.numel, torch.float32, situation.seed))
    zeros = [torch.zeros(situation.numel, dtype=torch.float32)] * situation.size
    for step in range(2):
        grads = situation.grads(step)
        before = [r.clone() for r in cluster.residuals] or zeros
        applied = [g.clone() for g in grads]
        cluster.step(applied, plan(situation.numel, compressor=Dense(), dense=True, step=step))
        assert all(same_bits(applied[0], other) for other in applied[1:])
        assert all(bool((r == 0).all()) for r in cluster.residuals), "a dense exchange leaves nothing over"
        assert_conserved(grads, before, applied[0], zeros)


@given(situations, st.lists(st.booleans(), min_size=3, max_size=6))
def test_switching_between_sparse_and_dense_conserves(situation: Situation, dense_steps: list[bool]) -> None:
    cluster = Cluster(situation.size, situation.numel)
    for step, dense in enumerate(dense_steps):
        grads = situation.grads(step)
        before = [r.clone() for r in cluster.residuals]
        applied = [g.clone() for g in grads]
        cluster.step(applied, plan(situation.numel, dense=dense, step=step, value_codec=ValueCodec.INT8))
        assert_conserved(grads, before, applied[0], cluster.residuals)


@given(situations, densities, st.sampled_from(ValueCodec))
def test_topk_contracts_on_every_rank(situation: Situation, density: float, value_codec: ValueCodec) -> None:
    """||acc - C(acc)||^2 <= (1 - k/n) ||acc||^2, plus the rounding of values."""
    rounding = {
        ValueCodec.FP32: 0.0,
        ValueCodec.FP16: 2.0**-22,
        ValueCodec.BF16: 2.0**-16,
        ValueCodec.INT8: 128 / 254**2,
    }
    cluster = Cluster(situation.size, situation.numel)
    for step in range(3):
        grads = situation.grads(step)
        accumulated = [(r + g.float()).double() for r, g in zip(cluster.residuals, grads, strict=True)]
        how = plan(situation.numel, density=density, step=step, value_codec=value_codec)
        cluster.step(grads, how)
        for acc, left in zip(accumulated, cluster.residuals, strict=True):
            bound = (1 - how.k / situation.numel + rounding[value_codec]) * float(acc.square().sum())
            denormal = situation.numel * (2.0**-134) ** 2  # half the smallest step of a bf16
            assert float(left.double().square().sum()) <= bound * (1 + 1e-6) + denormal


@given(situations, st.sampled_from([TopK(1.0), ThresholdTopK(1.0), Dense()]), st.sampled_from(INDEX_CODECS))
def test_everything_in_fp32_equals_the_mean(
    situation: Situation, compressor: Compressor, index_codec: IndexCodec | None
) -> None:
    cluster = Cluster(situation.size, situation.numel)
    grads = situation.grads(0)
    applied = [g.clone() for g in grads]
    dense = compressor.is_dense
    cluster.step(applied, plan(situation.numel, compressor=compressor, dense=dense, index_codec=index_codec))
    mean = total(grads) / situation.size
    allowed = (situation.size + 2) * EPS32 * magnitude(grads) / situation.size + rounding_of(situation.dtype, mean)
    assert bool(((applied[0].double() - mean).abs() <= allowed + 2.0**-148).all())


@given(situations)
def test_without_feedback_nothing_is_carried_over(situation: Situation) -> None:
    """With feedback=None a step depends only on the gradients of that step."""
    old, fresh = Cluster(situation.size, situation.numel), Cluster(situation.size, situation.numel)
    how = {"feedback": None, "value_codec": ValueCodec.INT8}
    old.step(situation.grads(0), plan(situation.numel, **how))
    again, first = situation.grads(1), situation.grads(1)
    old.step(again, plan(situation.numel, **how))
    fresh.step(first, plan(situation.numel, **how))
    assert same_bits(again[0], first[0])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_without_feedback_a_dense_step_after_a_sparse_one_is_the_plain_mean(size: int) -> None:
    cluster = Cluster(size, 50)
    cluster.step([gradient("normal", 50, torch.float32, r) for r in range(size)], plan(50, feedback=None))
    grads = [gradient("normal", 50, torch.float32, 100 + r) for r in range(size)]
    applied = [g.clone() for g in grads]
    cluster.step(applied, plan(50, dense=True, step=1, feedback=None))
    torch.testing.assert_close(applied[0].double(), total(grads) / size, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("numel", [1, 2, 4])
def test_buckets_smaller_than_the_world_work(size: int, dense: bool, numel: int) -> None:
    cluster = Cluster(size, numel)
    grads = [torch.full((numel,), float(r + 1), dtype=torch.float32) for r in range(size)]
    cluster.step(grads, plan(numel, density=1.0, dense=dense))
    for g in grads:
        torch.testing.assert_close(g, torch.full((numel,), (size + 1) / 2, dtype=torch.float32))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_all_zero_gradients_send_headers_only(size: int) -> None:
    cluster = Cluster(size, 1000)
    grads = [torch.zeros(1000, dtype=torch.float32) for _ in range(size)]
    reports = cluster.step(grads, plan(1000))
    assert all(bool((g == 0).all()) for g in grads)
    assert [r.nnz for r in reports] == [0] * size
    assert all(r.bytes_sent == 88 * (size - 1) for r in reports)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_one_rank_with_nothing_to_say(size: int) -> None:
    cluster = Cluster(size, 100)
    grads = [
        torch.zeros(100, dtype=torch.float32) if r == 1 else torch.ones(100, dtype=torch.float32) for r in range(size)
    ]
    reports = cluster.step(grads, plan(100, density=1.0))
    assert reports[1].nnz == 0
    assert reports[0].nnz == 100
    torch.testing.assert_close(grads[1], torch.full((100,), (size - 1) / size, dtype=torch.float32))


def test_equal_magnitudes_go_to_the_lowest_indices() -> None:
    cluster = Cluster(2, 100)
    grads = [torch.ones(100, dtype=torch.float32), -torch.ones(100, dtype=torch.float32)]
    cluster.step(grads, plan(100, density=0.1))
    for residual, sign in zip(cluster.residuals, (1.0, -1.0), strict=True):
        assert residual.tolist() == [0.0] * 10 + [sign] * 90


def test_what_a_rank_keeps_back_arrives_later() -> None:
    """With constant gradients and one element per step, every element is applied in full over time."""
    numel, size = 8, 3
    cluster = Cluster(size, numel)
    applied = torch.zeros(numel, dtype=torch.float32)
    for step in range(400):
        grads = [torch.arange(1.0, numel + 1, dtype=torch.float32) * (r + 1) for r in range(size)]
        cluster.step(grads, plan(numel, density=1 / numel, step=step))
        applied += grads[0]
    torch.testing.assert_close(applied / 400, torch.arange(1.0, numel + 1, dtype=torch.float32) * 2, rtol=0.1, atol=0.0)
