"""`collective="auto"` and fused buckets among real processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_bad_input import assert_still_works, exchange_flat
from training import (
    assert_replicas_equal,
    flat,
    grad_of,
    local_gradient,
    loss_of,
    mlp,
    residual_of,
    summed,
    train,
    wrap,
)

import sparsecomm as sc
from sparsecomm.exchange.auto.chooser import MOST_OPTIONS, ROUNDS, TURN, TURNS, WATCHED

LONG_ENOUGH = WATCHED + MOST_OPTIONS * TURN * TURNS * ROUNDS + 3
EVERYTHING = 10**6


def test_auto_tries_decides_alike_and_keeps_the_books(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(0.1))
    ddp = wrap(mlp(), state)
    for step in range(LONG_ENOUGH):
        before = residual_of(state, ddp)
        local = local_gradient(ddp.module, step)
        next(train(ddp, 1, first=step, momentum=0.0))
        assert_replicas_equal(ddp)
        got = flat(ddp, grad_of) * world.size + summed(residual_of(state, ddp))
        torch.testing.assert_close(got, summed(local + before), rtol=1e-4, atol=1e-5)
    text = state.explain()
    if world.size > 1:
        (chosen,) = [line for line in text.splitlines() if "chosen at step" in line]
        assert len(set(every_ranks([ord(c) for c in chosen]))) == 1, "all ranks have chosen alike"
    else:
        assert "more than one rank" in text


def every_ranks(numbers: list[int]) -> list[tuple[int, ...]]:
    """Every rank's numbers."""
    mine = torch.zeros(256, dtype=torch.float64)
    mine[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    out = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(out, mine)
    return [tuple(t.long().tolist()) for t in out]


def test_what_was_given_is_not_chosen(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(0.1), collective="allgather")
    for _ in train(wrap(mlp(), state), 2):
        pass
    assert "was given" in state.explain()


def test_ranks_that_choose_and_ranks_that_do_not_are_told_apart(world: sc.World) -> None:
    if world.size == 1:
        pytest.skip("needs two ranks")
    model = mlp()
    state = sc.SparseState(sc.TopK(0.1), model=model, collective="auto" if world.rank == 0 else "allgather")
    for _ in range(WATCHED):
        exchange_flat(state, model)
    with pytest.raises(RuntimeError, match="ranks disagree on"):
        exchange_flat(state, model)
    assert isinstance(state.last_error, sc.CollectiveMismatch)
    assert_still_works(world)


def test_auto_starts_again_with_other_options(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(0.1))
    ddp = wrap(mlp(), state)
    for _ in train(ddp, WATCHED + 2):
        pass
    state.update(density=0.5)
    for _ in train(ddp, WATCHED + 2, first=WATCHED + 2):
        assert_replicas_equal(ddp)
    saved = state.state_dict()
    state.load_state_dict(saved)
    for _ in train(ddp, WATCHED + 2, first=20):
        assert_replicas_equal(ddp)


@pytest.mark.parametrize("collective", ["allgather", "split_reduce", "dense"])
@pytest.mark.parametrize("fuse_bytes", [300, 700, EVERYTHING])
def test_fused_buckets_keep_the_books(world: sc.World, collective: str, fuse_bytes: int) -> None:
    state = sc.SparseState(sc.TopK(0.1), collective=collective, fuse_bytes=fuse_bytes, value_codec="fp16")
    ddp = wrap(mlp(), state)
    for step in range(4):
        before = residual_of(state, ddp)
        local = local_gradient(ddp.module, step)
        next(train(ddp, 1, first=step, momentum=0.0))
        assert_replicas_equal(ddp)
        got = flat(ddp, grad_of) * world.size + summed(residual_of(state, ddp))
        torch.testing.assert_close(got, summed(local + before), rtol=1e-4, atol=1e-5)
    assert (state.last_step().buckets == 1) == (fuse_bytes == EVERYTHING)
    assert state.last_step().numel == sum(p.numel() for p in ddp.parameters())


def test_density_one_fused_equals_plain_ddp(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(1.0), collective="allgather", value_codec="fp32", fuse_bytes=EVERYTHING)
    ours, plain = wrap(mlp(), state), wrap(mlp(), None)
    for _ in zip(train(ours, 5), train(plain, 5), strict=True):
        torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-5, atol=1e-6)
    assert state.last_step().buckets == 1


@pytest.mark.parametrize("feedback", [sc.MomentumCorrection(0.9), sc.AdamCorrection()], ids=lambda f: type(f).__name__)
def test_fused_moments_move_by_name_when_fusing_changes(world: sc.World, feedback: Any) -> None:
    state = sc.SparseState(sc.TopK(0.1), collective="allgather", fuse_bytes=EVERYTHING, feedback=feedback)
    ddp = wrap(mlp(), state)
    for _ in train(ddp, 3, momentum=0.0):
        assert_replicas_equal(ddp)
    saved = state.state_dict()
    state.update(fuse_bytes=0)
    for _ in train(ddp, 1, first=3, momentum=0.0):
        assert_replicas_equal(ddp)
    assert state.last_step().buckets > 1
    assert set(state.state_dict()) == set(saved)


def test_nan_in_one_fused_bucket_of_one_rank_is_seen_in_all(world: sc.World) -> None:
    state = sc.SparseState(sc.TopK(0.1), collective="allgather", fuse_bytes=EVERYTHING)
    ddp = wrap(mlp(), state)
    for _ in train(ddp, 2):
        pass
    before = residual_of(state, ddp)
    ddp.zero_grad()
    loss = loss_of(ddp, 9)
    if world.rank == world.size - 1:
        loss = loss * math.nan
    loss.backward()
    assert torch.isnan(flat(ddp, grad_of)).all()
    torch.testing.assert_close(residual_of(state, ddp), before, rtol=1e-5, atol=1e-6)


def test_a_bad_gradient_in_a_fused_bucket_fails_on_all_ranks_with_its_name(world: sc.World) -> None:
    model, culprit = mlp(), world.size - 1
    state = sc.SparseState(sc.TopK(0.1), model=model, collective="allgather", fuse_bytes=EVERYTHING)
    parameters = list(model.parameters())
    futures = []
    for i, p in enumerate(parameters):
        bad = i == 2 and world.rank == culprit
        numel = p.numel() + bad  # an element too many
        futures.append(state.start(i, [p], torch.ones(numel, dtype=torch.float32), last=i == len(parameters) - 1))
    for future in futures:
        with pytest.raises(RuntimeError, match=f"rank {culprit}"):
            future.wait()
    assert_still_works(world)
