"""sparsecomm.optim: one rank at density 1 trains as with torch; parameters are ahead only where they may be."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparsecomm as sc


def small_model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 5, dtype=torch.float32), torch.nn.Tanh(), torch.nn.Linear(5, 1, dtype=torch.float32)
    )


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float32)
    out: torch.Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return out


def backward(model: torch.nn.Module, state: sc.SparseState | None, step: int) -> None:
    model.zero_grad()
    loss_of(model, step).backward()
    if state is not None:
        sc.allreduce_gradients(model, state, bucket_bytes=80)


def train(model: torch.nn.Module, state: sc.SparseState | None, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, state, step)
        optimizer.step()


def state_of(model: torch.nn.Module, density: float = 1.0) -> sc.SparseState:
    return sc.SparseState(sc.TopK(density), model=model, collective="allgather", value_codec="fp32")


@pytest.fixture(autouse=True)
def _world() -> None:
    sc.init()


def test_one_rank_that_sends_everything_is_adamw() -> None:
    ours, plain = small_model(), small_model()
    state = state_of(ours)
    options = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    train(ours, state, sc.optim.AdamW(ours.parameters(), state, **options), range(12))
    train(plain, None, torch.optim.AdamW(plain.parameters(), **options), range(12))
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_one_rank_that_sends_everything_is_sgd(nesterov: bool) -> None:
    ours, plain = small_model(), small_model()
    state = state_of(ours)
    options = {"lr": 0.01, "momentum": 0.9, "nesterov": nesterov}
    train(ours, state, sc.optim.SGD(ours.parameters(), state, **options), range(12))
    train(plain, None, torch.optim.SGD(plain.parameters(), **options), range(12))
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-4, atol=1e-6)


def test_weight_decay_is_close_to_that_of_torch() -> None:
    ours, plain = small_model(), small_model()
    state = state_of(ours)
    train(ours, state, sc.optim.SGD(ours.parameters(), state, lr=0.01, momentum=0.9, weight_decay=0.01), range(40))
    train(plain, None, torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01), range(40))
    torch.testing.assert_close(flat(ours), flat(plain), rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize(
    "rate",
    [
        pytest.param(lambda step: 1.0, id="constant"),
        pytest.param(lambda step: 0.9**step, id="decaying"),
        pytest.param(lambda step: step / 12, id="rising"),
        pytest.param(lambda step: 1.0 if step < 6 else 0.05, id="dropping"),
    ],
)
def test_gradients_are_taken_where_the_residual_is_applied(optimizer: str, rate: Callable[[int], float]) -> None:
    """One rank knows everything that is held back, so training follows dense however little is sent.

    What waits counts with the rate at which it was computed, not with that at which it is sent.
    """
    ours, plain = small_model(), small_model()
    state = state_of(ours, density=0.1)
    seen = []
    ours[0].register_forward_hook(lambda *_: seen.append(flat(ours)))
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0}
    options |= {"betas": (0.8, 0.95)} if optimizer == "AdamW" else {"momentum": 0.8}
    runs = [(ours, state, getattr(sc.optim, optimizer)(ours.parameters(), state, **options))]
    runs.append((plain, None, getattr(torch.optim, optimizer)(plain.parameters(), **options)))
    schedules = [torch.optim.lr_scheduler.LambdaLR(run[2], rate) for run in runs]
    for step in range(12):
        expected = flat(plain)
        for run in runs:
            train(*run, range(step, step + 1))
        torch.testing.assert_close(seen[step], expected, rtol=1e-4, atol=1e-5)
        for schedule in schedules:
            schedule.step()
    assert not torch.allclose(flat(ours), flat(plain), rtol=1e-4, atol=1e-5), "the averaged parameters lag behind"


def moved_model() -> tuple[torch.nn.Module, sc.SparseState, sc.optim.AdamW]:
    """A model with something held back."""
    model = small_model()
    state = state_of(model, density=0.1)
    optimizer = sc.optim.AdamW(model.parameters(), state, lr=0.01)
    train(model, state, optimizer, range(3))
    return model, state, optimizer


def test_parameters_come_back_bit_for_bit() -> None:
    model, _, _ = moved_model()
    before = flat(model)
    loss_of(model, 0)
    assert not torch.equal(flat(model), before), "ahead for the forward and backward passes"
    saved = model.state_dict()
    assert torch.equal(flat(model), before)
    assert all(
        torch.equal(a, b) for a, b in zip(saved.values(), copy.deepcopy(model).state_dict().values(), strict=True)
    )


def test_evaluation_sees_the_averaged_parameters() -> None:
    model, _, _ = moved_model()
    before = flat(model)
    loss_of(model, 0).backward()
    model.eval()
    loss_of(model, 0)
    assert torch.equal(flat(model), before)
    model.train()
    with torch.no_grad():
        loss_of(model, 0)
    assert torch.equal(flat(model), before)


def test_accumulated_gradients_are_taken_at_one_place() -> None:
    model, state, optimizer = moved_model()
    before = flat(model)
    loss_of(model, 0).backward()
    ahead = flat(model)
    loss_of(model, 1).backward()
    assert torch.equal(flat(model), ahead)
    assert not torch.equal(ahead, before)
    sc.allreduce_gradients(model, state, bucket_bytes=80)
    assert torch.equal(flat(model), before), "back before anybody reads them, even if no step follows"
    optimizer.step()


def test_a_step_that_was_not_taken_is_not_lost() -> None:
    """Without optimizer.step(), the next pass is ahead of the same parameters by the residual of then."""
    model, state, _ = moved_model()
    before = flat(model)
    backward(model, state, 0)
    loss_of(model, 1)
    model.state_dict()
    assert torch.equal(flat(model), before)


def test_loading_a_model_in_the_middle_of_a_step() -> None:
    model, state, optimizer = moved_model()
    other = {k: torch.zeros_like(t) for k, t in model.state_dict().items()}
    loss_of(model, 0).backward()
    model.load_state_dict(other)
    assert not flat(model).any()
    sc.allreduce_gradients(model, state, bucket_bytes=80)
    optimizer.step()
    assert float(flat(model).abs().max()) < 0.1


def test_a_run_goes_on_from_its_checkpoint() -> None:
    whole, first, second = small_model(), small_model(), small_model()
    states = [state_of(m, density=0.1) for m in (whole, first, second)]
    a, b, c = (sc.optim.AdamW(m.parameters(), s, lr=0.01) for m, s in zip((whole, first, second), states, strict=True))
    train(whole, states[0], a, range(8))
    train(first, states[1], b, range(4))
    second.load_state_dict(first.state_dict())
    states[2].load_state_dict(states[1].state_dict())
    c.load_state_dict(b.state_dict())
    train(second, states[2], c, range(4, 8))
    assert torch.equal(flat(second), flat(whole))


def test_a_scheduler_may_change_rates_and_betas() -> None:
    model = small_model()
    state = state_of(model, density=0.5)
    optimizer = sc.optim.AdamW(model.parameters(), state, lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=20)
    for step in range(10):
        train(model, state, optimizer, range(step, step + 1))
        scheduler.step()
    assert isinstance(state.config.feedback, sc.AdamCorrection)
    assert state.config.feedback.beta1 != 0.9
    assert bool(flat(model).isfinite().all())


def test_groups_may_differ_in_rate_and_decay_but_not_in_betas() -> None:
    model = small_model()
    state = state_of(model)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    before = flat(model)
    train(model, state, sc.optim.AdamW(groups, state, lr=0.01, weight_decay=0.1), range(2))
    n = sum(p.numel() for p in model[0].parameters())
    assert torch.equal(flat(model)[:n], before[:n])
    assert not torch.equal(flat(model)[n:], before[n:])
    with pytest.raises(sc.ConfigError, match="all groups need the same betas"):
        sc.optim.AdamW(
            [{**groups[0], "params": [model[0].weight], "betas": (0.5, 0.9)}, {"params": [model[2].weight]}], state
        )


@pytest.mark.parametrize(
    ("ranks", "beta2", "own"), [(1, 0.95, 0.95), (4, 0.95, 0.95**0.25), (64, 0.95, 0.999), (8, 0.9999, 0.9999)]
)
def test_a_second_moment_averages_over_the_gradients_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch, ranks: int, beta2: float, own: float
) -> None:
    model = small_model()
    state = state_of(model)
    monkeypatch.setattr(sc.SparseState, "group_size", lambda _: ranks)
    sc.optim.AdamW(model.parameters(), state, betas=(0.9, beta2))
    feedback = state.config.feedback
    assert isinstance(feedback, sc.AdamCorrection)
    assert feedback.beta2 == pytest.approx(own, rel=1e-12)


@pytest.mark.parametrize(("ranks", "density", "own"), [(1, 0.01, 0.9), (2, 1.0, 0.9), (8, 0.01, 1 - 0.1**0.505)])
def test_a_first_moment_is_shorter_where_updates_wait(
    monkeypatch: pytest.MonkeyPatch, ranks: int, density: float, own: float
) -> None:
    model = small_model()
    state = state_of(model, density)
    monkeypatch.setattr(sc.SparseState, "group_size", lambda _: ranks)
    sc.optim.AdamW(model.parameters(), state, betas=(0.9, 0.95))
    assert isinstance(state.config.feedback, sc.AdamCorrection)
    assert state.config.feedback.beta1 == pytest.approx(own)


def test_frozen_parameters_stay() -> None:
    model = small_model()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    state = state_of(model, density=0.1)
    train(model, state, sc.optim.AdamW(model.parameters(), state, lr=0.01), range(4))
    assert torch.equal(model[0].weight, before)


def test_what_cannot_work_is_named() -> None:
    model = small_model()
    with pytest.raises(sc.ConfigError, match="needs the SparseState"):
        sc.optim.AdamW(model.parameters(), None)
    with pytest.raises(sc.ConfigError, match="register_comm_hook"):
        sc.optim.AdamW(model.parameters(), sc.SparseState(sc.TopK(0.1)))
    with pytest.raises(sc.ConfigError, match="does not have"):
        sc.optim.AdamW(small_model().parameters(), state_of(model))
    with pytest.raises(sc.ConfigError, match="clip_norm"):
        sc.optim.AdamW(model.parameters(), state_of(model), max_norm=-1.0)


def test_clipping_the_updates_is_named() -> None:
    """One rank measures nothing, so two simulated ranks' worth of it is put in by hand."""
    model = small_model()
    state = state_of(model, density=0.5)
    optimizer = sc.optim.AdamW(model.parameters(), state, lr=0.01)
    backward(model, state, 0)
    for known in state._memories.known.values():
        p = next(p for p in model.parameters() if id(p) == known.parameters[0])
        assert p.grad is not None
        sent = p.grad.flatten().nonzero()
        if len(sent):
            known.bucket.delivered = (0, int(sent[0]), float(p.grad.flatten()[sent[0]]))
    assert state.delivered()
    optimizer.step()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(sc.ConfigError, match=r"scaled the averages.*max_norm="):
        optimizer.step()


def test_a_decaying_rate_goes_on_after_a_checkpoint() -> None:
    """Loading replaces the optimizer's groups, and gradients are to be taken ahead by the new rate."""
    whole, first, second = small_model(), small_model(), small_model()
    runs: list[Any] = []
    for model in (whole, first, second):
        state = state_of(model, density=0.1)
        optimizer = sc.optim.AdamW(model.parameters(), state, lr=0.05)
        runs.append((state, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)))

    def go(model: torch.nn.Module, run: int, steps: range) -> None:
        state, optimizer, scheduler = runs[run]
        for step in steps:
            train(model, state, optimizer, range(step, step + 1))
            scheduler.step()

    go(whole, 0, range(12))
    go(first, 1, range(7))
    second.load_state_dict(first.state_dict())
    for mine, saved in zip(runs[2], runs[1], strict=True):
        mine.load_state_dict(saved.state_dict())
    go(second, 2, range(7, 12))
    assert torch.equal(flat(second), flat(whole))


def test_a_later_optimizer_of_a_model_takes_over() -> None:
    model, state, optimizer = moved_model()
    before = flat(model)
    loss_of(model, 0)
    later = sc.optim.AdamW(model.parameters(), state, lr=0.02)
    assert torch.equal(flat(model), before)
    train(model, state, later, range(3, 6))
    before = flat(model)
    model.eval()
    loss_of(model, 0)
    assert torch.equal(flat(model), before), "nothing of the earlier optimizer is left"
    with pytest.raises(sc.ConfigError, match="was replaced"):
        optimizer.step()


def test_an_optimizer_that_goes_leaves_the_parameters_in_place() -> None:
    model, state, optimizer = moved_model()
    before = flat(model)
    loss_of(model, 0)
    del optimizer
    gc.collect()
    assert torch.equal(flat(model), before)
    loss_of(model, 0)
    assert torch.equal(flat(model), before), "nobody moves them any more"
    assert state.step == 3


def test_another_feedback_is_refused_and_another_preset_is_not() -> None:
    model, state, optimizer = moved_model()
    state.update(sc.preset("adamw", density=0.5).change(collective="allgather"))
    train(model, state, optimizer, range(3, 5))
    assert state.config.feedback == sc.AdamCorrection(0.9, 0.999, 1e-8, aligned=True)
    state.update(feedback=sc.ErrorFeedback())
    with pytest.raises(sc.ConfigError, match="needs AdamCorrection"):
        loss_of(model, 0)


def test_a_loaded_threshold_survives_a_new_optimizer() -> None:
    model = small_model()
    state = sc.SparseState(sc.ThresholdTopK(0.2), model=model, collective="allgather")
    train(model, state, sc.optim.AdamW(model.parameters(), state, lr=0.01), range(3))
    saved = state.state_dict()
    assert any(k.startswith("selector.") for k in saved)
    again = sc.SparseState(sc.ThresholdTopK(0.2), feedback=sc.AdamCorrection(), model=model, collective="allgather")
    again.load_state_dict(saved)
    sc.optim.AdamW(model.parameters(), again, lr=0.01)
    assert {k for k in again.state_dict() if k.startswith("selector.")} == {k for k in saved if "selector." in k}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": 0.9}, "betas"),
        ({"betas": (1.0, 0.9)}, "beta1"),
        ({"betas": (0.9, -0.5)}, "beta2"),
        ({"betas": (0.9, "0.5")}, "beta2"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_unacceptable_options_are_named(options: dict[str, Any], named: str) -> None:
    model = small_model()
    with pytest.raises(sc.ConfigError, match=named):
        sc.optim.AdamW(model.parameters(), state_of(model), **options)


def test_what_cannot_be_done_with_an_optimizer_is_named() -> None:
    model, _, optimizer = moved_model()
    with pytest.raises(sc.StateError, match="cannot be copied"):
        copy.deepcopy(optimizer)
    with pytest.raises(sc.ConfigError, match="does not have"):
        optimizer.add_param_group({"params": small_model().parameters()})
    with pytest.raises(sc.ConfigError, match="nesterov"):
        sc.optim.SGD(model.parameters(), state_of(model), nesterov=True)
