"""Momentum correction, loss scales, unused parameters and float16 overflow: the same invariants with moments."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Cluster, gradient, plan, same_bits, total
from hypothesis import given
from hypothesis import strategies as st

from sparsecomm.errors import CollectiveMismatch
from sparsecomm.feedback import Clipping, MomentumCorrection
from sparsecomm.types import ValueCodec

N = 80


def with_velocity(size: int, numel: int = N) -> Cluster:
    cluster = Cluster(size, numel)
    for bucket in cluster.buckets:
        bucket.velocity = torch.zeros(numel, dtype=torch.float32)
    return cluster


def velocities(cluster: Cluster) -> list[torch.Tensor]:
    return [b.velocity for b in cluster.buckets if b.velocity is not None]


def sgd_reference(grads: list[torch.Tensor], options: MomentumCorrection) -> list[torch.Tensor]:
    """The output of momentum for each gradient, in float64."""
    velocity, out = torch.zeros_like(grads[0], dtype=torch.float64), []
    for g in grads:
        if options.nesterov:
            velocity = options.momentum * (velocity + g)
            out.append(velocity + g)
        else:
            velocity = options.momentum * velocity + g
            out.append(velocity)
    return out


@given(
    size=st.integers(1, 6),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    nesterov=st.booleans(),
    density=st.sampled_from([0.05, 0.3]),
    codec=st.sampled_from(ValueCodec),
)
def test_without_masking_the_accumulated_velocities_are_conserved(
    size: int, momentum: float, nesterov: bool, density: float, codec: ValueCodec
) -> None:
    options = MomentumCorrection(momentum=momentum, nesterov=nesterov, masking=False)
    cluster = with_velocity(size)
    grads = [[gradient("normal", N, torch.float32, 10 * s + r) for r in range(size)] for s in range(5)]
    came_in = total([t for r in range(size) for t in sgd_reference([g[r] for g in grads], options)])
    went_out = torch.zeros(N, dtype=torch.float64)
    for step, each in enumerate(grads):
        applied = [g.clone() for g in each]
        cluster.step(applied, plan(N, density=density, step=step, feedback=options, value_codec=codec))
        assert all(same_bits(a, applied[0]) for a in applied)
        went_out += size * applied[0].double()
    torch.testing.assert_close(went_out + total(cluster.residuals), came_in, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_sending_everything_is_momentum_of_the_mean(nesterov: bool, dense: bool) -> None:
    options = MomentumCorrection(momentum=0.9, nesterov=nesterov, masking=False)
    cluster = with_velocity(3)
    steps = [[gradient("normal", N, torch.float32, 10 * s + r) for r in range(3)] for s in range(4)]
    expected = sgd_reference([total(s) / 3 for s in steps], options)
    for step, (grads, want) in enumerate(zip(steps, expected, strict=True)):
        cluster.step(grads, plan(N, density=1.0, dense=dense, step=step, feedback=options))
        torch.testing.assert_close(grads[0].double(), want, rtol=1e-4, atol=1e-5)


def test_masking_zeroes_the_velocity_exactly_where_something_was_sent() -> None:
    cluster = with_velocity(2)
    cluster.step([gradient("normal", N, torch.float32, r) for r in range(2)], plan(N, feedback=MomentumCorrection()))
    for residual, velocity in zip(cluster.residuals, velocities(cluster), strict=True):
        assert torch.equal(velocity == 0, residual == 0)
        assert int((velocity == 0).sum()) == 8


@pytest.mark.parametrize("clip", [1e-3, 1.0, 1e9])
def test_clipping_bounds_the_norm_and_leaves_small_gradients_alone(clip: float) -> None:
    cluster = with_velocity(1)
    grad = gradient("normal", N, torch.float32, 1)
    norm = float(grad.norm())
    cluster.step(
        [applied := grad.clone()], plan(N, density=1.0, feedback=MomentumCorrection(), clipping=Clipping(clip))
    )
    torch.testing.assert_close(applied, grad * min(1.0, clip / norm), rtol=1e-5, atol=1e-7)


@given(st.floats(0.1, 10.0), st.floats(0.0, 10.0), st.floats(0.01, 1.0), st.floats(0.0, 100.0))
def test_a_rank_counts_its_own_norm_in_part(limit: float, usual: float, own: float, norm: float) -> None:
    factor = Clipping(limit, usual, own).factor(norm)
    assert 0.0 < factor <= 1.0
    assert factor == 1.0 or factor * math.sqrt((1.0 - own) * usual + own * norm**2) == pytest.approx(limit)
    assert Clipping(limit, usual, own).factor(math.sqrt(usual)) == pytest.approx(
        Clipping(limit).factor(math.sqrt(usual))
    )


def test_ranks_together_come_close_to_clipping_the_average() -> None:
    """Eight ranks whose gradients are noise, and whose norms vary from step to step, each by itself."""
    ranks, steps, limit = 8, 400, 1.0
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(steps, ranks, 500, generator=generator, dtype=torch.float32) / 500**0.5
    grads *= 3.0 * torch.randn(steps, ranks, 1, generator=generator, dtype=torch.float32).mul(0.7).exp()
    usual = float(grads.square().sum(2).mean())
    mean = grads.mean(1)
    dense = mean * (limit / mean.norm(dim=1, keepdim=True)).clamp(max=1.0)

    def error(clipping: Clipping) -> float:
        factors = torch.tensor(
            [[clipping.factor(float(g.norm())) for g in step] for step in grads], dtype=torch.float32
        )
        return float(((grads * factors[..., None]).mean(1) - dense).square().sum() / dense.square().sum())

    alignment = 1.0 / ranks
    by_itself = error(Clipping(limit / alignment**0.5))
    together = error(Clipping(limit / alignment**0.5, usual, own=alignment))
    assert together < 0.5 * by_itself


@given(
    st.sampled_from([0.0, 0.5, 0.9]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["nan", "disagree", "lost"]),
)
def test_a_failed_step_restores_residual_and_velocity(momentum: float, nesterov: bool, dense: bool, how: str) -> None:
    options = MomentumCorrection(momentum=momentum, nesterov=nesterov)
    cluster = with_velocity(3)
    for step in range(2):
        cluster.step(
            [gradient("normal", N, torch.float32, 10 * step + r) for r in range(3)],
            plan(N, step=step, feedback=options, dense=dense),
        )
    before = [t.clone() for t in [*cluster.residuals, *velocities(cluster)]]
    grads = [gradient("normal", N, torch.float32, 50 + r) for r in range(3)]
    plans = [plan(N, step=2, feedback=options, dense=dense) for _ in range(3)]
    if how == "nan":
        grads[1][3] = math.nan
    elif how == "disagree":
        plans[1] = plan(N, step=3, feedback=options, dense=dense)
    else:
        cluster.world.tamper = lambda source, dest, message: None
    outcomes = cluster.exchange(grads, plans)
    if how == "disagree":
        assert all(isinstance(o, CollectiveMismatch) for o in outcomes)
    for now, then in zip(cluster.residuals, before[:3], strict=True):
        torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-5)
    if momentum:  # with momentum 0 the velocity is the last gradient, which the next step ignores
        for now, then in zip(velocities(cluster), before[3:], strict=True):
            torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_residuals_are_in_unscaled_units(dtype: torch.dtype, dense: bool) -> None:
    """A GradScaler multiplies gradients. When its scale changes, residuals must keep their meaning."""
    cluster, unscaled = Cluster(2, N), Cluster(2, N)
    for step, scale in enumerate([1024.0, 512.0, 64.0]):
        true = [gradient("normal", N, torch.float32, 10 * step + r).to(dtype).float() for r in range(2)]
        scaled = [(t * scale).to(dtype) for t in true]
        cluster.step(scaled, plan(N, step=step, grad_scale=scale, dense=dense))
        plain = [t.clone() for t in true]
        unscaled.step(plain, plan(N, step=step, dense=dense))
        tolerance = max(1e-5, 2 * torch.finfo(dtype).eps)
        torch.testing.assert_close(scaled[0].float() / scale, plain[0], rtol=tolerance, atol=tolerance)
    for a, b in zip(cluster.residuals, unscaled.residuals, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dense", [False, True])
def test_memory_of_held_spans_is_neither_sent_nor_changed(dense: bool) -> None:
    cluster = with_velocity(2)
    for tensor in [*cluster.residuals, *velocities(cluster)]:
        tensor.copy_(gradient("normal", N, torch.float32, 3))
    before = [t[10:20].clone() for t in [*cluster.residuals, *velocities(cluster)]]
    grads = [gradient("normal", N, torch.float32, r) for r in range(2)]
    for g in grads:
        g[10:20] = 0.0
    cluster.step(grads, plan(N, density=1.0, dense=dense, unused=((10, 20),), feedback=MomentumCorrection()))
    for now, then in zip([*cluster.residuals, *velocities(cluster)], before, strict=True):
        assert torch.equal(now[10:20], then)
    assert bool((grads[0][10:20] == 0).all())
    assert bool((grads[0][20:] != 0).any())


@pytest.mark.parametrize("dense", [False, True])
def test_an_average_beyond_float16_is_skipped_and_kept(dense: bool) -> None:
    cluster = Cluster(2, 4)
    for residual in cluster.residuals:
        residual.copy_(torch.tensor([60000.0, 1.0, 0.0, -5.0], dtype=torch.float32))
    before = [r.clone() for r in cluster.residuals]
    grads = [torch.tensor([60000.0, 1.0, 2.0, 3.0], dtype=torch.float16) for _ in range(2)]
    cluster.step(grads, plan(4, density=0.5, dense=dense))
    assert all(bool(g.isnan().all()) for g in grads)
    for now, then in zip(cluster.residuals, before, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-6, atol=0.01)
