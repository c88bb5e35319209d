"""Models that change mid-run: frozen and thawed layers, a DDP built anew, models that share a state in turn."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
import zoo
from ledger import Ledger, sparse
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import assert_replicas_equal, loss_of, mlp, train, wrap

import sparsecomm as sc


def descend(ledger: Ledger) -> None:
    with torch.no_grad():
        for p in ledger.model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad


def run(ledger: Ledger, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        ledger.step(partial(lambda s: loss_of(ledger.ddp, s).backward(), step))
        ledger.check()
        descend(ledger)
        ledger.check_replicas()


@pytest.mark.parametrize("view", [False, True], ids=["copies", "views"])
def test_layers_frozen_and_thawed_again_and_again_lose_nothing(world: sc.World, view: bool) -> None:
    ledger = Ledger(mlp(), sparse(), find_unused_parameters=True, gradient_as_bucket_view=view)
    for phase, frozen in enumerate([None, 0, 2, None, 4, 0, None]):
        for i in (0, 2, 4):
            ledger.model[i].requires_grad_(i != frozen)
        before = ledger.residuals()
        run(ledger, 3 * phase, 3)
        if frozen is not None:
            assert all(torch.equal(ledger.residuals()[f"{frozen}.{w}"], before[f"{frozen}.{w}"]) for w in ("weight",))


def test_a_new_ddp_with_a_new_state_goes_on_where_the_old_one_was(world: sc.World) -> None:
    """Gradual unfreezing: at each phase DDP is built anew around other trainable parameters."""
    model = mlp()
    saved: dict[str, torch.Tensor] = {}
    total_given: dict[str, torch.Tensor] = {}
    for phase, trainable in enumerate([(4,), (2, 4), (0, 2, 4), (0,)]):
        for i in (0, 2, 4):
            model[i].requires_grad_(i in trainable)
        state = sparse()
        ledger = Ledger(model, state)
        if saved:
            state.load_state_dict(saved)
            assert state.step == 3 * phase
            ledger.given = {n: t.clone() for n, t in ledger.residuals().items()}  # comes in once
            for name, kept in total_given.items():
                assert torch.equal(ledger.residuals()[name], kept), name
        run(ledger, 3 * phase, 3)
        saved, total_given = state.state_dict(), ledger.residuals()
    assert all(bool(total_given[f"{i}.weight"].any()) for i in (0, 2, 4))


def test_a_new_ddp_around_the_same_model_may_take_the_same_state(world: sc.World) -> None:
    model, state = mlp(), sparse()
    first = Ledger(model, state)
    run(first, 0, 3)
    del first.ddp
    gc.collect()
    second = Ledger(model, state)
    second.given = {n: t.clone() for n, t in second.residuals().items()}
    run(second, 3, 3)
    assert state.step == 6


def test_a_new_ddp_with_other_options_is_asked_for_them_anew(world: sc.World) -> None:
    """Only the second DDP model allows unused parameters; the residual of one that no rank uses must stay."""
    model, state = zoo.seeded(zoo.Branches), sparse()
    first = Ledger(model, state)
    run(first, 0, 3)
    del first
    gc.collect()
    second = Ledger(model, state, find_unused_parameters=True)
    second.given = {n: t.clone() for n, t in second.residuals().items()}
    model.use = "a"
    run(second, 3, 3)
    model.use = "abc"
    run(second, 6, 2)


def test_the_same_state_on_another_model_after_the_first_has_trained_is_refused(world: sc.World) -> None:
    state = sparse()
    first = wrap(mlp(), state)
    for _ in train(first, 2):
        pass
    second = wrap(mlp(), state)
    before = {k: t.clone() for k, t in state.state_dict().items()}
    with pytest.raises(RuntimeError, match="one SparseState"):
        loss_of(second, 0).backward()
    after = state.state_dict()
    assert all(torch.equal(after[k], t) for k, t in before.items() if k.startswith("residual."))


def test_a_state_survives_its_model(world: sc.World) -> None:
    """The state holds no model alive that the script has dropped."""
    import weakref

    state = sparse()
    ddp = wrap(mlp(), state)
    for _ in train(ddp, 2):
        pass
    ghost = weakref.ref(ddp)
    del ddp, _
    gc.collect()
    assert ghost() is None
    assert state.residual_norm() > 0


def test_layers_added_between_ddps_are_missing_by_name(world: sc.World) -> None:
    state = sparse()
    ddp = wrap(mlp(), state)
    for _ in train(ddp, 2):
        pass
    grown = nn.Sequential(*mlp(), nn.Linear(3, 3, dtype=torch.float32))
    again = sparse()
    grown_ddp = wrap(grown, again)
    with pytest.raises(sc.StateError, match=r"5\.bias.*5\.weight"):
        again.load_state_dict(state.state_dict())
    loss_of(grown_ddp, 0).backward()


class Ticklish(nn.Module):
    """Layers that take part at random, differently on every rank, some of them on none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.trunk = nn.Linear(12, 3, dtype=torch.float32)
        self.extra = nn.ModuleList(nn.Linear(12, 3, dtype=torch.float32) for _ in range(5))
        self.generator = torch.Generator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.trunk(x)
        for i in torch.randint(5, (2,), generator=self.generator).tolist():
            out = out + self.extra[i](x)
        return out


@pytest.mark.parametrize("feedback", [sc.ErrorFeedback(), sc.MomentumCorrection()], ids=["ef", "dgc"])
def test_layer_drop_loses_nothing(world: sc.World, feedback: sc.Feedback) -> None:
    ledger = Ledger(Ticklish(), sparse(feedback=feedback), find_unused_parameters=True)
    ledger.model.generator.manual_seed(world.rank)
    for step in range(25):
        ledger.step(partial(lambda s: loss_of(ledger.ddp, s).backward(), step))
        descend(ledger)
        ledger.check_replicas()
        if isinstance(feedback, sc.ErrorFeedback):
            ledger.check()
    if isinstance(feedback, sc.MomentumCorrection):
        assert_replicas_equal(ledger.ddp)


def test_ddp_does_not_mind_parameters_that_require_no_gradient_from_the_start(world: sc.World) -> None:
    ledger = Ledger(zoo.seeded(zoo.Frozen), sparse())
    run(ledger, 0, 4)
    saved = ledger.state.state_dict()
    assert saved["residual.inner.0.weight"].numel() == 0
    assert isinstance(ledger.ddp, DistributedDataParallel)
