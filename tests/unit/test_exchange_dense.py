"""Dense exchanges in 16 bits: the rounding of every hop goes to the residual of some rank."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
from helpers import Cluster, assert_conserved, assert_restored, gradient, plan, same_bits
from hypothesis import given
from hypothesis import strategies as st

import sparsecomm as sc
from sparsecomm.collectives import DenseAlgorithm
from sparsecomm.collectives import allreduce as dense
from sparsecomm.errors import CollectiveMismatch
from sparsecomm.feedback import Empty
from sparsecomm.types import GRAD_DTYPES, ValueCodec

ALGORITHMS = [DenseAlgorithm.RING, DenseAlgorithm.HALVING]
"""The algorithms that round. Buckets this short would otherwise use doubling, in 32 bits."""
HALVES = [ValueCodec.FP16, ValueCodec.BF16, ValueCodec.INT8]


def forced(algorithm: DenseAlgorithm) -> AbstractContextManager[object]:
    """Makes every dense exchange use one algorithm."""
    return mock.patch.object(dense, "choose_dense", return_value=algorithm)


@given(
    ranks=st.integers(1, 16),
    numel=st.integers(1, 200),
    dtype=st.sampled_from(GRAD_DTYPES),
    codec=st.sampled_from(HALVES),
    kind=st.sampled_from(["normal", "ties", "wide", "denormal"]),
    held=st.booleans(),
    grad_scale=st.sampled_from([1.0, 512.0]),
    algorithm=st.sampled_from(ALGORITHMS),
)
def test_nothing_is_lost_over_several_steps(
    ranks: int,
    numel: int,
    dtype: torch.dtype,
    codec: ValueCodec,
    kind: str,
    held: bool,
    grad_scale: float,
    algorithm: DenseAlgorithm,
) -> None:
    cluster = Cluster(ranks, numel)
    aside = numel // 2 if held else 0  # memory of unused parameters is not sent, and must come back
    for step in range(3):
        before = [r.clone() for r in cluster.residuals]
        for b in before:
            b[:aside] = 0.0
        kept = [r[:aside].clone() for r in cluster.residuals]
        grads = [(gradient(kind, numel, torch.float32, 100 * step + r) * grad_scale).to(dtype) for r in range(ranks)]
        for grad in grads:
            grad[:aside] = 0.0
        arrived = [g.float() / grad_scale for g in grads]
        how = plan(numel, dense=True, step=step, value_codec=codec, unused=((0, aside),), grad_scale=grad_scale)
        with forced(algorithm):
            cluster.step(grads, how)
        assert all(same_bits(g, grads[0]) for g in grads)
        if not bool(grads[0].isfinite().all()):
            return  # out of the range of float16: the step is skipped, and other tests check that
        for residual, aside_before in zip(cluster.residuals, kept, strict=True):
            residual[:aside] -= aside_before
        assert_conserved(arrived, before, grads[0] / grad_scale, cluster.residuals)
        for residual, aside_before in zip(cluster.residuals, kept, strict=True):
            residual[:aside] += aside_before


@pytest.mark.parametrize("codec", HALVES)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_rounding_drops_comes_back_later(codec: ValueCodec, ranks: int, algorithm: DenseAlgorithm) -> None:
    """The mean of the applied steps converges to a constant gradient that 16 bits cannot represent."""
    numel, steps = 64, 64
    cluster = Cluster(ranks, numel)
    exact = gradient("normal", numel, torch.float32, 3)
    applied = torch.zeros(numel, dtype=torch.float64)
    once = 0.0
    for step in range(steps):
        grads = [exact.clone() for _ in range(ranks)]
        with forced(algorithm):
            cluster.step(grads, plan(numel, dense=True, step=step, value_codec=codec))
        applied += grads[0].double()
        once = max(once, float((grads[0].double() - exact.double()).abs().max()))
    assert once > 1e-5, "this test is of gradients that are rounded"
    assert float((applied / steps - exact.double()).abs().max()) < 4 * once / steps


def test_without_a_residual_rounding_is_forgotten_and_nan_travels() -> None:
    cluster = Cluster(3, 40, residual=False)
    grads = [gradient("normal", 40, torch.float32, r) for r in range(3)]
    exact = torch.stack([g.double() for g in grads]).mean(0)
    grads[2][5] = float("nan")
    with forced(DenseAlgorithm.RING):
        cluster.step(grads, plan(40, dense=True, value_codec=ValueCodec.BF16))
    assert all(same_bits(g, grads[0]) for g in grads)
    assert grads[0].isnan().nonzero().flatten().tolist() == [5]
    exact[5] = grads[0][5] = 0.0
    assert float((grads[0].double() - exact).abs().max()) > 1e-4
    assert float((grads[0].double() - exact).abs().max()) < 0.05


def test_an_overflow_in_a_16_bit_step_restores_the_residual() -> None:
    cluster = Cluster(2, 10)
    for r, residual in enumerate(cluster.residuals):
        residual.copy_(gradient("normal", 10, torch.float32, r))
    before = [r.clone() for r in cluster.residuals]
    grads = [torch.full((10,), 60_000.0, dtype=torch.float16) for _ in range(2)]
    sent = [g.clone() for g in grads]
    for residual in cluster.residuals:
        residual[3] += 50_000.0
    before = [r.clone() for r in cluster.residuals]
    reports = cluster.step(grads, plan(10, dense=True, value_codec=ValueCodec.FP16))
    assert [r.skipped for r in reports] == [1, 1]
    assert all(bool(g.isnan().all()) for g in grads)
    assert_restored(cluster.residuals, before, sent)


def test_ranks_that_disagree_on_how_values_travel_say_so() -> None:
    cluster = Cluster(3, 10)
    plans = [plan(10, dense=True, value_codec=c) for c in (ValueCodec.FP32, ValueCodec.FP16, ValueCodec.FP32)]
    for outcome in cluster.exchange([torch.ones(10, dtype=torch.float32) for _ in range(3)], plans):
        assert isinstance(outcome, CollectiveMismatch)
        assert "rank 1: value_codec = FP16" in str(outcome)


def test_options_say_how_dense_values_travel() -> None:
    how = {"auto": "FP32", "int8": "FP32", "fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}
    for name, codec in how.items():
        assert sc.SparseState(sc.Dense(), value_codec=name).config.dense_values.name == codec
    assert sc.SparseState(sc.Dense()).config.dense_values == ValueCodec.FP32
    assert sc.SparseState(sc.TopK(0.1)).config.values == ValueCodec.FP16


@given(
    ranks=st.integers(1, 5),
    numel=st.integers(1, 300),
    kinds=st.lists(st.sampled_from(["sparse", "dense", "dense16"]), min_size=2, max_size=8),
    held=st.booleans(),
    final=st.booleans(),
)
def test_sparse_and_dense_steps_in_any_order_lose_nothing(
    ranks: int, numel: int, kinds: list[str], held: bool, final: bool
) -> None:
    """A residual that a dense step has emptied is bypassed until it is nonzero again."""
    cluster = Cluster(ranks, numel)
    aside = numel // 3 if held else 0
    for step, kind in enumerate(kinds):
        before = [r.clone() for r in cluster.residuals]
        grads = [gradient("normal", numel, torch.float32, 100 * step + r) for r in range(ranks)]
        for grad in grads:
            grad[:aside] = 0.0
        arrived = [g.clone() for g in grads]
        codec = ValueCodec.FP16 if kind == "dense16" else ValueCodec.FP32
        how = plan(numel, dense=kind != "sparse", step=step, value_codec=codec, unused=((0, aside),) if held else ())
        cluster.step(grads, how, final=final)
        for bucket in cluster.buckets:
            bucket.finish_step()
        assert all(same_bits(g, grads[0]) for g in grads)
        if kind == "dense" and not held:
            assert all(
                b.empty is Empty.HERE and not b.residual.any() for b in cluster.buckets if b.residual is not None
            )
        assert_conserved(arrived, before, grads[0], cluster.residuals)


def test_an_empty_residual_is_not_touched_and_the_sum_is_made_in_place() -> None:
    cluster = Cluster(2, 50)
    for step in range(3):
        grads = [gradient("normal", 50, torch.float32, 10 * step + r) for r in range(2)]
        exact = (grads[0] + grads[1]) / 2
        versions = [r._version for r in cluster.residuals]
        cluster.step(grads, plan(50, dense=True, step=step, value_codec=ValueCodec.FP32))
        assert same_bits(grads[0], exact)
        if step:
            assert [r._version for r in cluster.residuals] == versions


@pytest.mark.parametrize("emptied", [False, True])
def test_a_step_that_the_optimizer_skips_leaves_an_empty_residual_empty(emptied: bool) -> None:
    cluster = Cluster(2, 30, residual=emptied)
    if emptied:
        cluster.step(
            [torch.ones(30, dtype=torch.float32), torch.ones(30, dtype=torch.float32)],
            plan(30, dense=True, value_codec=ValueCodec.FP32),
        )
    grads = [gradient("normal", 30, torch.float32, r) for r in range(2)]
    cluster.step(grads, plan(30, dense=True, step=1, value_codec=ValueCodec.FP32), final=False)
    for bucket in cluster.buckets:
        bucket.finish_step(skipped=True)
    assert not emptied or not any(bool(r.any()) for r in cluster.residuals)


@pytest.mark.parametrize("emptied", [False, True])
def test_nan_is_reported_where_other_buckets_depend_on_it(emptied: bool) -> None:
    """A GradScaler skips the whole step, so the elements that other buckets have sent must come back."""
    cluster = Cluster(3, 40, residual=emptied)
    if emptied:
        cluster.step(
            [torch.ones(40, dtype=torch.float32) for _ in range(3)], plan(40, dense=True, value_codec=ValueCodec.FP32)
        )
    grads = [gradient("normal", 40, torch.float32, r) for r in range(3)]
    grads[1][7] = float("inf")
    reports = cluster.step(grads, plan(40, dense=True, step=1, value_codec=ValueCodec.FP32), final=False)
    assert [r.skipped for r in reports] == [1, 1, 1]
    assert all(bool(g.isnan().all()) for g in grads)
    assert not emptied or not any(bool(r.any()) for r in cluster.residuals)
