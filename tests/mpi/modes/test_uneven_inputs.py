"""Join: ranks run out of data at different times; those that have go on answering with zeros."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import zoo
from ledger import Ledger, lossless, sparse
from torch import nn
from torch.distributed.algorithms.join import Join
from training import assert_replicas_equal, flat, loss_of, mlp, wrap

import sparsecomm as sc

LONGEST = 8
LENGTHS = {
    "first rank ends first": lambda rank, size: LONGEST - 2 * (size - 1 - rank),
    "last rank ends first": lambda rank, size: LONGEST - 2 * rank,
    "only one rank has data": lambda rank, size: 0 if rank else LONGEST,
    "ends before the buckets are rebuilt": lambda rank, size: 1 if rank == 0 and size > 1 else LONGEST,
}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}], ids=str)
@pytest.mark.parametrize("feedback", [sc.ErrorFeedback(), sc.MomentumCorrection(momentum=0.5)], ids=["ef", "dgc"])
def test_uneven_inputs_end_agree_and_lose_nothing(
    world: sc.World, length: Any, options: dict[str, bool], feedback: sc.Feedback
) -> None:
    state = sparse(feedback=feedback)
    ledger = Ledger(mlp(), state, **options)
    optimizer = torch.optim.SGD(ledger.ddp.parameters(), lr=0.05)
    mine = max(0, length(world.rank, world.size))
    longest = max(range(world.size), key=lambda r: length(r, world.size))
    with ledger.ddp.join():
        for step in range(mine):
            ledger.step(partial(lambda step: loss_of(ledger.ddp, step).backward(), step))
            optimizer.step()
    assert_replicas_equal(ledger.ddp)  # DDP hands the parameters of the rank that stayed longest to all
    if isinstance(feedback, sc.ErrorFeedback):
        ledger.check(rank=longest)
    assert state.step == LONGEST, "ranks that have ended take part in every exchange"
    for step in range(3):  # and all go on together after it
        optimizer.zero_grad()
        loss_of(ledger.ddp, 50 + step).backward()
        optimizer.step()
        assert_replicas_equal(ledger.ddp)


@pytest.mark.parametrize("accumulate", [False, True], ids=["every step", "no_sync"])
def test_uneven_inputs_equal_plain_ddp(world: sc.World, accumulate: bool) -> None:
    ours, plain = wrap(mlp(), lossless()), wrap(mlp(), None)
    for ddp in (ours, plain):
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        with ddp.join():
            for step in range(4 + 2 * world.rank):
                if accumulate and step % 2:
                    with ddp.no_sync():
                        loss_of(ddp, step).backward()
                    continue
                loss_of(ddp, step).backward()
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-5, atol=1e-6)


def test_two_models_join_together(world: sc.World) -> None:
    first, second = sparse(), sparse(0.3)
    a, b = wrap(mlp(), first), wrap(zoo.seeded(nn.Linear, 12, 3, dtype=torch.float32), second)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (a, b)]
    with Join([a, b]):
        for step in range(3 + 2 * world.rank):
            for model, optimizer in zip((a, b), optimizers, strict=True):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                optimizer.step()
    assert_replicas_equal(a)
    assert_replicas_equal(b)
    assert first.step == second.step == 3 + 2 * (world.size - 1)


def test_a_rank_that_must_not_end_early_says_so_on_all(world: sc.World) -> None:
    """throw_on_early_termination: all ranks raise instead of going on; nothing of ours is left in flight."""
    if world.size == 1:
        pytest.skip("a single rank ends when it ends")
    state = sparse()
    ddp = wrap(mlp(), state)

    def run() -> None:
        with ddp.join(throw_on_early_termination=True):
            for step in range(3 + world.rank):
                ddp.zero_grad()
                loss_of(ddp, step).backward()

    with pytest.raises(RuntimeError, match=r"exhausted (all )?inputs"):
        run()
    other = wrap(mlp(), sparse())
    loss_of(other, 0).backward()


def test_dividing_by_the_ranks_that_are_left_is_not_silently_ignored(world: sc.World) -> None:
    """divide_by_initial_world_size=False asks for another divisor than P: heed it, or refuse it by name."""
    if world.size == 1:
        pytest.skip("a single rank divides by one")
    ours, plain = wrap(mlp(), lossless()), wrap(mlp(), None)
    refusals, grads = [], []
    for ddp in (plain, ours):
        try:
            with ddp.join(divide_by_initial_world_size=False):
                for step in range(3 + 2 * world.rank):
                    ddp.zero_grad()
                    loss_of(ddp, step).backward()
        except RuntimeError as error:
            refusals.append(str(error))
        grads.append([p.grad.clone() for p in ddp.parameters() if p.grad is not None])
    if refusals:
        assert "divide_by_initial_world_size" in refusals[0]
        return
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
