"""Scales, overflows and skipped steps on simulated ranks: residuals stay in unscaled units and nothing is lost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import Cluster, gradient, plan, same_bits, total
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsecomm as sc
from sparsecomm.exchange import exchange
from sparsecomm.feedback import MomentumCorrection
from sparsecomm.types import ValueCodec

N = 64


@dataclass(frozen=True)
class Turn:
    """A step: its loss scale, and the rank whose gradient is bad (None for none)."""

    scale: float
    bad_rank: int | None
    bad: float


turns = st.lists(
    st.builds(
        Turn,
        scale=st.sampled_from([2.0**-8, 1.0, 3.0, 2.0**16]),
        bad_rank=st.none() | st.integers(0, 3),
        bad=st.sampled_from([math.inf, -math.inf, math.nan]),
    ),
    min_size=1,
    max_size=6,
)


@given(
    turns=turns,
    size=st.integers(1, 4),
    dense=st.booleans(),
    codec=st.sampled_from(ValueCodec),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40)
def test_overflows_and_scales_in_any_order_lose_nothing(
    turns: list[Turn], size: int, dense: bool, codec: ValueCodec, dtype: torch.dtype
) -> None:
    cluster = Cluster(size, N)
    came_in = torch.zeros(N, dtype=torch.float64)
    went_out = torch.zeros(N, dtype=torch.float64)
    for step, turn in enumerate(turns):
        grads = [(gradient("normal", N, torch.float32, 10 * step + r) * turn.scale).to(dtype) for r in range(size)]
        skipped = turn.bad_rank is not None and turn.bad_rank < size
        if skipped:
            grads[turn.bad_rank or 0][step] = turn.bad
        else:
            came_in += total(grads) / turn.scale
        reports = cluster.step(grads, plan(N, step=step, dense=dense, grad_scale=turn.scale, value_codec=codec))
        assert all(same_bits(g, grads[0]) for g in grads), "all ranks skip, or none"
        if skipped and dense and codec == ValueCodec.FP32 and step:
            # The residual is empty, nothing has to be undone: NaN may travel as in plain DDP.
            assert not bool(grads[0][step].isfinite())
            continue
        assert [r.skipped for r in reports] == [int(skipped)] * size
        if skipped:
            assert bool(grads[0].isnan().all())
        else:
            went_out += size * grads[0].double() / turn.scale
    tolerance = 1e-4 if dtype == torch.float32 else len(turns) * size * 0.05
    torch.testing.assert_close(went_out + total(cluster.residuals), came_in, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("nesterov", [None, False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_overflow_leaves_all_memory_as_it_was(dense: bool, nesterov: bool | None, bad: float) -> None:
    feedback = {} if nesterov is None else {"feedback": MomentumCorrection(0.9, nesterov=nesterov)}
    cluster = Cluster(3, N)
    if nesterov is not None:
        for bucket in cluster.buckets:
            bucket.velocity = torch.zeros(N, dtype=torch.float32)
    for step in range(3):
        cluster.step(
            [gradient("normal", N, torch.float32, 10 * step + r) for r in range(3)], plan(N, step=step, **feedback)
        )
    memory = [t for b in cluster.buckets for t in (b.residual, b.velocity) if t is not None]
    before = [t.clone() for t in memory]
    grads = [gradient("normal", N, torch.float32, 50 + r) * 256 for r in range(3)]
    grads[1][7] = bad
    cluster.step(grads, plan(N, step=3, dense=dense, grad_scale=256.0, **feedback))
    for now, then in zip(memory, before, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-5)


def unsettled_step(cluster: Cluster, grads: list[torch.Tensor], chosen: Any) -> None:
    """Exchanges, and leaves it open whether the optimizer takes the step."""
    cluster.world.run(
        lambda c: exchange(
            c, cluster.buckets[c.rank], grads[c.rank], replace(chosen, final=False), cluster.arenas[c.rank]
        )
    )


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("masking", [None, False, True])
@pytest.mark.parametrize("codec", ValueCodec)
def test_settling_late_is_settling_at_once(dense: bool, masking: bool | None, codec: ValueCodec) -> None:
    feedback = {} if masking is None else {"feedback": MomentumCorrection(0.9, masking=masking)}
    late, once = Cluster(2, N), Cluster(2, N)
    for cluster in (late, once):
        if masking is not None:
            for bucket in cluster.buckets:
                bucket.velocity = torch.zeros(N, dtype=torch.float32)
    for step in range(4):
        chosen = plan(N, step=step, dense=dense, value_codec=codec, unused=((8, 16),) if step == 2 else (), **feedback)
        pairs = []
        for cluster, run in ((late, unsettled_step), (once, Cluster.step)):
            grads = [gradient("normal", N, torch.float32, 10 * step + r) for r in range(2)]
            for g in grads:
                g[8:16] *= step != 2
            run(cluster, grads, chosen)
            pairs.append(grads)
        assert all(same_bits(a, b) for a, b in zip(*pairs, strict=True))
        if step != 1:  # the next exchange settles what nobody did
            for bucket in late.buckets:
                bucket.finish_step()
    for a, b in zip(late.buckets, once.buckets, strict=True):
        for mine, other in ((a.residual, b.residual), (a.velocity, b.velocity)):
            assert (mine is None) == (other is None)
            assert mine is None or other is None or same_bits(mine, other)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("masking", [None, False, True])
def test_a_step_taken_back_can_be_taken_again_with_nothing_lost(dense: bool, masking: bool | None) -> None:
    """What was sent and not applied must come back, masked velocity included."""
    feedback = {} if masking is None else {"feedback": MomentumCorrection(0.5, masking=masking)}
    cluster = Cluster(2, N)
    if masking is not None:
        for bucket in cluster.buckets:
            bucket.velocity = torch.zeros(N, dtype=torch.float32)
    grads = [gradient("normal", N, torch.float32, r) for r in range(2)]
    cluster.step([g.clone() for g in grads], plan(N, step=0, **feedback))
    left = total(cluster.residuals)
    unsettled_step(cluster, [g.clone() for g in grads], plan(N, step=1, dense=dense, **feedback))
    for bucket in cluster.buckets:
        bucket.finish_step(skipped=True)
    back = total(cluster.residuals) - left
    given = total(grads) if masking is None else total([b.velocity for b in cluster.buckets if b.velocity is not None])
    allowed = [
        torch.zeros(N, dtype=torch.float64),
        given,
    ]  # as if it had never been, or kept for later; never in between
    assert any(torch.allclose(back, a, rtol=1e-4, atol=1e-5) for a in allowed)
    for bucket in cluster.buckets:
        bucket.finish_step(skipped=True)  # twice is once
    assert torch.allclose(total(cluster.residuals) - left, back)


def test_only_scalers_are_taken_for_scalers() -> None:
    for wrong in (1024.0, "cpu", object(), torch.tensor(2.0, dtype=torch.float32)):
        with pytest.raises(sc.ConfigError, match="GradScaler"):
            sc.SparseState(sc.TopK(0.1), scaler=wrong)  # type: ignore[arg-type]


def test_a_scaler_may_come_after_the_state_and_before_the_first_step() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    state = sc.SparseState(sc.TopK(0.1))
    state.attach_scaler(scaler)
    assert state._scaling.grad_scale() == 64.0
    other = torch.amp.GradScaler("cpu", init_scale=8.0)
    state.attach_scaler(other)
    assert state._scaling.grad_scale() == 8.0
    state.attach_scaler(torch.amp.GradScaler("cpu", enabled=False))
    assert state._scaling.grad_scale() == 1.0


@pytest.mark.parametrize("scale", [1.0, 1024.0, 1000.0])
@pytest.mark.parametrize("codec", [ValueCodec.FP32, ValueCodec.FP16])
@pytest.mark.parametrize("before", ["two_level", "unused"])
def test_a_dense_step_is_right_where_only_some_ranks_have_something_left_over(
    before: str, codec: ValueCodec, scale: float
) -> None:
    """A rank with an empty residual sums its gradient, another its residual: both must be in the same units."""
    cluster = Cluster(4, N, nodes=[0, 0, 1, 1])
    if before == "unused":
        cluster.residuals[1][:2] = 1.0
    common: dict[str, Any] = {"grad_scale": scale, "final": False}
    name, unused = ("two_level", ()) if before == "two_level" else ("dense", ((0, 2),))
    first = [gradient("normal", N, torch.float32, r) * scale for r in range(4)]
    if before == "unused":
        for grad in first:
            grad[:2] = 0.0
    plans = [plan(N, density=0.5, collective=name, step=0, **common)] * 4
    plans[1] = replace(plans[1], unused=unused)
    cluster.world.run(
        lambda c: exchange(c, cluster.buckets[c.rank], first[c.rank], plans[c.rank], cluster.arenas[c.rank])
    )
    for bucket in cluster.buckets:
        bucket.finish_step()
    residuals = [r.clone() for r in cluster.residuals]
    assert len({bool(r.any()) for r in residuals}) == 2, "else this proves nothing"
    grads = [gradient("normal", N, torch.float32, 10 + r) * scale for r in range(4)]
    given = [g / scale for g in grads]
    how = plan(N, dense=True, step=1, value_codec=codec, **common)
    cluster.world.run(lambda c: exchange(c, cluster.buckets[c.rank], grads[c.rank], how, cluster.arenas[c.rank]))
    for bucket in cluster.buckets:
        bucket.finish_step()
    assert all(torch.equal(g, grads[0]) for g in grads)
    came = sum(t.double() for t in (*given, *residuals))
    went = 4 * grads[0].double() / scale + sum(r.double() for r in cluster.residuals)
    assert torch.allclose(came, went, rtol=1e-5, atol=1e-5)
