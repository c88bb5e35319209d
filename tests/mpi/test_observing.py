"""What a user can watch and change while training: callbacks, last step, buckets, live options, loss scaling."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from training import assert_replicas_equal, flat, loss_of, mlp, residual_of, summed, train, wrap

import sparsecomm as sc
from sparsecomm.ddp import convergence


def test_callbacks_see_every_step_once_and_in_order(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(0.1), collective="allgather")
    seen: list[tuple[int, sc.Metrics]] = []
    state.on_step(lambda step, metrics: seen.append((step, metrics)))
    ddp = wrap(mlp(), state)
    for _ in train(ddp, 5):
        pass
    assert [step for step, _ in seen] == list(range(5))
    assert all(m.steps == 1 for _, m in seen)
    assert sum(m.bytes_sent for _, m in seen) == state.metrics().bytes_sent
    assert state.last_step() == seen[-1][1]
    assert sum(r.numel for r in state.buckets().values()) == sum(p.numel() for p in ddp.parameters())
    assert all(r.step == 4 for r in state.buckets().values())


def test_the_norm_of_the_residual_is_that_of_the_checkpoint(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(0.1), collective="allgather")
    ddp = wrap(mlp(), state)
    assert state.residual_norm() == 0.0
    for _ in train(ddp, 3):
        pass
    assert math.isclose(state.residual_norm(), float(residual_of(state, ddp).norm()), rel_tol=1e-6)


@pytest.mark.parametrize("options", [{}, {"fuse_bytes": 1 << 30}, {"value_codec": "int8"}], ids=str)
def test_signs_of_convergence(world: sc.World, options: dict[str, Any]) -> None:
    state = sc.SparseState(sc.TopK(0.1), collective="allgather", **options)
    ddp = wrap(mlp(), state)
    assert state.convergence() is None
    for _ in train(ddp, 65, momentum=0.0):
        pass
    found = state.convergence()
    assert found is not None
    assert found.steps in (64, 65), "DDP rebuilds its buckets after the first step"
    assert 0.5 < found.residual_ratio < 20
    assert 1.0 <= found.mean_age <= found.p90_age <= found.steps
    assert 0.0 <= found.never_sent < 0.9
    assert state.explain().splitlines()[-1] == f"convergence: {found}"
    state.load_state_dict(state.state_dict())
    assert state.convergence() is None
    for _ in train(ddp, 1):
        pass
    again = state.convergence()
    assert again is not None
    assert again.steps == 1
    state.update(sc.Dense())
    for _ in train(ddp, 1):
        pass
    assert state.convergence() is None


def test_rank_0_warns_once_of_slow_convergence(world: sc.World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "CHECK_EVERY", 2)
    monkeypatch.setattr(convergence, "MOST_AGE", 0.01)
    state = sc.SparseState(sc.TopK(0.5), collective="allgather")
    ddp = wrap(mlp(), state)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in train(ddp, 20):
            assert_replicas_equal(ddp)
    texts = [str(w.message) for w in heard if "slow convergence" in str(w.message)]
    assert len(texts) == (world.rank == 0)


def test_options_changed_while_training_take_effect_and_lose_nothing(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(0.01), collective="allgather", value_codec="fp32")
    ddp = wrap(mlp(), state)
    for _ in train(ddp, 3):
        pass
    sparse = state.last_step().density
    before = summed(residual_of(state, ddp))
    state.update(sc.ThresholdTopK(0.5), value_codec="int8")
    assert torch.equal(summed(residual_of(state, ddp)), before)
    for _ in train(ddp, 2, first=3):
        assert_replicas_equal(ddp)
    assert state.last_step().density > 10 * sparse
    state.update(sc.TopK(1.0), value_codec="fp32")
    for _ in train(ddp, 1, first=5):
        pass
    assert state.residual_norm() == 0.0, "everything was sent"


def test_loss_scaling_by_powers_of_two_changes_nothing(world: sc.World) -> None:
    plain_state = sc.SparseState(sc.TopK(0.1), value_codec="fp32", collective="allgather")
    plain = wrap(mlp(), plain_state)
    for _ in train(plain, 6, momentum=0.0):
        pass
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    state = sc.SparseState(sc.TopK(0.1), value_codec="fp32", collective="allgather", scaler=scaler)
    ddp = wrap(mlp(), state)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(loss_of(ddp, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() > 1024.0, "the test needs a change of scale"
    assert torch.equal(flat(ddp), flat(plain))
    assert torch.equal(residual_of(state, ddp), residual_of(plain_state, plain))


def test_an_overflow_on_one_rank_skips_the_step_on_all_and_scales_stay_equal(world: sc.World) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    state = sc.SparseState(sc.TopK(0.1), value_codec="fp32", scaler=scaler)
    ddp = wrap(mlp(), state)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        loss = scaler.scale(loss_of(ddp, step))
        (loss * math.inf if step == 2 and world.rank == world.size - 1 else loss).backward()
        before = flat(ddp)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(flat(ddp), before) == (step == 2)
        assert_replicas_equal(ddp)
    assert scaler.get_scale() == 512.0
    found = state.convergence()
    assert found is None or found.steps <= 3, "the step that was skipped does not count"
    assert math.isfinite(state.residual_norm())


def test_a_scaler_that_comes_too_late_is_refused(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(0.1))
    ddp = wrap(mlp(), state)
    for _ in train(ddp, 2):
        pass
    with pytest.raises(sc.StateError, match="after 2 steps"):
        state.attach_scaler(torch.amp.GradScaler("cpu"))
    with pytest.raises(sc.ConfigError, match="GradScaler"):
        state.attach_scaler(1024.0)  # type: ignore[arg-type]
