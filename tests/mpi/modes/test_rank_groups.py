"""Fewer ranks than the world: some train, some do not; groups that are apart, and groups that overlap."""

from __future__ import annotations

from functools import partial
from time import monotonic

import pytest
import torch
import torch.distributed as dist
from ledger import Ledger, lossless, sparse
from training import flat, loss_of, mlp, wrap

import sparsecomm as sc


def descend(ledger: Ledger) -> None:
    with torch.no_grad():
        for p in ledger.model.parameters():
            p -= 0.1 * p.grad


def run(ledger: Ledger, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        ledger.step(partial(lambda s: loss_of(ledger.ddp, s).backward(), step))
        ledger.check()
        descend(ledger)
        ledger.check_replicas()


@pytest.fixture
def three(world: sc.World) -> sc.World:
    if world.size < 3:
        pytest.skip("needs three ranks")
    return world


def test_every_other_rank_trains_while_the_others_do_something_else(three: sc.World) -> None:
    """Ranks 0, 2, ...: their world ranks are not their ranks in the group."""
    members = list(range(0, three.size, 2))
    group = dist.new_group(members)
    if three.rank not in members:
        alone = mlp()
        for step in range(6):
            loss_of(alone, step).backward()
        return
    state = sparse()
    ledger = Ledger(mlp(), state, process_group=group)
    run(ledger, 6)
    saved = state.state_dict()
    assert int(saved["rank"]) == members.index(three.rank)
    assert int(saved["world_size"]) == len(members)
    assert ledger.kept_back > 0


def test_a_group_in_another_order_of_ranks(three: sc.World) -> None:
    """new_group keeps the order it is given: rank 0 of the group may be the last of the world."""
    members = list(range(three.size))[::-1]
    group = dist.new_group(members)
    ours, plain = wrap(mlp(), lossless(), process_group=group), wrap(mlp(), None, process_group=group)
    for step in range(4):
        for ddp in (ours, plain):
            ddp.zero_grad()
            loss_of(ddp, step).backward()
        torch.testing.assert_close(flat(ours, lambda p: p.grad), flat(plain, lambda p: p.grad), rtol=1e-5, atol=1e-6)


def test_groups_that_overlap_in_one_rank(three: sc.World) -> None:
    """Rank 1 trains one model with rank 0 and another with rank 2, in turns."""
    low, high = dist.new_group([0, 1]), dist.new_group([1, 2])
    books = []
    if three.rank in (0, 1):
        books.append(Ledger(mlp(), sparse(), process_group=low))
    if three.rank in (1, 2):
        books.append(Ledger(mlp(), sparse(0.2), process_group=high))
    for step in range(4):
        for ledger in books:
            run(ledger, 1, step)
    assert all(ledger.kept_back > 0 for ledger in books)


def test_two_models_over_different_groups_in_one_backward(three: sc.World) -> None:
    """As with part of a model replicated over fewer ranks: the buckets of both travel at the same time."""
    low = dist.new_group([0, 1])
    everyone = Ledger(mlp(), sparse())
    some = Ledger(mlp(), sparse(), process_group=low) if three.rank < 2 else None
    for step in range(4):

        def both(step: int = step) -> None:
            loss = loss_of(everyone.ddp, step)
            if some is not None:
                loss = loss + loss_of(some.ddp, step)
            loss.backward()

        if some is None:
            everyone.step(both)
        else:
            some.ddp.zero_grad()
            some._seen.clear()
            everyone.step(both)
            some.step(lambda step=step: loss_of(some.ddp, 100 + step).backward())
        everyone.check()
        descend(everyone)
        everyone.check_replicas()


def average_by_hand(state: sc.SparseState) -> None:
    model = mlp()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    sc.allreduce_gradients(model, state)


def test_a_rank_outside_its_group_is_told_so_at_once(three: sc.World) -> None:
    """Nobody else takes part, so nothing may be sent: waiting for others would take down all that comes later."""
    group = dist.new_group([0, 1])
    if three.rank >= 2:
        start = monotonic()
        with pytest.raises(sc.ConfigError, match=f"rank {three.rank}.*group"):
            average_by_hand(sc.SparseState(sc.TopK(0.1), model=mlp(), process_group=group))
        assert monotonic() - start < 0.5 * three.engine.timeout


@pytest.mark.parametrize("shared", [False, True], ids=["model unknown", "state of two models"])
def test_an_error_in_a_group_is_told_to_the_group_alone(three: sc.World, shared: bool) -> None:
    group = dist.new_group([0, 1])
    if three.rank >= 2:
        return
    state = sc.SparseState(sc.TopK(0.1), process_group=group)
    kept = [wrap(mlp(), state, process_group=group) for _ in range(2)] if shared else []
    start = monotonic()
    with pytest.raises((RuntimeError, sc.ConfigError), match="one SparseState" if shared else "model"):
        loss_of(kept[0], 0).backward() if shared else average_by_hand(state)
    assert monotonic() - start < 0.5 * three.engine.timeout


def test_averaging_by_hand_in_a_group(three: sc.World) -> None:
    members = [0, three.size - 1]
    group = dist.new_group(members)
    if three.rank not in members:
        return
    model = mlp()
    state = lossless(model=model, process_group=group)
    plain = wrap(mlp(), None, process_group=group)
    for step in range(3):
        for m in (model, plain):
            m.zero_grad()
            loss_of(m, step).backward()
        sc.allreduce_gradients(model, state)
        torch.testing.assert_close(flat(model, lambda p: p.grad), flat(plain, lambda p: p.grad), rtol=1e-5, atol=1e-6)
