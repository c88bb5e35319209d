"""Gradients that are finite, and whose sum is not: every way of exchanging takes the step back, alike on all ranks."""

from __future__ import annotations

import pytest
import torch
from test_default_dtype import COMPRESSORS
from training import assert_replicas_equal, flat, gathered, grad_of, loss_of, mlp, residual_of, wrap

import sparsecomm as sc
from sparsecomm.exchange.method import methods

HUGE = 3e38


@pytest.mark.parametrize("values", ["fp32", "int8"])
@pytest.mark.parametrize("collective", methods())
def test_a_sum_that_is_not_finite_is_taken_back(world: sc.World, collective: str, values: str) -> None:
    if world.size == 1:
        pytest.skip("the sum of one finite gradient is finite")
    compressor = next((c for c in COMPRESSORS.values() if collective in c.collectives), sc.TopK(0.2))
    state = sc.SparseState(compressor, collective=collective, value_codec=values)
    ddp = wrap(mlp(), state)
    for step in range(6):
        before = residual_of(state, ddp)
        ddp.zero_grad()
        huge = ddp.module[0].weight.register_hook(lambda g: torch.full_like(g, HUGE)) if step == 3 else None
        loss_of(ddp, step).backward()
        if huge is not None:
            huge.remove()
        averages = flat(ddp, grad_of)
        kept = residual_of(state, ddp)
        assert bool(kept.isfinite().all())
        assert all(torch.equal(a.isfinite(), averages.isfinite()) for a in gathered(averages))
        if step == 3 and not bool(averages.isfinite().all()):
            bad = ~averages.isfinite()
            rounding = HUGE * torch.finfo(torch.float32).eps  # of residual + gradient - gradient
            assert bool(((kept - before)[bad].abs() <= rounding).all())
        if step == 3 and collective not in ("dense", "native", "sign", "powersgd"):
            assert not bool(averages.isfinite().all())
        if step > 3:
            assert bool(averages.isfinite().all())
    assert_replicas_equal(ddp)
    assert state.residual_norm() < HUGE
